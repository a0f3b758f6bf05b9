"""clamp conditions a chain on tokens of its clean sequence, exactly."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal, clamp, log_weight, steer
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import PathLaw
from ppl_diffusion.testing.oracles import ExactChain, chi_square_p_value, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

TOKENS = torch.tensor([0, 2, 0])
MASK = torch.tensor([True, False, True])
PROCESSES = ["absorbing", "uniform"]


def held(x0):
    """Log of the indicator that the clamped positions hold their tokens."""
    return torch.where(((x0 == TOKENS) | ~MASK).all(-1), 0.0, -torch.inf)


def program(chain):
    path = pyro.sample("path", chain)
    pyro.deterministic("x", chain.x0(path), event_dim=1)


@pytest.mark.parametrize("process", PROCESSES)
def test_evidence_and_law_are_those_of_the_conditioned_chain(process):
    chain = toy_chain(process, length=3, num_steps=3)
    exact = ExactChain.of(chain)
    with pyro.plate("independent", 4000):
        trace = poutine.trace(clamp(program, tokens=TOKENS, mask=MASK)).get_trace(chain)
    weights = trace.nodes["path"]["fn"].draw.log_weight.exp()
    x0 = trace.nodes["x"]["value"]
    assert bool((held(x0) == 0).all())
    assert abs(z_score(weights, exact.evidence(held))) < 4  # false alarm 6e-5
    for token in range(3):  # 4 s.e. of each unnormalised marginal
        joint = Potential(lambda x, v=token: held(x) + torch.log((x[..., 1] == v).double()))
        assert abs(z_score(weights * (x0[:, 1] == token), exact.evidence(joint))) < 4


def test_forced_reveals_are_weighted_by_their_probability():
    # Power: without the weights the uniform chain's clamp gets the free position wrong.
    chain = toy_chain("uniform", length=3, num_steps=3, sharpness=2.0)
    with pyro.plate("independent", 4000):
        trace = poutine.trace(clamp(program, tokens=TOKENS, mask=MASK)).get_trace(chain)
    exact = ExactChain.of(chain)
    free = trace.nodes["x"]["value"][:, 1]
    posterior = exact.posterior(held).reshape(3, 3, 3)[0, :, 0]
    assert chi_square_p_value(torch.bincount(free, minlength=3), posterior) < 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_plain_importance_and_smc_agree(process):
    chain = toy_chain(process, length=3, num_steps=3)
    evidence = ExactChain.of(chain).evidence(held)
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    marginal = Importance(wrapped, num_samples=300).run(chain)
    weights = torch.stack([torch.as_tensor(w) for w in marginal.log_weights]).exp()
    assert abs(z_score(weights, evidence)) < 4
    for run in (SMC(wrapped, num_particles=8, num_runs=400), None):
        if run is None:
            with clamp(tokens=TOKENS, mask=MASK):
                posterior = SMC(program, num_particles=8, num_runs=400).run(chain, seed=2)
        else:
            posterior = run.run(chain, seed=1)
        assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4
        assert bool((held(posterior.x0) == 0).all())
        assert "clamped" in posterior.target


@pytest.mark.parametrize("group_size", [1, 2])
def test_positions_revealed_in_groups_are_clamped_too(group_size):
    """Plain Pyro and SMC against every path, with a denoiser the order matters to; 4 s.e., 6e-5."""
    toy = toy_chain(length=3, num_steps=3).kernel
    kernel = OrderedKernel(toy.process, toy.denoiser, length=3, group_size=group_size)
    chain = ReverseChain(kernel, 3)
    evidence = math.exp(PathLaw.of(chain, held).log_z)
    with pyro.plate("independent", 4000):
        trace = poutine.trace(clamp(program, tokens=TOKENS, mask=MASK)).get_trace(chain)
    weights = trace.nodes["path"]["fn"].draw.log_weight.exp()
    assert bool((held(trace.nodes["x"]["value"]) == 0).all())
    assert abs(z_score(weights, evidence)) < 4
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    for method, size in (("smc", 8), ("steering", 256)):
        chosen = SMC(wrapped, method=method, num_particles=size, num_runs=400)
        posterior = chosen.run(chain, seed=1)
        assert abs(z_score(posterior.log_evidence.exp(), evidence)) < 4
        assert bool((held(posterior.x0[posterior.weights > 0]) == 0).all())


@pytest.mark.parametrize("order", ["steer outside", "clamp outside"])
def test_it_composes_with_steer_in_any_order(order):
    chain, goal = toy_chain(length=3, num_steps=3), toy_potential(3, 3)
    inner = clamp(program, tokens=TOKENS, mask=MASK)
    wrapped = steer(inner, potential=goal, num_particles=4)
    if order == "clamp outside":
        wrapped = clamp(steer(program, potential=goal, num_particles=4), tokens=TOKENS, mask=MASK)
    with pyro.plate("independent", 2000):
        trace = poutine.trace(wrapped).get_trace(chain)
    weights = trace.nodes["path"]["fn"].draw.log_weight.exp()
    assert abs(z_score(weights, ExactChain.of(chain).evidence(held))) < 4


def test_as_a_proposal_of_a_bare_feynman_kac_model():
    chain, goal = toy_chain("uniform", length=3, num_steps=3), toy_potential(3, 3)
    fk = FeynmanKac(chain, goal, proposal=ClampProposal(TOKENS, MASK, 3))
    posterior = run_smc(fk, num_particles=8, num_runs=1000)
    both = Potential(lambda x0: goal(x0) + held(x0))
    assert abs(z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(both))) < 4


def test_two_clamps_add_up_and_must_agree():
    chain = toy_chain(length=3)
    first = torch.tensor([True, False, False])
    last = torch.tensor([False, False, True])
    both = clamp(clamp(program, tokens=TOKENS, mask=first), tokens=TOKENS, mask=last)
    x0 = poutine.trace(both).get_trace(chain).nodes["x"]["value"]
    assert held(x0) == 0
    clash = clamp(clamp(program, tokens=TOKENS, mask=first), tokens=TOKENS + 1, mask=first)
    with pytest.raises(ValueError, match="different tokens at the same position"):
        poutine.trace(clash).get_trace(chain)


def test_a_given_path_that_breaks_the_clamp_has_density_zero():
    chain = toy_chain(length=3)
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    seen = set()
    for _ in range(50):
        given = poutine.trace(program).get_trace(chain)
        scored = poutine.trace(poutine.replay(wrapped, trace=given)).get_trace(chain)
        ok = bool(held(given.nodes["x"]["value"]) == 0)
        assert scored.log_prob_sum() == (given.log_prob_sum() if ok else -torch.inf)
        seen.add(ok)
    assert seen == {True, False}


def test_log_weight_of_a_clamped_trace():
    chain = toy_chain(length=3, num_steps=3)
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    weights = torch.stack([log_weight(poutine.trace(wrapped).get_trace(chain)) for _ in range(300)])
    assert abs(z_score(weights.exp(), ExactChain.of(chain).evidence(held))) < 4


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([0, 1], [True, True], "3 positions, the clamp 2"),
        ([0, 1, 5], [True, True, True], r"clean ids, 0\.\.2"),
        ([0, 1, -1], [True, True, True], r"clean ids, 0\.\.2"),
        ([0, 1, 2], [1, 0, 1], "mask of dtype bool"),
        ([[0, 1, 2]], [[True, True, True]], r"shape \(L,\)"),
    ],
)
def test_bad_clamps_are_refused_in_one_sentence(tokens, mask, message):
    wrapped = clamp(program, tokens=torch.tensor(tokens), mask=torch.tensor(mask))
    with pytest.raises(ValueError, match=message):
        poutine.trace(wrapped).get_trace(toy_chain(length=3))


def test_a_clamp_that_meets_no_site_says_so():
    chain = toy_chain(length=3)
    wrapped = clamp(program, tokens=TOKENS, mask=MASK, sites=["other"])
    with pytest.raises(ValueError, match=r"no reverse-chain site named \['other'\]"):
        wrapped(chain)


def test_a_clamp_that_contradicts_the_prompt_is_refused():
    chain = toy_chain(length=3, prompt=torch.tensor([1, -1, -1]))
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    for run in (lambda: poutine.trace(wrapped).get_trace(chain), lambda: SMC(wrapped).run(chain)):
        with pytest.raises(ValueError, match="prompt holds another token at position 0"):
            run()


def test_a_clamp_beside_a_prompt_is_exact():
    chain = toy_chain(length=3, num_steps=3, prompt=torch.tensor([-1, 1, -1]))
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    posterior = SMC(wrapped, num_particles=8, num_runs=400).run(chain, seed=3)
    assert abs(z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(held))) < 4


def test_detours_that_the_clamp_cannot_propose_are_refused():
    chain = toy_chain(length=3, kappa=0.5)
    with pytest.raises(CapabilityError, match="kappa < 1 over a prior with zeros"):
        poutine.trace(clamp(program, tokens=TOKENS, mask=MASK)).get_trace(chain)


def test_kappa_below_one_is_exact_where_the_prior_has_no_zeros():
    chain = toy_chain("uniform", length=3, num_steps=3, kappa=0.5)
    wrapped = clamp(program, tokens=TOKENS, mask=MASK)
    posterior = SMC(wrapped, num_particles=8, num_runs=600).run(chain, seed=3)
    assert abs(z_score(posterior.log_evidence.exp(), ExactChain.of(chain).evidence(held))) < 4
