"""Conditional SMC: who descends from whom, what is refused, and what a result says."""

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac
from ppl_diffusion.smc.conditional import (
    ConditionalFeynmanKac,
    ConditionalMultinomial,
    conditional_smc,
    two_sided_evidence,
)
from ppl_diffusion.testing import counted, toy_chain, toy_markov_chain, toy_potential, toy_process

POTENTIAL = toy_potential(length=5, scale=1.5)


def sweep(chain, potential=POTENTIAL, *, runs=6, n=8, seed=0, twist="argmax", **options):
    generator = torch.Generator().manual_seed(seed)
    path = chain.sample((runs,), generator=generator)
    fk = FeynmanKac(chain, potential, twist)
    options = {"ess_threshold": 2.0, **options}
    return path, conditional_smc(fk, path, num_particles=n, generator=generator, **options)


# ------------------------------------------------------------------------------------------------
# ancestors


def test_slot_zero_keeps_itself_and_the_rest_are_unsorted():
    uniforms = torch.rand(200, 6, dtype=torch.float64)
    ancestors = ConditionalMultinomial()(uniforms, torch.randn(200, 6))
    assert bool((ancestors[:, 0] == 0).all())
    ordered = (ancestors[:, 2:] >= ancestors[:, 1:-1]).all(-1)
    assert float(ordered.double().mean()) < 0.5


def test_other_slots_draw_from_the_weights_slot_zero_included():
    """Frequencies within five standard errors: 6e-7 per cell."""
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    uniforms = torch.rand(20_000, 3, dtype=torch.float64)
    ancestors = ConditionalMultinomial()(uniforms, weights.log().expand(20_000, 3))
    for slot in (1, 2):
        shares = torch.bincount(ancestors[:, slot], minlength=3) / 20_000
        error = (weights * (1 - weights) / 20_000).sqrt()
        assert bool(((shares - weights).abs() < 5 * error).all())


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_slot_zero_follows_its_path(name):
    path, run = sweep(toy_markov_chain(name))
    assert torch.equal(run.trace.path()[:, 0].to(torch.int64), path)
    assert bool((run.trace.ancestors[:, :, 0] == 0).all())
    assert bool(run.trace.resampled[:, :-1].all())


def test_the_next_path_is_that_of_the_drawn_slot():
    path, run = sweep(toy_markov_chain())
    rows = torch.arange(len(path))
    assert torch.equal(run.path, run.trace.path()[rows, run.slot].to(torch.int64))
    assert torch.equal(run.log_potential, POTENTIAL(run.path[:, -1]))
    assert torch.equal(run.moved, (run.path != path).flatten(1).any(-1))


def test_the_retained_particle_is_weighed_like_any_other():
    """Its weight is G: increments along its own path telescope, whatever the twist."""
    path, run = sweep(toy_markov_chain("uniform"), ess_threshold=0.0)
    log_w = run.trace.weights.log
    assert torch.allclose(log_w[:, 0], POTENTIAL(path[:, -1]))
    assert torch.allclose(log_w, POTENTIAL(run.trace.carry["tokens"]))


def test_a_proposal_is_paid_for_along_the_retained_path():
    chain = toy_chain("uniform", num_steps=3)
    other = toy_chain(chain.kernel.process, num_steps=3, seed=9)
    path = chain.sample((4,))
    fk = FeynmanKac(chain, toy_potential(), None, other.kernel)
    run = conditional_smc(fk, path, num_particles=3, ess_threshold=0.0)
    paid = chain.log_prob(path) - other.log_prob(path) + toy_potential()(path[:, -1])
    assert torch.allclose(run.trace.weights.log[:, 0], paid)


@pytest.mark.parametrize("twist", [None, "argmax", "persistent"])
def test_seeds_and_counters(twist):
    chain, counter = counted(toy_markov_chain())
    first, again = (sweep(chain, twist=twist)[1] for _ in range(2))
    assert torch.equal(first.path, again.path)
    assert torch.equal(first.log_evidence, again.log_evidence)
    assert 2 * first.engine.num_evaluations < counter.rows  # drawing the paths costs rows too
    assert first.engine.num_potential_calls > 0


def test_plates_belong_to_the_particle():
    chain = toy_chain(num_steps=3).expand([2])
    path, run = sweep(chain, toy_potential(), n=4)
    assert path.shape == run.path.shape == (6, 2, 4, 2)
    assert run.log_evidence.shape == (6,)


def test_a_population_is_a_posterior_that_says_what_it_is():
    _, run = sweep(toy_markov_chain())
    post = run.posterior()
    assert not post.exact
    assert "conditional on a retained path" in post.target
    assert post.path.shape == (6, 8, 5, 5)
    assert post.ess.shape == (6, 4)
    assert torch.equal(post.log_evidence, run.log_evidence)


def test_evidence_bounds_say_their_numbers():
    chain = toy_chain(num_steps=3)
    bounds = two_sided_evidence(
        FeynmanKac(chain, Potential(lambda x0: torch.zeros(x0.shape[:-1]), name="flat")),
        chain.sample((3,)),
        num_particles=2,
    )
    assert bounds.gap == 0
    assert repr(bounds) == "EvidenceBounds(0.000 <= log Z <= 0.000, +- 0.000)"


# ------------------------------------------------------------------------------------------------
# refusals


def test_one_particle_is_refused():
    with pytest.raises(ValueError, match="at least 2 particles"):
        sweep(toy_markov_chain(), n=1)


def test_paths_are_needed_and_must_fit():
    fk = FeynmanKac(toy_markov_chain(), POTENTIAL)
    with pytest.raises(ValueError, match="needs the retained paths"):
        conditional_smc(fk, num_particles=2)
    for wrong in (torch.zeros(2, 5, 4), torch.zeros(0, 5, 5), torch.zeros(5, 5)):
        with pytest.raises(ValueError, match=r"must have shape \(R, 5, 5\)"):
            conditional_smc(fk, wrong.to(torch.int64), num_particles=2)


def test_impossible_paths_are_named():
    chain = toy_chain(num_steps=3)
    good = chain.sample((3,))
    start, jump = good.clone(), good.clone()
    start[1, 0] = 0
    jump[2, 1:] = torch.tensor([[0, 1], [1, 1], [0, 1]])
    for path, complaint in [
        (start, "path of run 1 starts from a state"),
        (jump, "path of run 2 makes a move of probability zero at step 1"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            conditional_smc(FeynmanKac(chain, toy_potential()), path, num_particles=2)
    never = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf), name="never")
    with pytest.raises(ValueError, match="run 0 ends in a sequence whose potential is -inf"):
        conditional_smc(FeynmanKac(chain, never), good, num_particles=2)


def test_a_chain_without_density_is_refused():
    process = toy_process("absorbing")

    class Timed:
        vocab_size, kind, time_free = 3, "cavity", False

        def __call__(self, tokens, t):
            return torch.zeros(*tokens.shape, 3, dtype=torch.float64).log_softmax(-1)

    kernel = OrderedKernel(process, Timed(), length=2, clock="sampled")
    chain = ReverseChain(kernel, 2)
    with pytest.raises(CapabilityError, match="use a kernel with a density"):
        ConditionalFeynmanKac(FeynmanKac(chain, toy_potential()), chain.sample((2,)))
