"""Factors of products of chains, against enumeration: no sampling, no false alarms."""

import math

import jax.numpy as jnp
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.kernels.path_power import (
    jump_rates,
    log_forward_table,
    log_path_factor,
    log_product,
)
from ppl_diffusion.testing import PROCESSES, random_joint, toy_process
from ppl_diffusion.testing.dense import all_states, forward_law, state_index

TARGETS = {
    "anneal": [2.0],
    "flatten": [0.5],
    "product": [1.0, 1.0],
    "geometric": [0.5, 0.5],
    "cfg": [2.0, -1.0],
}
LENGTHS = {"absorbing": 3, "uniform": 2, "skewed": 2}


def laws(exponents, length):
    return [random_joint(3, length, seed=s, sharpness=0.7) for s in range(len(exponents))]


def powers(tables, exponents):
    """Return ``prod_m p_m**b_m`` where all are positive, zero elsewhere."""
    total, possible = torch.ones_like(tables[0]), torch.ones_like(tables[0], dtype=torch.bool)
    for p, b in zip(tables, exponents, strict=True):
        total = total * torch.where(p > 0, p, 1.0) ** b
        possible = possible & (p > 0)
    return torch.where(possible, total, 0.0)


def noised(process, joints, exponents, alpha, length):
    return powers([forward_law(process, p.flatten(), alpha, length) for p in joints], exponents)


def jumps(process, joints, exponents, alpha, length):
    """Return the rate matrix between all states, and the weight rate of each."""
    states = all_states(process.num_states, length)
    t = float(process.schedule.time_from_log1m(torch.tensor(1 - alpha).log().numpy()))
    log_c = [TableDenoiser(p, process)(states, t) for p in joints]
    rates, growth = jump_rates(process, states, log_c, exponents, alpha)
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    for site in range(length):
        for token in range(process.vocab_size):
            after = states.clone()
            after[:, site] = token
            goal = state_index(after, process.num_states)
            matrix[torch.arange(len(states)), goal] += rates[:, site, token]
    return matrix, growth.sum(-1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_solves_the_weighted_master_equation(name, target, alpha):
    """T3.1: 64 masked or 9 redrawn states, time is ``log alpha``, unnormalised laws."""
    exponents, length, process = TARGETS[target], LENGTHS[name], toy_process(name)
    joints, h = laws(exponents, length), 1e-5
    law, before, after = (
        noised(process, joints, exponents, alpha * math.exp(shift), length) for shift in (0, -h, h)
    )
    matrix, growth = jumps(process, joints, exponents, alpha, length)
    flow = law @ matrix - law * matrix.sum(-1)
    change = (after - before) / (2 * h)
    torch.testing.assert_close(flow + law * growth, change, rtol=1e-7, atol=1e-9)
    # The failing twin: unweighted jumps follow the target only if nothing is composed.
    assert float((flow - change).abs().max()) > 1e-5


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PROCESSES)
def test_exact_joint_kernels_make_the_target_exact(name, target, steps):
    """T3.2: with exact joint kernels the law of ``x0`` is the product, whatever ``K`` is.

    A sequence of length 2 is one site of a larger alphabet, whose reverse kernels are joint.
    """
    exponents, process, length = TARGETS[target], toy_process(name), 2
    joints = laws(exponents, length)
    alphas = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    at = [[forward_law(process, p.flatten(), float(a), length) for a in alphas] for p in joints]
    order = sum(exponents)
    mass = powers([at[0][0]], [order])  # at alpha = 0 all experts are the same noise
    for k in range(steps):
        forward = joint_forward(process, float(alphas[k]), float(alphas[k + 1]), length)
        kernels = [bayes(forward, law[k + 1], law[k]) for law in at]
        factor = log_path_factor([x.log() for x in kernels], exponents, forward.T.log())
        mass = mass @ factor.exp()
    clean = (all_states(process.num_states, length) < 3).all(-1)
    expected = powers([p.flatten() for p in joints], exponents)
    torch.testing.assert_close(mass[clean], expected, rtol=1e-9, atol=0)
    assert float(mass[~clean].sum()) < 1e-12


def joint_forward(process, a, b, length):
    """Return ``q(x_t | x_s)`` as a matrix from ``s`` to ``t``."""
    states = all_states(process.num_states, length)
    everywhere = torch.arange(process.num_states)
    site = log_forward_table(process, everywhere, a, b).exp()  # (x_t, x_s)
    matrix = torch.ones(len(states), len(states), dtype=torch.float64)
    for position in range(length):
        matrix = matrix * site.T[states[:, position]][:, states[:, position]]
    return matrix


def bayes(forward, law_s, law_t):
    joint = (law_s[:, None] * forward).T
    return joint / torch.where(law_t > 0, law_t, 1.0)[:, None]


@pytest.mark.parametrize("name", PROCESSES)
def test_forward_tables_are_distributions_over_the_noisier_state(name):
    process = toy_process(name)
    table = log_forward_table(process, torch.arange(process.num_states), 0.3, 0.6).exp()
    torch.testing.assert_close(table.sum(0), torch.ones(process.num_states, dtype=torch.float64))


def test_products_intersect_supports():
    """An excluded token stays excluded under any exponent; T3.7: no NaN."""
    p = torch.tensor([0.5, 0.5, 0.0]).double().log()
    q = torch.tensor([0.0, 0.4, 0.6]).double().log()
    for exponents in ([2.0, -1.0], [1.0, 1.0], [-1.0, 0.5]):
        product = log_product([p, q], exponents)
        assert torch.isfinite(product).tolist() == [False, True, False]
        expected = exponents[0] * p[1] + exponents[1] * q[1]
        torch.testing.assert_close(product[1], expected)


def test_one_law_as_it_is_comes_back_untouched():
    p = torch.randn(4, 3).double().log_softmax(-1)
    assert log_product([p], [1.0]) is p


def test_jax_gives_the_same_numbers():
    process = toy_process("uniform")
    z = torch.tensor([[0, 2], [1, 1]])
    log_c = [torch.randn(2, 2, 3).log_softmax(-1) for _ in range(2)]
    on_jax = [jnp.asarray(c.numpy()) for c in log_c]
    ours = jump_rates(process, z, log_c, [1.5, 0.5], 0.4)
    theirs = jump_rates(process, jnp.asarray(z.numpy()), on_jax, [1.5, 0.5], 0.4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), torch.tensor(b.tolist()), rtol=1e-4, atol=1e-4)
    first = log_path_factor(log_c, [1.5, 0.5], log_forward_table(process, z, 0.2, 0.6))
    forward = log_forward_table(process, jnp.asarray(z.numpy()), 0.2, 0.6)
    second = log_path_factor(on_jax, [1.5, 0.5], forward)
    torch.testing.assert_close(first.float(), torch.tensor(second.tolist()), rtol=1e-4, atol=1e-4)
