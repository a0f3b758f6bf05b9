"""Couplings have the marginals they were given (F1, F2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.processes.couplings import (
    COUPLINGS,
    Independent,
    Markov,
    Maximum,
    Monotone,
    Sinkhorn,
    at_step,
)
from ppl_diffusion.testing.dense import site_rows

SIZE = 4
COST = (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).double().square()
EVERY = [Maximum(), Independent(), Monotone(), Sinkhorn(COST), Sinkhorn(COST, 0.01, 3)]


def marginals(seed=0, count=500):
    """Return random pairs, some with zeros and some equal."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand((2, count, SIZE), generator=generator, dtype=torch.float64)
    pair = pair * (torch.rand(pair.shape, generator=generator) > 0.3)
    pair[..., 0] += 1e-3
    pair[1, :50] = pair[0, :50]
    return pair / pair.sum(-1, keepdim=True)


@pytest.mark.parametrize("coupling", EVERY, ids=repr)
def test_rows_are_laws_and_the_marginals_are_kept(coupling):
    u, w = marginals()
    table = coupling.table(u, w)
    assert (table >= -1e-15).all()
    torch.testing.assert_close(table.sum(-1), torch.ones_like(w), rtol=0, atol=1e-12)
    found = (w[..., None] * table).sum(-2)
    torch.testing.assert_close(found, u, rtol=0, atol=1e-12)
    z = torch.multinomial(w, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    rows = table[torch.arange(len(z)), z]
    torch.testing.assert_close(coupling.row(u, w, z), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("coupling", EVERY, ids=repr)
def test_mixed_rows_and_entropies_are_those_of_the_table(coupling):
    u, w = marginals()
    weights = torch.rand(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table = coupling.table(u, w)
    mixed = (weights[..., None] * table).sum(-2)
    torch.testing.assert_close(coupling.mixed(u, w, weights), mixed, rtol=0, atol=1e-12)
    wanted = -torch.special.xlogy(table.clamp(min=0), table.clamp(min=0)).sum(-1)
    found = coupling.entropies(u, w)
    torch.testing.assert_close(found[w > 0], wanted[w > 0], rtol=0, atol=1e-12)


def test_entropies_of_the_maximum_coupling_have_the_gradient_of_the_table():
    logits = torch.randn((2, 50, SIZE), generator=torch.Generator().manual_seed(3)).double()
    found = []
    for plain in (False, True):
        leaf = logits.clone().requires_grad_()
        u, w = leaf.softmax(-1)
        table = Maximum().table(u, w)
        rows = -(table * torch.where(table > 0, table, 1.0).log()).sum(-1)
        value = (w * (rows if plain else Maximum().entropies(u, w))).sum()
        found.append(torch.autograd.grad(value, leaf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_the_maximum_coupling_stays_most():
    u, w = marginals()
    stays = {}
    for coupling in EVERY:
        table = coupling.table(u, w)
        stays[repr(coupling)] = (w * table.diagonal(dim1=-2, dim2=-1)).sum(-1)
    most = 1 - (u - w).abs().sum(-1) / 2
    torch.testing.assert_close(stays[repr(Maximum())], most, rtol=0, atol=1e-12)
    assert all((stay <= most + 1e-12).all() for stay in stays.values())
    same = Maximum().table(u[:50], u[:50])
    visited = u[:50] > 0
    torch.testing.assert_close(same[visited], torch.eye(SIZE).double().expand_as(same)[visited])


def test_the_row_that_is_misprinted_elsewhere():
    """Min in place of max in the published formula gives a row with the sum 0.2."""
    u, w = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    wanted = torch.tensor([0.8, 0.0, 0.2]).double()
    torch.testing.assert_close(Maximum().row(u, w, torch.tensor(2)), wanted)


def test_of_masks_it_is_the_bridge_of_absorbing_diffusion():
    process, late, soon = Absorbing(3), 0.4, 0.7
    clean = torch.eye(4).double()[1]
    mask = torch.eye(4).double()[3]
    u, w = (k * clean + (1 - k) * mask for k in (soon, late))
    states = torch.tensor([1, 3])
    bridge = site_rows(process, states, clean[:3].expand(2, -1), late, soon)
    torch.testing.assert_close(Maximum().table(u, w)[states], bridge, rtol=0, atol=1e-12)


def test_of_uniform_noise_it_is_another_bridge_with_the_same_marginals():
    clean, flat = torch.eye(3).double()[0], torch.full((3,), 1 / 3, dtype=torch.float64)
    u, w = (k * clean + (1 - k) * flat for k in (0.75, 0.5))
    lazy = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]).double()
    table = Maximum().table(u, w)
    torch.testing.assert_close(table, lazy, rtol=0, atol=1e-12)
    bridge = site_rows(Uniform(3), torch.arange(3), clean.expand(3, -1), 0.5, 0.75)
    known = torch.tensor([[0.9722, 0.0139, 0.0139], [0.5556, 0.3889, 0.0556]]).double()
    torch.testing.assert_close(bridge[:2], known, rtol=0, atol=5e-5)
    torch.testing.assert_close(w @ bridge, w @ table, rtol=0, atol=1e-12)
    stays = [float(w @ rows.diagonal()) for rows in (table, bridge)]
    assert stays == pytest.approx([0.8333, 0.7778], abs=5e-5)
    step = 2 / 3 * torch.eye(3).double() + 1 / 9
    torch.testing.assert_close(Markov(step).table(u, w), bridge, rtol=0, atol=1e-12)


def test_the_laziest_multinomial_ddim():
    """Stay with probability ``(1 - k_s) / (1 - k_t)``, and jump to the data otherwise."""
    clean, flat = torch.eye(3).double()[0], torch.full((3,), 1 / 3, dtype=torch.float64)
    late, soon = 0.2, 0.6
    u, w = (k * clean + (1 - k) * flat for k in (soon, late))
    stay = (1 - soon) / (1 - late)
    wanted = stay * torch.eye(3).double() + (1 - stay) * clean
    torch.testing.assert_close(Maximum().table(u, w), wanted, rtol=0, atol=1e-12)


def test_the_monotone_coupling_never_crosses():
    u, w = marginals(seed=3)
    joint = w[..., None] * Monotone().table(u, w)
    later, earlier = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    crossing = (later[..., None, None] < later) & (earlier[..., None, None] > earlier)
    both = joint[:, :, :, None, None] * joint[:, None, None]
    assert float(both[:, crossing].max()) < 1e-15


def test_sinkhorn_costs_less_than_what_knows_no_cost():
    u, w = marginals(seed=4)
    costs = {}
    for name, coupling in {"sinkhorn": Sinkhorn(COST, 0.02, 500), **_made()}.items():
        costs[name] = float((w[..., None] * coupling.table(u, w) * COST).sum((-1, -2)).mean())
    # For a convex cost in one dimension the monotone plan is the cheapest of all.
    assert costs["monotone"] <= costs["sinkhorn"] + 1e-9
    assert costs["sinkhorn"] < costs["maximum"] < costs["independent"]
    assert costs["sinkhorn"] < costs["monotone"] + 0.02


def _made():
    return {name: kind() for name, kind in COUPLINGS.items()}


def test_the_last_step_is_independent_unless_the_prior_is_a_point():
    flat, point = np.full(3, 1 / 3), np.array([0.0, 0.0, 1.0])
    assert at_step(Maximum(), 3, 3, flat) == Independent()
    assert at_step(Maximum(), 2, 3, flat) == Maximum()
    assert at_step(Maximum(), 3, 3, point) == Maximum()


@pytest.mark.parametrize("coupling", EVERY, ids=repr)
def test_jax_has_the_same_numbers(coupling):
    u, w = marginals(count=20)
    with jax.enable_x64():
        table = np.asarray(coupling.table(jnp.asarray(u.numpy()), jnp.asarray(w.numpy())))
    np.testing.assert_allclose(table, coupling.table(u, w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong", [(0.0, 5), (float("nan"), 5), (0.1, 0)])
def test_refuses_what_cannot_be_scaled(wrong):
    with pytest.raises(ValueError, match="epsilon must be positive and iterations at least 1"):
        Sinkhorn(COST, *wrong)
