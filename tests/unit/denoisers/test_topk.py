"""The largest entries of a Gaussian latent: their values, their places, who wins, and the tail.

Statistical tests compare with exact laws at p > 1e-7 (one false alarm in ten million) unless a
comment says otherwise.
"""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from ppl_diffusion.denoisers.topk import (
    _soft_weights,
    dense_latents,
    distinct_ranks,
    largest_normals,
    log_mean_below,
    log_mills,
    top_k_latents,
)
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_terms
from ppl_diffusion.processes.duality import diffusion_signal

ALPHA = 1e-7


def uniforms(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), dtype=torch.float64, generator=generator)


def draw(size, mu, *, k, tau=1e-3, count=20_000, token=0, seed=0):
    x0 = torch.full((count,), token)
    return top_k_latents(x0, mu, size, uniforms(2 * k + 1, count, seed=seed), k=k, tau=tau)


def win_probability(mu, size):
    signal = float(diffusion_signal(mu, size))
    return signal + (1 - signal) / size


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size", "mu"), [(4, 0.8), (27, 2.3), (50_257, 4.49), (50_257, 3.3)])
def test_the_clean_token_wins_as_often_as_it_should(size, mu, k):
    k = min(k, size - 1)
    wins = int((draw(size, mu, k=k).tokens == 0).sum())
    assert stats.binomtest(wins, 20_000, win_probability(mu, size)).pvalue > ALPHA


def test_wins_have_power():
    """The published rule (the clean token whenever it is among the largest k) is far off."""
    mixture = draw(50_257, 4.49, k=3)
    own = mixture.weights[..., :1]
    in_top_k = int((mixture.weights[..., 1:] < own).any(-1).sum())
    assert stats.binomtest(in_top_k, 20_000, win_probability(4.49, 50_257)).pvalue < 1e-50
    # The law of the published sampler, P(z = x) = .722 at T = .596, within 4.5 standard errors:
    # false alarm below 1e-5.
    assert abs(in_top_k / 20_000 - 0.722) < 0.0145


def test_the_argmax_is_the_largest_weight():
    mixture = draw(27, 2.0, k=4, tau=0.05)
    assert mixture.ids.shape == mixture.weights.shape == (20_000, 5)
    best = mixture.weights.argmax(-1, keepdim=True)
    assert torch.equal(mixture.ids.gather(-1, best)[:, 0], mixture.tokens)
    assert bool((mixture.weights[:, 1:].diff(dim=-1) <= 0).all())
    total = mixture.weights.sum(-1) + mixture.tail
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert 0.2 < float((mixture.tokens == 0).double().mean()) < 0.8


def test_losing_argmaxes_are_uniform():
    tokens = draw(6, 0.4, k=2, token=3, count=50_000).tokens.numpy()
    counts = np.bincount(tokens[tokens != 3], minlength=6)
    assert stats.chisquare(np.delete(counts, 3)).pvalue > ALPHA


def test_every_slot_is_uniform():
    """Three of the five other tokens at ``V = 6``."""
    ids = draw(6, 1.0, k=3, token=2, count=60_000).ids
    assert bool((ids[:, 0] == 2).all())
    assert bool((ids.sort(-1).values.diff(dim=-1) > 0).all())
    for slot in range(1, 4):
        counts = np.bincount(ids[:, slot].numpy(), minlength=6)
        assert stats.chisquare(np.delete(counts, 2)).pvalue > ALPHA


def floyd(random, count):
    """Floyd's set sampler: a uniform set of ``k``, in places that are not exchangeable."""
    k, chosen = len(random), []
    for i in range(k):
        top = count - k + i
        rank = (random[i] * (top + 1)).long()
        taken = torch.stack([rank == c for c in chosen]).any(0) if chosen else rank < 0
        chosen.append(torch.where(taken, top, rank))
    return torch.stack(chosen, -1)


def test_slots_have_power():
    """Floyd's places are off at once; as sets its draws are right."""
    ids = floyd(uniforms(3, 60_000), 6)
    first = np.bincount(ids[:, 0].numpy(), minlength=6)
    assert first[4] == first[5] == 0
    assert stats.chisquare(first).pvalue < 1e-50
    assert stats.chisquare(np.bincount(ids.flatten().numpy())).pvalue > ALPHA


def test_ordered_choices_are_equally_likely():
    """All 24 ordered pairs of 4, and every permutation of 4."""
    pairs = distinct_ranks(uniforms(2, 48_000), 4)
    counts = np.bincount((4 * pairs[:, 0] + pairs[:, 1]).numpy(), minlength=16)
    assert stats.chisquare(counts[counts > 0]).pvalue > ALPHA
    assert int((counts > 0).sum()) == 12
    whole = distinct_ranks(uniforms(4, 48_000), 4)
    codes = (whole * torch.tensor([64, 16, 4, 1])).sum(-1)
    _, counts = np.unique(codes.numpy(), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > ALPHA


def test_ranks_stay_below_their_number():
    top = torch.full((3, 2), 1.0, dtype=torch.float64)  # beyond what a generator returns
    assert distinct_ranks(top, 3).tolist() == [[2, 1, 0], [2, 1, 0]]


def test_largest_values_are_order_statistics():
    """Two-sample Kolmogorov-Smirnov against the sorted normals, slot by slot."""
    ours = largest_normals(uniforms(4, 10_000), 60).numpy()
    noise = np.random.default_rng(0).standard_normal((10_000, 60))
    brute = -np.sort(-noise, axis=-1)[:, :4]
    for slot in range(4):
        assert stats.ks_2samp(ours[:, slot], brute[:, slot]).pvalue > ALPHA
    assert stats.ks_2samp(ours[:, 0], brute[:, 1]).pvalue < 1e-50
    # And jointly: the gap between the two largest.
    assert stats.ks_2samp(ours[:, 0] - ours[:, 1], brute[:, 0] - brute[:, 1]).pvalue > ALPHA


def test_all_entries_are_the_full_softmax():
    latents = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.full((50,), 7.0, dtype=torch.float64)
    weights, tail = _soft_weights(latents, scale, others=8)
    torch.testing.assert_close(weights, (7.0 * latents).softmax(-1), rtol=1e-12, atol=0)
    assert float(tail.abs().max()) == 0.0


def largest_first(size, mu, count=300, seed=0):
    """Return latents of the clean token and of the others, in decreasing order."""
    noise = torch.randn(
        (count, size), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    others = noise[:, 1:].sort(-1, descending=True).values
    return torch.cat([mu + noise[:, :1], others], dim=-1)


@pytest.mark.parametrize(("tau", "error"), [(0.3, 0.06), (0.1, 0.03), (0.01, 0.003)])
def test_weights_are_near_those_of_the_full_softmax(tau, error):
    """Mean L1 distance over 1000 tokens at k = 20, by brute force on the same latents."""
    latents, mu, k = largest_first(1000, 3.0), 3.0, 20
    scale = torch.full((300,), 1 / (tau * math.sqrt(1 + mu**2)), dtype=torch.float64)
    full = (latents * scale[:, None]).softmax(-1)
    weights, tail = _soft_weights(latents[:, : k + 1], scale, others=999)
    distance = (weights - full[:, : k + 1]).abs().sum(-1)
    assert float(distance.mean()) < error
    # The expected tail is the mean of the true one, up to the randomness of the normaliser:
    # 20 % is more than six standard errors of the mean over 300 rows at tau = .3.
    true_tail = full[:, k + 1 :].sum(-1)
    if tau == 0.3:
        assert float(tail.mean()) == pytest.approx(float(true_tail.mean()), rel=0.2)
        truncated = (weights / weights.sum(-1, keepdim=True) - full[:, : k + 1]).abs().sum(-1)
        assert float(distance.mean()) < 0.5 * float(truncated.mean())


def test_the_dense_form_has_the_same_law():
    """At ``k = V - 1`` the largest weights of both have one law (Kolmogorov-Smirnov)."""
    x0, size, mu, tau = torch.zeros(10_000, dtype=torch.int64), 8, 1.2, 0.2
    noise = torch.randn(
        (10_000, size), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    dense, tokens = dense_latents(x0, mu, size, noise, tau=tau)
    mixture = draw(size, mu, k=size - 1, tau=tau, count=10_000)
    for first, second in (
        (dense.max(-1).values, mixture.weights.max(-1).values),
        (dense[:, 0], mixture.weights[:, 0]),
    ):
        assert stats.ks_2samp(first.numpy(), second.numpy()).pvalue > ALPHA
    wins = int((tokens == 0).sum())
    assert stats.binomtest(wins, 10_000, win_probability(mu, size)).pvalue > ALPHA
    assert float(mixture.tail.abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dense_form_is_a_softmax(dtype):
    mu, tau, size = 2.0, 0.05, 5
    x0 = torch.randint(size, (30, 4), generator=torch.Generator().manual_seed(0))
    noise = torch.randn((30, 4, size), generator=torch.Generator().manual_seed(1), dtype=dtype)
    weights, tokens = dense_latents(x0, mu, size, noise, tau=tau)
    a = mu / math.sqrt(1 + mu**2)
    latent = (
        a * torch.nn.functional.one_hot(x0, size).double() + math.sqrt(1 - a**2) * noise.double()
    )
    assert weights.dtype == dtype
    expected = (latent / tau).softmax(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=tolerance)
    assert torch.equal(tokens, latent.argmax(-1))


def test_the_tail_shrinks_with_k_and_with_the_temperature():
    by_k = [float(draw(1000, 3.0, k=k, tau=0.1).tail.mean()) for k in (1, 2, 4, 8, 16)]
    assert all(first > second for first, second in pairwise(by_k))
    assert by_k[0] > 0.3
    by_tau = [float(draw(50_257, 4.5, k=2, tau=tau).tail.mean()) for tau in (0.1, 0.01, 1e-3, 1e-4)]
    assert all(first > 5 * second for first, second in pairwise(by_tau))
    assert by_tau[0] > 0.1 > 1e-4 > by_tau[-1]


def test_mean_below_a_bound():
    """Against numerical integration, for scales on both sides of the series."""
    for g in (-1.0, 2.0, 4.3):
        for s in (0.0, 0.5, 3.0, 12.0, 30.0):
            x = np.linspace(g - 60 / (s + 2), g, 400_001)
            density = np.exp(stats.norm.logpdf(x) + s * (x - g))
            expected = math.log(np.trapezoid(density, x) / stats.norm.cdf(g))
            found = float(log_mean_below(torch.tensor(g).double(), torch.tensor(s).double()))
            assert found == pytest.approx(expected, abs=1e-6)


def test_mills_ratio_is_continuous_across_the_series():
    y = torch.tensor([9.999999, 10.000001, 25.0, 370.0], dtype=torch.float64)
    exact = stats.norm.logsf(y.numpy()) + 0.5 * y.numpy() ** 2
    np.testing.assert_allclose(log_mills(y), exact, rtol=0, atol=2e-8)


def test_float32_and_float64_weights_agree():
    """At the temperature in use; the textbook formula of the tail loses everything there."""
    latents = largest_first(50_257, 4.5, count=100)[:, :4].float()
    scale = torch.full((100,), 1 / (1e-3 * math.sqrt(1 + 4.5**2)))
    narrow = _soft_weights(latents, scale, others=50_256)
    wide = _soft_weights(latents.double(), scale.double(), others=50_256)
    for found, expected in zip(narrow, wide, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    last = latents[:, -1]
    naive = scale**2 / 2 + torch.special.log_ndtr(last - scale) - torch.special.log_ndtr(last)
    error = naive - scale * last - log_mean_below(last.double(), scale.double())
    assert float(error.abs().max()) > 1e-3


def soft_problem(size=6, count=200_000):
    """Return a random soft-input network on two sites and latents of one sequence."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn((2, size, 8), dtype=torch.float64, generator=generator)
    head = torch.randn((8, 2 * size), dtype=torch.float64, generator=generator)
    x0 = torch.tensor([1, 4])

    def network(states):
        return (torch.tanh(states.sum(-2)) @ head).reshape(*states.shape[:-2], 2, size)

    return table, network, x0, count


def test_cold_latents_give_the_discrete_loss():
    """Soft inputs at ``tau -> 0`` against the sum over all noised pairs: same expectation.

    Within five standard errors: false alarm below 1e-6. The published argmax, tested on the same
    draws, is off by more than fifty.
    """
    table, network, x0, count = soft_problem()
    size, mu = 6, 1.0
    alpha = float(diffusion_signal(mu, size))
    states = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    hard = torch.stack([table[site][states[:, site]] for site in range(2)], dim=-2)
    law = (alpha * (states == x0).double() + (1 - alpha) / size).prod(-1)
    exact = uniform_nelbo_terms(x0.expand_as(states), states, network(hard), alpha, -1.0).sum(-1)
    expected = float((law * exact).sum())

    rows = x0.expand(count, 2)
    noise = uniforms(7, count, 2)
    mixture = top_k_latents(rows, mu, size, noise, k=3, tau=1e-6)
    picked = torch.stack([table[site][mixture.ids[:, site]] for site in range(2)], dim=1)
    soft = (mixture.weights[..., None] * picked).sum(-2)

    def deviation(tokens):
        terms = uniform_nelbo_terms(rows, tokens, network(soft), alpha, -1.0).sum(-1)
        return float((terms.mean() - expected) / (terms.std() / math.sqrt(count)))

    assert abs(deviation(mixture.tokens)) < 5
    warm = top_k_latents(rows, mu, size, noise, k=3, tau=0.5).weights
    beaten = warm[..., -1] < warm[..., 0]
    assert abs(deviation(torch.where(beaten, rows, mixture.tokens))) > 50


def test_no_noise_at_all():
    mixture = draw(6, math.inf, k=2, token=4, count=100)
    assert bool((mixture.tokens == 4).all())
    torch.testing.assert_close(mixture.weights[:, 0], torch.ones(100).double())
    weights, tokens = dense_latents(torch.tensor([4]), math.inf, 6, torch.randn(1, 6))
    assert tokens.tolist() == [4]
    assert float(weights[0, 4]) == 1.0


def test_levels_broadcast():
    x0, mu = torch.zeros((4, 3), dtype=torch.int64), torch.tensor([0.0, 1.0, 5.0, 30.0])[:, None]
    noise = uniforms(5, 4, 3)
    both = top_k_latents(x0, mu, 9, noise, k=2, tau=0.1)
    for row in range(4):
        alone = top_k_latents(x0[row], float(mu[row, 0]), 9, noise[:, row], k=2, tau=0.1)
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 0}, "k must lie in 1..5, the number of other tokens, got 0"),
        ({"k": 6}, "k must lie in 1..5, the number of other tokens, got 6"),
        ({"tau": 0.0}, "tau must be positive, got 0.0; for the limit 0 use the argmax itself"),
        ({"k": 3}, "k = 3 needs 7 uniforms per token along the first axis, got 5"),
    ],
)
def test_unusable_arguments(change, text):
    with pytest.raises(ValueError, match=text):
        top_k_latents(torch.zeros(4).long(), 1.0, 6, uniforms(5, 4), **({"k": 2} | change))


@pytest.fixture
def _x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.mark.usefixtures("_x64")
def test_torch_and_jax_agree():
    x0, noise = np.arange(27).repeat(3), uniforms(5, 81).numpy()
    here = top_k_latents(torch.tensor(x0), 2.0, 27, torch.tensor(noise), k=2, tau=0.1)
    there = top_k_latents(jnp.asarray(x0), 2.0, 27, jnp.asarray(noise), k=2, tau=0.1)
    for first, second in zip(here, there, strict=True):
        assert isinstance(second, jax.Array)
        np.testing.assert_allclose(first.numpy(), np.asarray(second), rtol=1e-9, atol=1e-12)
