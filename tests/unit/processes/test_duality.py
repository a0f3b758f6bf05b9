"""Gaussian latents and uniform noise: the transform of signal levels, and coupled states.

Statistical tests compare with exact probabilities at p > 1e-7 (one false alarm in ten million).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_terms
from ppl_diffusion.kernels import Uniform
from ppl_diffusion.processes import step_kl
from ppl_diffusion.processes.duality import (
    DuoSchedule,
    coupled_states,
    diffusion_signal,
    diffusion_signal_prime,
    log_diffusion_noise,
    other_token,
    upper_normal,
)
from ppl_diffusion.testing import random_joint

ALPHA = 1e-7
SIZES = [2, 3, 27, 1000, 50_257]
MUS = np.array([0.05, 0.5, 1.0, 2.5, 4.0, 6.0])
each_size = pytest.mark.parametrize("size", SIZES)


def p_win(mu, size):
    """Return the probability that the clean entry of the latent is the largest."""
    signal = float(diffusion_signal(float(mu), size))
    return signal + (1 - signal) / size


def uniforms(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), dtype=torch.float64, generator=generator)


def gaussian_argmax(mus, size, count, seed=0):
    """Draw ``argmax(mu x + eps)`` by brute force for token 0, the same noise for every mu."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, size))
    clean = np.arange(size) == 0
    return np.stack([np.argmax(noise + mu * clean, axis=-1) for mu in mus])


def assert_frequency(hits, count, probability):
    assert stats.binomtest(int(hits), count, probability).pvalue > ALPHA


@pytest.mark.parametrize("size", [2, 3, 27, 300])
def test_signal_is_the_frequency_of_the_argmax(size):
    states = gaussian_argmax([0.3, 1.0, 2.5], size, 20_000)
    for mu, drawn in zip([0.3, 1.0, 2.5], states, strict=True):
        assert_frequency((drawn == 0).sum(), 20_000, p_win(mu, size))


def test_frequencies_have_power():
    """Winning is not yet signal: one win in ``V`` comes from the noise."""
    hits = int((gaussian_argmax([1.0], 3, 20_000)[0] == 0).sum())
    signal = float(diffusion_signal(1.0, 3))
    assert stats.binomtest(hits, 20_000, signal).pvalue < 1e-50


def test_quoted_values():
    """Duo's window of gammas for GPT-2's vocabulary, the paper's own times, and three wins."""
    gammas = np.array([-3.55, -1.85])
    window = diffusion_signal(np.exp(-gammas / 2), 50_257)
    np.testing.assert_allclose(window, [0.945, 0.0493], atol=5e-4)
    a = 1 - np.array([0.03, 0.15])
    in_paper = diffusion_signal(a / np.sqrt(1 - a**2), 50_257)
    np.testing.assert_allclose(in_paper, [0.409, 0.0056], atol=5e-4)
    wins = [p_win(mu, 1000) for mu in (2.5, 3.5, 4.5)]
    np.testing.assert_allclose(wins, [0.2427, 0.5983, 0.8824], atol=1e-4)


@each_size
def test_signal_is_the_integral(size):
    """A trapezoid rule of 20,000 nodes on [-12, 12]."""
    u = np.linspace(-12, 12, 20_001)
    weight = stats.norm.pdf(u) * (u[1] - u[0])
    for mu in MUS:
        noise = -np.sum(weight * np.expm1((size - 1) * stats.norm.logcdf(u + mu)))
        noise *= size / (size - 1)
        assert diffusion_signal(mu, size) == pytest.approx(1 - noise, abs=1e-9)
        assert log_diffusion_noise(mu, size) == pytest.approx(math.log(noise), abs=1e-7)


@each_size
def test_signal_rises_from_zero_to_one(size):
    grid = np.linspace(0, 12, 500)
    signal = np.asarray(diffusion_signal(grid, size))
    assert signal[0] == 0.0
    assert signal[-1] == pytest.approx(1.0, abs=1e-9)
    rising = signal < 1 - 1e-9
    assert np.all(np.diff(signal[rising]) > 0)
    assert float(diffusion_signal(math.inf, size)) == pytest.approx(1.0, abs=1e-9)


@each_size
def test_derivative_of_the_signal(size):
    mu = torch.tensor(MUS, requires_grad=True)
    (slope,) = torch.autograd.grad(diffusion_signal(mu, size).sum(), mu)
    found = diffusion_signal_prime(mu.detach(), size)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)
    h = 1e-4
    finite = (diffusion_signal(MUS + h, size) - diffusion_signal(MUS - h, size)) / (2 * h)
    np.testing.assert_allclose(found, finite, rtol=1e-5, atol=1e-8)


@each_size
@pytest.mark.parametrize(
    "make", [float, np.float64, lambda t: torch.tensor(t)], ids=["py", "np", "torch"]
)
def test_ends_of_the_schedule_are_pinned(size, make):
    schedule = DuoSchedule(size)
    assert float(schedule.alpha(make(0.0))) == 1.0
    assert float(schedule.alpha(make(1.0))) == 0.0
    assert float(schedule.log1m_alpha(make(0.0))) == -math.inf
    assert float(schedule.log1m_alpha(make(1.0))) == 0.0
    assert float(schedule.mu(make(0.0))) == math.inf
    assert float(schedule.mu(make(1.0))) == 0.0
    assert float(schedule.alpha(make(1e-6))) < 1.0
    assert float(schedule.alpha(make(0.999999))) > 0.0


def test_schedule_follows_gamma():
    schedule, t = DuoSchedule(50_257, -4.0, -1.0), np.linspace(0.1, 0.9, 9)
    signal = 1 / (1 + np.exp(-4 + 3 * t))  # A^2 = sigmoid(-g)
    np.testing.assert_allclose(schedule.mu(t), np.sqrt(signal / (1 - signal)), rtol=1e-12)
    np.testing.assert_allclose(
        schedule.alpha(t), diffusion_signal(schedule.mu(t), 50_257), rtol=0, atol=0
    )


@each_size
def test_schedule_is_consistent(size):
    schedule, t, h = DuoSchedule(size), np.linspace(0.01, 0.99, 50), 1e-4
    alpha = np.asarray(schedule.alpha(t))
    assert np.all(np.diff(alpha) < 0)
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.alpha_prime(t), slope, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.exp(schedule.log1m_alpha(t)), 1 - alpha, atol=1e-9)
    np.testing.assert_allclose(schedule.time_from_log1m(schedule.log1m_alpha(t)), t, atol=1e-9)


def test_noise_outside_the_window_belongs_to_its_ends():
    found = DuoSchedule(50_257).time_from_log1m(torch.tensor([-math.inf, -20.0, -1e-3, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, 1.0]).double())


def test_one_site_bound_over_the_schedule_is_tight():
    """Integral over the times inside plus the two pinned jumps is ``-log p(x)`` at ``L = 1``."""
    schedule = DuoSchedule(3, gamma_min=-6.0, gamma_max=6.0)
    process, law = Uniform(3, schedule), random_joint(3, 1, seed=3)
    denoiser = TableDenoiser(law, process)
    points, weights = np.polynomial.legendre.leggauss(120)
    states, eps = torch.arange(3)[:, None], 1e-9
    totals = torch.zeros(3, dtype=torch.float64)
    for x in range(3):
        x0 = torch.full_like(states, x)
        for t, w in zip((points + 1) / 2, weights / 2, strict=True):
            a, slope = float(schedule.alpha(t)), float(schedule.alpha_prime(t))
            law_z = a * (states == x).double() + (1 - a) / 3
            terms = uniform_nelbo_terms(x0, states, denoiser(states, t).double(), a, slope)
            totals[x] += w * float((law_z * terms).sum())
        first = step_kl(
            process, x0, states, denoiser(states, 1.0), 0.0, float(schedule.alpha(1 - eps))
        )
        totals[x] += float(first.mean())
    torch.testing.assert_close(totals, -law.log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((1,), "vocab_size must be >= 2 for a uniform process, got 1"),
        ((5, -1.0, -1.0), "gamma_min must be below gamma_max, both finite, got -1.0 and -1.0"),
        ((5, -math.inf, 0.0), "both finite"),
    ],
)
def test_unusable_windows(args, text):
    with pytest.raises(ValueError, match=text):
        DuoSchedule(*args)


LEVELS = torch.tensor([0.3, 0.8, 1.5, 2.2, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 5])
def test_coupled_states_have_the_marginals_of_the_process(size):
    x0 = torch.zeros(50_000, dtype=torch.int64) + size // 2
    states = coupled_states(x0, LEVELS, size, uniforms(3, 50_000))
    assert states.shape == (5, 50_000)
    for mu, z in zip(LEVELS, states, strict=True):
        signal = float(diffusion_signal(mu, size))
        law = signal * np.eye(size)[size // 2] + (1 - signal) / size
        counts = np.bincount(z.numpy(), minlength=size)
        assert stats.chisquare(counts, 50_000 * law).pvalue > ALPHA


def test_coupled_states_have_the_joint_law_of_one_latent():
    """Two levels at once against the argmax of brute-force Gaussians (two-sample chi-square)."""
    mus, size, count = [0.5, 1.8], 4, 100_000
    brute = gaussian_argmax(mus, size, count)
    x0 = torch.zeros(count, dtype=torch.int64)
    ours = coupled_states(x0, torch.tensor(mus), size, uniforms(3, count)).numpy()
    tables = [np.bincount(pair[0] * size + pair[1], minlength=16) for pair in (brute, ours)]
    seen = (tables[0] + tables[1]) > 0
    assert seen.sum() == 4 + 3  # (x, x), (j, j) and (j, x): never from x to anything
    contingency = np.stack(tables)[:, seen]
    assert stats.chi2_contingency(contingency).pvalue > ALPHA
    alone = coupled_states(x0, torch.tensor(mus[1:]), size, uniforms(3, count, seed=1)).numpy()
    broken = np.bincount(ours[0] * size + alone[0], minlength=16)[seen]
    assert stats.chi2_contingency(np.stack([contingency[0], broken])).pvalue < 1e-50


def test_a_token_changes_at_most_once():
    x0 = torch.randint(50, (40, 25), generator=torch.Generator().manual_seed(0))
    mus = torch.linspace(0, 8, 60, dtype=torch.float64)
    states = coupled_states(x0, mus, 50, uniforms(3, 40, 25))
    clean = states == x0
    assert bool((clean[1:] | ~clean[:-1]).all())  # once clean, clean at every larger mu
    assert bool(((states == states[0]) | clean).all())  # before, one and the same other token
    assert 0.01 < float((clean[0]).double().mean()) < 0.04  # mu = 0: one in fifty
    assert bool(clean[-1].all())


def test_levels_may_differ_by_row():
    x0 = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0))
    noise, mus = uniforms(3, 6, 4), torch.linspace(0, 4, 12, dtype=torch.float64).reshape(2, 6, 1)
    states = coupled_states(x0, mus, 9, noise)
    for level in range(2):
        for row in range(6):
            alone = coupled_states(x0[row], mus[level, row], 9, noise[:, row])
            assert torch.equal(states[level, row], alone[0])


def test_infinite_signal_is_the_clean_token():
    x0 = torch.arange(8)
    assert torch.equal(coupled_states(x0, torch.tensor([math.inf]), 8, uniforms(3, 8))[0], x0)


def test_other_tokens_are_uniform():
    x0 = torch.full((60_000,), 2)
    counts = np.bincount(other_token(x0, 5, uniforms(1, 60_000)[0]).numpy(), minlength=5)
    assert counts[2] == 0
    assert stats.chisquare(np.delete(counts, 2)).pvalue > ALPHA


def test_upper_tail_in_float32():
    """The maximum of 50,256 normals; the naive quantile rounds to infinity."""
    log_cdf = torch.log(uniforms(1, 20_000)[0]) / 50_256
    exact = upper_normal(log_cdf)
    found = upper_normal(log_cdf.float()).double()
    naive = torch.special.ndtri(log_cdf.float().exp()).double()
    assert float((found - exact).abs().max()) < 2e-6
    assert float((naive - exact).abs().max()) > 0.1
    np.testing.assert_allclose(exact, stats.norm.isf(-torch.expm1(log_cdf).numpy()), rtol=1e-12)


@pytest.fixture
def _x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.mark.usefixtures("_x64")
def test_torch_and_jax_agree():
    t = np.linspace(0, 1, 11)
    for name in ("alpha", "alpha_prime", "log1m_alpha", "mu"):
        here, there = (
            getattr(DuoSchedule(27), name)(make(t)) for make in (torch.tensor, jnp.asarray)
        )
        np.testing.assert_allclose(here.numpy(), np.asarray(there), rtol=1e-10, atol=1e-12)
    x0, noise, mus = np.arange(27), uniforms(3, 27).numpy(), np.array([0.5, 2.0])
    here = coupled_states(torch.tensor(x0), torch.tensor(mus), 27, torch.tensor(noise))
    there = coupled_states(jnp.asarray(x0), jnp.asarray(mus), 27, jnp.asarray(noise))
    np.testing.assert_array_equal(here.numpy(), np.asarray(there))


def test_jax_in_its_default_precision():
    signal = diffusion_signal(jnp.asarray(MUS), 50_257)
    np.testing.assert_allclose(signal, diffusion_signal(MUS, 50_257), atol=1e-4)
    states = coupled_states(jnp.arange(5), jnp.asarray([0.1, 9.0]), 5, jnp.full((3, 5), 0.5))
    np.testing.assert_array_equal(states[1], np.arange(5))
