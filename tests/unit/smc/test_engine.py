"""The SMC loop: lineages, invariances, counters, refusals."""

from functools import partial

import pytest
import torch

from ppl_diffusion.denoisers import EvaluatedDenoiser
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import (
    RESAMPLERS,
    CallableTwist,
    FeynmanKac,
    Multinomial,
    feynman_kac,
    run_smc,
)
from ppl_diffusion.smc.twists import ArgmaxFill, Defensive, PersistentFill, SampledFill
from ppl_diffusion.testing import (
    counted,
    toy_chain,
    toy_markov_chain,
    toy_potential,
)

POTENTIAL = toy_potential(length=5, scale=1.5)
TWISTS = [None, "argmax", "persistent"]
each_scheme = pytest.mark.parametrize("resampler", RESAMPLERS)


def run(chain, potential=POTENTIAL, n=16, runs=6, seed=0, twist="argmax", **options):
    fk_options = {key: options.pop(key) for key in ("proposal", "twist_every") if key in options}
    fk = FeynmanKac(chain, potential, twist, **fk_options)
    return run_smc(fk, n, runs, generator=torch.Generator().manual_seed(seed), **options)


class Recorder:
    """A useless twist that keeps every population it is shown."""

    def __init__(self, spread=1.0):
        self.populations, self.spread = [], spread

    def __call__(self, carry, k):
        tokens = carry["tokens"]
        self.populations.append(tokens.clone())
        return self.spread * torch.sin(tokens.sum(-1).double() + k)


def recorded(chain, **options):
    recorder = Recorder()
    post = run(chain, twist=recorder, **options)
    return post, [*recorder.populations, post.x0]


@each_scheme
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_paths_are_the_lineages(resampler, name):
    """Each stored path is traced by hand through the populations the twist was shown."""
    chain = toy_markov_chain(name)
    post, populations = recorded(chain, resampler=resampler, ess_threshold=2.0)
    assert post.path.shape == (6, 16, 5, 5)
    assert post.path.dtype == torch.int64
    for r in range(6):
        for n in range(16):
            index = n
            for k in range(4, -1, -1):
                assert torch.equal(post.path[r, n, k], populations[k][r, index])
                index = int(post.ancestors[k - 1, r, index]) if k else index
            assert int(post.eve[r, n]) == index
    assert torch.equal(post.path[..., -1, :], post.x0)


@each_scheme
def test_paths_are_possible_and_ancestors_are_alive(resampler):
    """Constraint at the end, weights at every step: nobody descends from a dead particle."""
    chain = toy_markov_chain("uniform")
    forbidding = Potential(lambda x0: torch.where(x0[..., 0] == 0, -torch.inf, 0.0))
    post = run(chain, forbidding, resampler=resampler, ess_threshold=2.0)
    assert bool((chain.log_prob(post.path) > -torch.inf).all())
    assert bool((post.ancestors[0] == torch.arange(16)).all())


def test_no_resampling_no_crossing():
    post = run(toy_markov_chain(), ess_threshold=0.0)
    assert bool((post.ancestors == torch.arange(16)).all())
    assert not bool(post.resampled.any())
    assert bool((post.eve == torch.arange(16)).all())


def test_runs_are_resampled_one_by_one():
    post = run(toy_markov_chain(), runs=64, n=8, ess_threshold=0.7)
    due = post.ess < 0.7 * 8
    due[:, -1] = False
    assert torch.equal(post.resampled, due)
    assert 0 < int(due.sum()) < due[:, :-1].numel()
    moved = (post.ancestors[1:] != torch.arange(8)).any(-1).T
    assert not bool((moved & ~post.resampled[:, :-1]).any())


@each_scheme
def test_weights_are_normalised(resampler):
    post = run(toy_markov_chain("uniform"), resampler=resampler)
    total = torch.logsumexp(post.log_weights, -1)
    torch.testing.assert_close(total, torch.zeros(6).double(), rtol=0, atol=1e-12)
    assert torch.equal(post.log_potential, POTENTIAL(post.x0))
    assert torch.equal(post.log_evidence, post.log_evidence_steps[:, -1])


def test_without_resampling_it_is_importance_sampling():
    post = run(toy_markov_chain(), ess_threshold=0.0, twist="persistent")
    log_g = POTENTIAL(post.x0)
    torch.testing.assert_close(post.log_weights, log_g.log_softmax(-1))
    expected = torch.logsumexp(log_g, -1) - torch.tensor(16.0).double().log()
    torch.testing.assert_close(post.log_evidence, expected)


@pytest.mark.parametrize("twist", TWISTS)
@pytest.mark.parametrize("shift", [3.0, -40.0])
def test_a_constant_shifts_the_evidence_and_nothing_else(twist, shift):
    chain = toy_markov_chain("uniform")
    shifted = Potential(lambda x0: POTENTIAL(x0) + shift)
    here, there = run(chain, twist=twist), run(chain, shifted, twist=twist)
    assert torch.equal(here.x0, there.x0)
    assert torch.equal(here.ancestors, there.ancestors)
    torch.testing.assert_close(there.log_weights, here.log_weights)
    torch.testing.assert_close(there.log_evidence, here.log_evidence + shift)


@pytest.mark.parametrize("twist", TWISTS)
def test_same_seed_same_posterior(twist):
    chain = toy_markov_chain("uniform")
    first, again, other = (run(chain, twist=twist, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.path, again.path)
    assert torch.equal(first.log_weights, again.log_weights)
    assert not torch.equal(first.x0, other.x0)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
@pytest.mark.parametrize("twist", TWISTS)
def test_caches_change_costs_only(monkeypatch, name, twist):
    """Deduplication and reuse on, off, and chunks of any size: identical particles."""
    chain = toy_markov_chain(name)
    cached = run(chain, twist=twist)
    chunked = run(chain, twist=twist, max_rows=3)
    monkeypatch.setattr(feynman_kac, "EvaluatedDenoiser", partial(EvaluatedDenoiser, reuse=False))
    plain = run(chain, twist=twist)
    for other in (chunked, plain):
        assert torch.equal(cached.path, other.path)
        torch.testing.assert_close(cached.log_weights, other.log_weights)
    assert cached.num_evaluations == chunked.num_evaluations
    if name == "absorbing" or twist is not None:
        assert cached.num_evaluations < plain.num_evaluations


def distinct(populations):
    return sum(len(p.flatten(0, -2).unique(dim=0)) for p in populations)


def test_counters_equal_their_formulas():
    """Time-dependent denoiser, no look-ahead of its own: one row per distinct state and step."""
    chain, counter = counted(toy_markov_chain("uniform"))
    post, populations = recorded(chain, ess_threshold=2.0)
    runs = torch.arange(6)[:, None]
    moved_from = [populations[0]] + [
        populations[k][runs, post.ancestors[k]] for k in range(1, post.num_steps)
    ]
    assert post.num_evaluations == counter.rows == distinct(moved_from)
    assert post.num_potential_calls == distinct([post.x0])
    assert post.num_evaluations < 6 * 16 * post.num_steps


def test_counters_of_masked_chains():
    """Time-free and masked: unchanged states are not asked about again; the first is one row."""
    chain, counter = counted(toy_markov_chain("absorbing"))
    post, populations = recorded(chain, ess_threshold=0.0)
    assert post.num_evaluations == counter.rows
    expected, known = 0, set()
    for population in populations[:-1]:
        rows = {tuple(row) for row in population.flatten(0, -2).tolist()}
        if all(3 not in row for row in rows):
            continue
        expected += len(rows - known)
        known = rows  # the last call's rows are remembered
    assert post.num_evaluations == expected


def test_calls_of_the_potential():
    """The argmax look-ahead asks once per distinct guess it has not just seen."""
    asked = []
    potential = Potential(lambda x0: (asked.append(x0.clone()), POTENTIAL(x0))[1])
    post = run(toy_markov_chain("uniform"), potential)
    assert sum(len(rows) for rows in asked) == post.num_potential_calls
    assert all(len(rows.unique(dim=0)) == len(rows) for rows in asked)


def test_twist_every():
    calls = []

    def twist(carry, k):
        calls.append(k)
        return torch.zeros(carry["tokens"].shape[:2])

    run(toy_markov_chain(num_steps=6), twist=twist, twist_every=2)
    assert calls == [0, 2, 4]


def test_network_rows_of_the_same_kernel_are_not_paid_twice():
    """The argmax look-ahead shares its rows with the next move."""
    chain = toy_markov_chain("uniform")
    plain = run(chain, twist=None, ess_threshold=0.0)
    guided = run(chain, twist="argmax", ess_threshold=0.0)
    assert guided.num_evaluations == plain.num_evaluations


def test_proposal_rows_are_counted():
    chain = toy_chain("uniform", num_steps=3)
    other, counter = counted(toy_chain(chain.kernel.process, num_steps=3, seed=4))
    potential = toy_potential()
    plain = run(chain, potential, twist=None, ess_threshold=0.0)
    post = run(chain, potential, twist=None, ess_threshold=0.0, proposal=other.kernel)
    assert counter.rows > 0
    assert post.num_evaluations >= counter.rows
    assert plain.settings["proposal"] is None
    assert post.settings["proposal"] == "InterpolatingKernel"


def test_path_may_be_left_out():
    kept, left = run(toy_markov_chain()), run(toy_markov_chain(), store_path=False)
    assert left.path is None
    assert torch.equal(kept.x0, left.x0)


def test_progress_is_reported():
    seen = []
    run(toy_markov_chain(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 4) for k in range(1, 5)]


def test_prompt_stays():
    chain = toy_chain("uniform", length=3, prompt=torch.tensor([2, -1, -1]))
    post = run(chain, toy_potential(length=3))
    assert bool((post.path[..., 0] == 2).all())


def test_died_at_the_step_of_the_last_particle():
    """A twist cannot kill; a potential only at the end; a wrong proposal at its own step."""
    chain = toy_chain("absorbing", num_steps=3)
    kernel = InterpolatingKernel(
        chain.kernel.process, chain.kernel.denoiser, num_steps=3, kappa=[1.0, 0.0, 1.0]
    )  # remasks, which the model never does
    post = run(chain, toy_potential(), twist=None, proposal=kernel, n=2, runs=400)
    died = post.died_at[post.died_at >= 0]
    assert len(died) > 0
    assert set(died.tolist()) == {1}
    dead = post.died_at >= 0
    assert bool((post.log_evidence[dead] == -torch.inf).all())
    assert torch.equal(post.alive, ~dead)


def test_result_says_what_it_is():
    post = run(toy_markov_chain(), resampler="ssp", ess_threshold=0.9)
    assert post.exact
    assert "4-step reverse chain" in post.target
    assert post.settings["resampler"] == "ssp"
    assert post.settings["twist"] == "argmax"
    assert post.times.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert post.seconds >= 0
    assert (post.num_runs, post.num_particles, post.num_steps) == (6, 16, 4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "num_particles and num_runs must be >= 1 and whole, got 0 and 6"),
        ({"runs": 0}, "num_particles and num_runs must be >= 1"),
        ({"ess_threshold": -1.0}, "ess_threshold must be a number >= 0, got -1.0"),
        ({"ess_threshold": float("nan")}, "ess_threshold must be a number >= 0"),
        ({"resampler": "best"}, "unknown resampler 'best'"),
        ({"twist": "best"}, "unknown twist 'best'; choose one of defensive, argmax, persistent"),
        ({"twist_every": 0}, "twist_every must be >= 1"),
        ({"max_rows": 0}, "max_rows must be >= 1 or None"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        run(toy_markov_chain(), **options)


def test_rows_are_whole():
    with pytest.raises(TypeError, match=r"max_rows must be a whole number or None, got 2\.5"):
        run(toy_markov_chain(), max_rows=2.5)


@pytest.mark.parametrize("twist", [ArgmaxFill, PersistentFill, SampledFill, Defensive])
def test_late_is_yes_or_no(twist):
    with pytest.raises(TypeError, match=rf"{twist.__name__}: late is True or False, got 'no'"):
        twist(late="no")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda w: torch.full(w.shape, w.shape[-1]), "indices of no particle"),
        (lambda w: torch.full(w.shape, -1), "indices of no particle"),
        (lambda w: w, r"torch\.float64 \(6, 16\)"),
        (lambda w: torch.zeros(w.shape[0], 3, dtype=torch.int64), r"torch\.int64 \(6, 3\)"),
        (lambda w: [0], "list"),
    ],
    ids=["above", "below", "floats", "few", "list"],
)
def test_resamplers_return_particles(answer, text):
    class Mine(Multinomial):
        def __call__(self, uniforms, log_weights):
            return answer(log_weights)

    with pytest.raises(ValueError, match=f"the resampler Mine returned {text}; return the index"):
        run(toy_markov_chain(), resampler=Mine(), ess_threshold=1.01)


def test_twist_must_be_something():
    with pytest.raises(TypeError, match="a twist is a name, a function or None, got int"):
        run(toy_markov_chain(), twist=3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda tokens: torch.full(tokens.shape[:2], -torch.inf), "not finite at step 0"),
        (lambda tokens: torch.full(tokens.shape[:2], torch.nan), "not finite at step 0"),
        (lambda tokens: torch.zeros(tokens.shape[0]), r"returned shape \(6,\) at step 0"),
    ],
)
def test_bad_twists(value, text):
    with pytest.raises(ValueError, match=text):
        run(toy_markov_chain(), twist=lambda carry, k: value(carry["tokens"]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_potentials(bad):
    potential = Potential(lambda x0: torch.full(x0.shape[:-1], bad), name="mine")
    with pytest.raises(PotentialError, match=r"mine returned NaN or \+inf for"):
        run(toy_markov_chain(), potential)
    with pytest.raises(PotentialError, match="mine returned shape"):
        run(toy_markov_chain(), Potential(lambda x0: torch.zeros(3), name="mine"))


def test_a_proposal_whose_density_excludes_its_own_draw_is_refused():
    def lying(step, carry, k):
        step = step.expand(step.batch_shape)
        step.log_prob = lambda value: torch.full(value.shape[:-1], -torch.inf).double()
        return step

    with pytest.raises(ValueError, match="weight became NaN or"):
        run(toy_markov_chain(), twist=None, proposal=lying)


def test_fresh_samples_come_with_a_warning():
    with pytest.warns(UserWarning, match="'defensive' or 'persistent' is almost always better"):
        FeynmanKac(toy_markov_chain(), POTENTIAL, "sample")


def test_proposals_need_a_density():
    chain = toy_markov_chain()

    class Sampler(InterpolatingKernel):
        capability = "SAMPLE_ONLY"

    kernel = Sampler(chain.kernel.process, chain.kernel.denoiser, num_steps=4)
    chain = type(chain)(kernel, 5)
    with pytest.raises(CapabilityError, match="a proposal needs a kernel with a density"):
        FeynmanKac(chain, POTENTIAL, proposal=toy_markov_chain().kernel)


def test_functions_become_potentials_and_twists():
    fk = FeynmanKac(toy_markov_chain(), lambda x0: x0.sum(-1), lambda carry, k: None)
    assert isinstance(fk.potential, Potential)
    assert isinstance(fk.twist, CallableTwist)


def test_steps_after_resampling_are_judged_anew():
    """Where nothing is looked at, weights stay what they are, not what they were before."""
    model = FeynmanKac(toy_chain(num_steps=6), toy_potential(), twist="argmax", twist_every=3)
    always = run_smc(model, 16, 5, ess_threshold=2.0)
    assert bool(always.resampled[:, :-1].all())
    idle = always.ess[:, [0, 1, 3, 4]]
    torch.testing.assert_close(idle, torch.full_like(idle, 16.0))
