"""Twisted sampling: what it costs, what it accepts, what it refuses, what it says about itself."""

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.handlers import GradientProposal, LogitsProposal
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Constraint, Potential, factor
from ppl_diffusion.smc import ParticlePosterior, PersistentFill
from ppl_diffusion.testing.oracles import z_score
from ppl_diffusion.testing.toys import (
    CountingDenoiser,
    counted,
    random_joint,
    toy_chain,
    toy_potential,
)

SIZE, LENGTH = 3, 4
GOAL = toy_potential(SIZE, LENGTH, scale=1.5)


def ordered_chain(**options):
    process = Absorbing(SIZE)
    denoiser = TableDenoiser(random_joint(SIZE, LENGTH), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=LENGTH, **options), LENGTH)


def sample(target=None, potential=GOAL, *, seed=1, **options):
    options = {"num_particles": 6, "num_runs": 3, "twist": PersistentFill(2), **options}
    return SMC(target or ordered_chain(), potential, method="twisted", **options).run(seed=seed)


OPTIONS = [
    {},
    {"surprise": True},
    {"twist": "argmax"},
    {"twist": "exhaustive", "surprise": True},
    {"proposal": "reweighted"},
    {"top": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_cache_changes_the_cost_and_nothing_else(options):
    cached, plain = sample(**options), sample(cache=False, **options)
    assert torch.equal(cached.x0, plain.x0)
    assert torch.equal(cached.log_weights, plain.log_weights)
    assert torch.equal(cached.log_evidence, plain.log_evidence)
    assert cached.num_potential_calls < plain.num_potential_calls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_of_the_network_change_nothing(options):
    for few in (1, 5):
        assert torch.equal(sample(**options).x0, sample(max_rows=few, **options).x0)


FILLS, STEPS = 2, LENGTH - 1  # completions, and steps before the last


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, STEPS * SIZE * FILLS + SIZE + 1),  # children, the last tokens, the closing
        ({"surprise": True}, STEPS * (SIZE + 1) * FILLS + SIZE + 1),  # and the child's own
        ({"top": 2}, STEPS * (2 + 1) * FILLS + (2 + FILLS) + 1),  # the others share one score
        ({"proposal": "reweighted"}, STEPS * FILLS + LENGTH * FILLS + 1),  # twice the same ones
    ],
    ids=str,
)
def test_counters_equal_the_formula(options, calls):
    """One particle, without a cache."""
    found = sample(num_particles=1, num_runs=1, cache=False, **options)
    assert found.num_potential_calls == calls
    assert found.num_evaluations == LENGTH


def test_all_children_are_one_batch():
    batches = []

    def potential(x0):
        batches.append(len(x0))
        return GOAL(x0)

    sample(potential=potential, cache=False)
    particles = 6 * 3
    assert batches == [particles * SIZE * 2] * (LENGTH - 1) + [particles * SIZE, particles]


def test_one_network_call_per_step():
    chain, counter = counted(ordered_chain())
    for surprise in (False, True):
        counter.calls = 0
        sample(chain, surprise=surprise)
        assert counter.calls == LENGTH


def test_same_seed_same_particles_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    first, second = sample(seed=3), sample(seed=3)
    assert torch.equal(first.x0, second.x0)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.x0, sample(seed=4).x0)


def test_the_result_says_what_it_is(tmp_path):
    posterior = sample(top=2)
    assert posterior.exact
    assert posterior.target.startswith("p(path) * G(x0) of the 4-step reverse chain")
    assert posterior.settings["method"] == "twisted"
    assert posterior.settings["twist"] == "persistent"
    assert posterior.settings["num_fills"] == 2
    assert posterior.settings["proposal"] == "clamped"
    assert posterior.ess.shape == (3, LENGTH)
    assert posterior.path.shape == (3, 6, LENGTH + 1, LENGTH)
    assert torch.equal(posterior.path[..., -1, :], posterior.x0)
    again = ParticlePosterior.load(posterior.save(tmp_path / "run"))
    assert torch.equal(again.x0, posterior.x0)
    assert sample(store_path=False).path is None


def test_progress_is_told():
    steps = []
    sample(progress=lambda done, total: steps.append((done, total)))
    assert steps == [(k + 1, LENGTH) for k in range(LENGTH)]


def design(chain):
    path = pyro.sample("path", chain)
    x = pyro.deterministic("x", chain.x0(path), event_dim=1)
    factor("goal", GOAL, x)


def test_a_program_is_sampled_as_its_chain_would_be():
    chain = ordered_chain()
    options = {"num_particles": 8, "num_runs": 400, "twist": PersistentFill(2)}
    posterior = SMC(design, method="twisted", **options).run(chain, seed=2)
    bare = SMC(chain, GOAL, method="twisted", **options).run(seed=2)
    assert set(posterior.samples) == {"path", "x"}
    assert "the program design" in posterior.target
    both = torch.stack([posterior.log_evidence, bare.log_evidence]).exp()
    assert abs(z_score(both[0] - both[1], 0.0)) < 4  # false alarm 6e-5
    mean = posterior.expectation(lambda s: (s["x"] == 0).sum(-1))
    assert mean.shape == (400,)


def test_defaults_follow_the_kernel():
    def chosen(settings):
        return settings["proposal"], settings["twist"], settings["num_fills"]

    timed = sample(toy_chain(length=LENGTH), twist="auto").settings
    assert chosen(timed) == ("reweighted", "persistent", 16)
    assert chosen(sample(twist="auto").settings) == ("clamped", "defensive", 1)
    gradient = GradientProposal(lambda soft: soft[..., 0].sum(-1))
    found = sample(proposal=gradient)
    assert found.settings["proposal"] == "GradientProposal"
    assert 0 < gradient.num_calls < found.num_potential_calls
    assert sample(proposal=gradient).num_potential_calls == found.num_potential_calls


def test_fresh_completions_are_warned_about():
    with pytest.warns(UserWarning, match="fresh completions"):
        SMC(ordered_chain(), GOAL, method="twisted", twist="sample")


def test_impossible_options_say_why():
    chain = ordered_chain()
    with pytest.raises(ValueError, match="unknown proposal 'best'"):
        SMC(chain, GOAL, method="twisted", proposal="best")
    with pytest.raises(TypeError, match=r"a proposal is a name or a function .*, got int"):
        SMC(chain, GOAL, method="twisted", proposal=3)
    with pytest.raises(ValueError, match="unknown twist 'best'"):
        SMC(chain, GOAL, method="twisted", twist="best")
    with pytest.raises(ValueError, match="twist=None looks at nothing"):
        SMC(chain, GOAL, method="twisted", twist=None)
    with pytest.raises(ValueError, match="top must be >= 1 or None, got 0"):
        SMC(chain, GOAL, method="twisted", top=0)
    for kappa in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="kappa must be positive and finite"):
            SMC(chain, GOAL, method="twisted", kappa=kappa)
    with pytest.raises(ValueError, match=r"reweights completions.*'exhaustive'"):
        sample(twist="exhaustive", proposal="reweighted")
    with pytest.raises(CapabilityError, match="InterpolatingKernel does not choose"):
        sample(toy_chain(length=LENGTH), proposal="clamped")
    with pytest.raises(TypeError, match="a bare chain needs a potential"):
        SMC(chain, method="twisted").run()


def test_kernels_without_a_density_are_refused():
    timed = CountingDenoiser(ordered_chain().kernel.denoiser)
    timed.time_free = False
    kernel = OrderedKernel(Absorbing(SIZE), timed, length=LENGTH, clock="sampled")
    with pytest.raises(CapabilityError, match="OrderedKernel is SAMPLE_ONLY"):
        sample(ReverseChain(kernel, LENGTH))


def test_long_sequences_are_not_listed():
    chain = toy_chain(vocab_size=3, length=2)
    long = ReverseChain(OrderedKernel(chain.kernel.process, chain.kernel.denoiser, length=10), 10)
    with pytest.raises(ValueError, match=r"lists all 3\*\*10 sequences"):
        sample(long, twist="exhaustive")


def test_functions_of_the_state_see_particles_not_plates():
    with pytest.raises(CapabilityError, match=r"not the plates \(2,\)"):
        sample(ordered_chain().expand((2,)), twist=lambda carry, k: carry["tokens"].sum(-1))


def test_proposals_that_exclude_tokens_are_refused():
    def excluding(carry, log_probs, k):
        return torch.zeros_like(log_probs).index_fill(-1, torch.tensor([0]), -torch.inf)

    with pytest.raises(ValueError, match="logits must be finite"):
        sample(proposal=LogitsProposal(excluding))

    class Deaf(Constraint):
        def lookahead(self, x0):
            return self(x0)

    with pytest.raises(PotentialError, match="look-ahead of deaf is not finite"):
        sample(potential=Deaf(lambda x0: (x0[..., 0] != 0).double(), name="deaf"))


def test_soft_potentials_must_be_differentiable():
    for broken in (lambda soft: soft.detach().sum((-2, -1)), lambda soft: soft.sum(-1)):
        with pytest.raises(ValueError, match="the soft potential must be a differentiable"):
            sample(proposal=GradientProposal(broken))


def test_bad_potentials_are_named():
    bad = Potential(lambda x0: torch.full(x0.shape[:-1], torch.nan), name="bad")
    for cache in (True, False):
        with pytest.raises(PotentialError, match="bad returned NaN"):
            sample(potential=bad, cache=cache)
