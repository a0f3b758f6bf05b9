"""The path law of tiny chains against enumeration."""

import math

import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Cosine, InterpolatingKernel
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    all_states,
    chi_square_p_value,
    forward_law,
    random_joint,
    state_index,
    toy_chain,
    toy_markov_chain,
    toy_process,
)

TOLERANCE = 1e-10
each_process = pytest.mark.parametrize("name", PROCESSES)


@each_process
@pytest.mark.parametrize(("length", "num_steps"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("kappa", [1.0, 0.6])
def test_paths_sum_to_one(name, length, num_steps, kappa):
    """Every path of the chain, one by one: total, each probability, and the law of ``x0``."""
    if name != "absorbing" and (length, num_steps) == (2, 3):
        length, num_steps = 2, 4
    chain = toy_chain(name, length=length, num_steps=num_steps, kappa=kappa)
    exact = ExactChain.of(chain)
    paths = chain.enumerate_support()
    prob = chain.log_prob(paths).exp()
    assert float(prob.sum()) == pytest.approx(1, abs=TOLERANCE)
    torch.testing.assert_close(prob, exact.path_prob(paths), rtol=0, atol=TOLERANCE)
    law = torch.zeros(len(exact.states), dtype=torch.float64)
    law.index_add_(0, exact.index(chain.x0(paths)), prob)
    torch.testing.assert_close(law, exact.laws()[-1], rtol=0, atol=TOLERANCE)
    assert float(law[~exact.clean].sum()) == 0


@each_process
@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("num_steps", range(1, 9))
def test_marginals_match_enumeration(name, length, num_steps):
    """``marginal().log_prob`` and the chain's own steps against dense matrices."""
    chain = toy_chain(name, length=length, num_steps=num_steps)
    exact = ExactChain.of(chain)
    torch.testing.assert_close(
        exact.matrices.sum(-1), torch.ones_like(exact.matrices[..., 0]), rtol=0, atol=TOLERANCE
    )
    clean = all_states(3, length)
    log_p = chain.marginal().log_prob(clean)
    torch.testing.assert_close(log_p.exp(), exact.x0_law(), rtol=0, atol=TOLERANCE)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=TOLERANCE)


@each_process
def test_steps_are_the_dense_matrices(name):
    chain = toy_chain(name, length=3, num_steps=4, kappa=[1.0, 0.7, 0.0, 0.9])
    exact = ExactChain.of(chain)
    for k, matrix in enumerate(exact.matrices):
        reached = exact.laws()[k] > 0
        step = chain.kernel.step({"tokens": exact.states[reached]}, k)
        rows = step.log_prob(exact.states[:, None]).exp().T
        torch.testing.assert_close(rows, matrix[reached], rtol=0, atol=TOLERANCE)


@each_process
@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_one_site_is_exact_at_every_time(name, kappa):
    """``L = 1`` with the cavity: the state at ``t`` has the forward law of the data, any step."""
    chain = toy_chain(name, length=1, num_steps=5, kappa=kappa)
    law, process = random_joint(3, 1), chain.kernel.process
    for alpha, here in zip(chain.kernel.alphas, ExactChain.of(chain).laws(), strict=True):
        expected = forward_law(process, law, float(alpha), 1)
        torch.testing.assert_close(here, expected, rtol=0, atol=TOLERANCE)


def test_one_site_negative_kappa():
    chain = toy_chain("absorbing", length=1, num_steps=5, kappa=[1.0, 1.0, -0.3, -0.3, 1.0])
    assert torch.allclose(ExactChain.of(chain).x0_law(), random_joint(3, 1), rtol=0, atol=TOLERANCE)


@each_process
def test_independent_sites_are_exact_for_any_length(name):
    """A product law: the factorised kernel loses nothing, even in one step."""
    site = random_joint(3, 1, seed=7)
    joint = torch.einsum("i,j,k->ijk", site, site.flip(0), site.roll(1))
    process = toy_process(name)
    chain = toy_chain(process, length=3, num_steps=2)
    chain.kernel.denoiser.joint = joint
    law = ExactChain.of(chain).x0_law()
    torch.testing.assert_close(law, joint.flatten(), rtol=0, atol=TOLERANCE)


@each_process
def test_posterior_denoiser_defines_the_same_chain(name):
    """``kind="posterior"`` is converted: the same law as with the cavity."""
    cavity = toy_chain(name, length=3, num_steps=3)
    posterior = toy_chain(name, length=3, num_steps=3, kind="posterior")
    paths = cavity.sample((500,))
    torch.testing.assert_close(
        posterior.log_prob(paths), cavity.log_prob(paths), rtol=0, atol=TOLERANCE
    )


@each_process
def test_markov_denoiser_defines_the_chain_of_its_table(name):
    chain = toy_markov_chain(name, length=3, num_steps=3)
    process, markov = chain.kernel.process, chain.kernel.denoiser
    sequences = all_states(3, 3)
    table = toy_chain(process, length=3).kernel.denoiser
    table.joint = markov.log_prob(sequences).exp().reshape(3, 3, 3)
    twin = ReverseChain(InterpolatingKernel(process, table, num_steps=3), 3)
    torch.testing.assert_close(
        ExactChain.of(chain).x0_law(), ExactChain.of(twin).x0_law(), rtol=0, atol=TOLERANCE
    )


@each_process
@pytest.mark.parametrize("schedule", [None, Cosine()], ids=["linear", "cosine"])
def test_samples_follow_the_path_law(name, schedule):
    """Chi-square over whole paths, level 1e-4 per case; cells below 5 expected are pooled."""
    chain = toy_chain(toy_process(name, schedule=schedule), length=2, num_steps=2, kappa=0.8)
    paths = chain.enumerate_support()
    law = chain.log_prob(paths).exp()
    drawn = chain.sample((40_000,))
    size = chain.kernel.process.num_states
    index = state_index(drawn.flatten(1), size)
    counts = torch.bincount(index, minlength=len(law))
    rare = (law * 40_000 < 5) & (law > 0)
    pooled = torch.cat([counts[~rare], counts[rare].sum()[None]])
    assert chi_square_p_value(pooled, torch.cat([law[~rare], law[rare].sum()[None]])) > 1e-4


@each_process
def test_log_prob_is_finite_exactly_on_reachable_paths(name):
    chain = toy_chain(name, length=2, num_steps=2)
    paths = chain.enumerate_support()
    log_p = chain.log_prob(paths)
    assert not bool(torch.isnan(log_p).any())
    reachable = ExactChain.of(chain).path_prob(paths) > 0
    assert torch.equal(log_p > -torch.inf, reachable)
    if name == "absorbing":
        assert 0 < int(reachable.sum()) < len(paths)


def test_visible_tokens_never_change():
    path = toy_markov_chain(length=6, num_steps=8).sample((500,))
    before, after = path[:, :-1], path[:, 1:]
    assert bool(((before == 3) | (before == after)).all())


@each_process
def test_prompt_defines_its_own_chain(name):
    prompt = torch.tensor([2, -1, -1])
    chain = toy_chain(name, length=3, num_steps=2, prompt=prompt)
    exact = ExactChain.of(chain)
    paths = chain.sample((3000,))
    assert bool((paths[..., 0] == 2).all())
    torch.testing.assert_close(
        chain.log_prob(paths).exp(), exact.path_prob(paths), rtol=0, atol=TOLERANCE
    )
    clean = all_states(3, 3)
    law = chain.marginal().log_prob(clean).exp()
    torch.testing.assert_close(law, exact.x0_law(), rtol=0, atol=TOLERANCE)
    assert float(law[clean[:, 0] != 2].sum()) == 0
    counts = torch.bincount(state_index(chain.x0(paths), 3), minlength=27)
    assert chi_square_p_value(counts, law) > 1e-4


def test_label_permutation_leaves_the_law():
    """Renaming tokens renames the law and nothing else."""
    order = torch.tensor([2, 0, 1])
    for name in ("absorbing", "uniform"):
        chain = toy_chain(name, length=2, num_steps=3)
        renamed = toy_chain(name, length=2, num_steps=3)
        joint = chain.kernel.denoiser.joint
        renamed.kernel.denoiser.joint = joint[order][:, order]
        law = ExactChain.of(chain).x0_law().reshape(3, 3)
        other = ExactChain.of(renamed).x0_law().reshape(3, 3)
        torch.testing.assert_close(other, law[order][:, order], rtol=0, atol=TOLERANCE)


def test_masked_paths_know_the_signal_level_and_not_the_schedule():
    """Two schedules on grids with the same signal levels: one law of paths."""
    linear = toy_chain("absorbing", num_steps=4)
    schedule = Cosine()
    levels = [-float("inf") if a == 1 else math.log1p(-a) for a in linear.kernel.alphas]
    times = [float(schedule.time_from_log1m(y)) for y in levels]
    process = toy_process("absorbing", schedule=schedule)
    twin = toy_chain(process).kernel.denoiser
    cosine = ReverseChain(InterpolatingKernel(process, twin, times=times), 2)
    paths = linear.sample((2000,))
    torch.testing.assert_close(cosine.log_prob(paths.clone()), linear.log_prob(paths))
