"""Collapse of runs, and orders of reveals, on populations whose figures are known."""

import math
from dataclasses import replace

import pytest
import torch

from ppl_diffusion.diagnostics import collapse, nearest_distance, order_sd
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.testing import toy_chain, toy_potential


class Perturbed:
    """Independent of nothing: every conditioning set has logits of its own."""

    kind, time_free, vocab_size = "cavity", True, 3

    def __call__(self, tokens, t, /):
        key = (tokens * torch.tensor([16, 4, 1])).sum(-1)
        table = torch.randn(64, 3, 3, generator=torch.Generator().manual_seed(0)).double()
        return table[key].log_softmax(-1)


def population(x0, weights, eve):
    """A result with these particles."""
    size = len(x0[0])
    post = SMC(toy_chain(length=len(x0[0][0])), lambda x: 0.0 * x[..., 0], num_particles=size)
    post = post.run(seed=0)
    known = {
        "x0": torch.tensor(x0),
        "log_weights": torch.tensor(weights).double().log(),
        "eve": torch.tensor(eve),
        "died_at": torch.full((len(x0),), -1),
    }
    return replace(post, **known)


def test_figures_of_a_known_population():
    x0 = [[[0, 0], [0, 0], [0, 1], [1, 1]]] * 2
    post = population(x0, [[0.25] * 4, [1.0, 0, 0, 0]], [[0, 0, 1, 1], [3, 3, 3, 3]])
    found = collapse(post)
    assert found["unique"] == [0.75, 0.25]
    assert found["nearest"] == [(0 + 0 + 0.5 + 0.5) / 4, 0.0]
    assert found["ancestors"] == pytest.approx([2.0, 1.0])
    assert found["vendi"][1] == pytest.approx(1.0)
    assert 1 < found["vendi"][0] < 4


def test_all_different_sequences_are_as_many_as_they_are():
    x0 = [[[v, v] for v in range(3)]]
    found = collapse(population(x0, [[1 / 3] * 3], [[0, 1, 2]]))
    assert found["vendi"] == pytest.approx([3.0])
    assert found["ancestors"] == pytest.approx([3.0])
    assert (found["unique"], found["nearest"]) == ([1.0], [1.0])


def test_sets_are_systematic():
    """Equal weights give every particle once, where draws with replacement would lose a third."""
    chain = toy_chain(length=5, vocab_size=4, num_steps=2)
    post = SMC(chain, lambda x: 0.0 * x[..., 0], num_particles=32, num_runs=2, twist=None)
    post = post.run(seed=0)
    distinct = [len(x.unique(dim=0)) / 32 for x in post.x0]
    assert collapse(post)["unique"] == distinct
    assert collapse(post, num=64)["nearest"] == [0.0, 0.0]


def test_dead_runs_have_no_figures():
    post = SMC(toy_chain(), lambda x: torch.where(x[..., 0] == 0, 0.0, -torch.inf))
    post = post.run(seed=0)
    dead = replace(post, died_at=torch.tensor([2]))
    assert collapse(dead) == {name: [None] for name in ("unique", "nearest", "vendi", "ancestors")}
    with pytest.raises(ValueError, match="num must be >= 2"):
        collapse(post, num=1)


def test_nearest_distances_do_not_depend_on_how_they_are_divided(monkeypatch):
    x0 = torch.randint(4, (20, 6), generator=torch.Generator().manual_seed(0))
    whole = nearest_distance(x0)
    monkeypatch.setattr("ppl_diffusion.diagnostics.diversity.MAX_PAIRS", 300)
    assert torch.equal(nearest_distance(x0), whole)
    assert float(whole.min()) > 0


def test_an_exact_denoiser_knows_no_order_and_a_wrong_one_does():
    chain = toy_chain(length=3)
    x0 = chain.x0(chain.sample((6,)))
    assert max(order_sd(chain, x0, window=(2,)).values()) < 1e-12
    wrong = toy_chain(length=3)
    wrong = type(wrong)(wrong.kernel.with_denoiser(Perturbed()), 3)
    found = order_sd(wrong, x0, num_orders=400, window=(1, 2), seed=0)
    assert found[1] == pytest.approx(0.0, abs=1e-12)
    assert 0 < found[2] < math.inf
    assert found[3] == pytest.approx(_by_enumeration(x0), rel=0.1)


def _by_enumeration(x0):
    """The same from all six orders, each counted alike."""
    from itertools import permutations

    values, denoiser = [], Perturbed()
    for order in permutations(range(3)):
        state, total = torch.full_like(x0, 3), 0.0
        for site in order:
            total = total + denoiser(state, 1.0)[:, site].gather(-1, x0[:, site, None])[:, 0]
            state = state.index_copy(1, torch.tensor([site]), x0[:, site, None])
        values.append(total)
    return float(torch.stack(values).var(0, correction=0).mean().sqrt())


def test_what_has_no_order_is_refused():
    chain = toy_chain("uniform")
    with pytest.raises(CapabilityError, match="order of reveals in masked chains"):
        order_sd(chain, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="windows lie between 1 and 2"):
        order_sd(toy_chain(), torch.zeros(1, 2, dtype=torch.int64))


def test_figures_of_a_refined_run_are_those_of_its_chains():
    options = {"num_particles": 16, "num_runs": 2}
    chain, goal = toy_chain(vocab_size=4, length=6, num_steps=6), toy_potential(4, 6, scale=2.0)
    post = SMC(chain, goal, method="refinement", num_chains=4, **options).run(seed=0)
    found = collapse(post)
    assert all(1 <= n <= 4 for n in found["ancestors"])
    assert all(0 < share <= 1 for share in found["unique"])
