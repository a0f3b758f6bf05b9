"""The Gaussian process: ends, bridges, weights, and the bound of a chain that ends in noise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ppl_diffusion.processes import Gaussian, Polynomial, gaussian_bound_terms

PROCESSES = [Gaussian(), Gaussian("linear"), Gaussian("cosine", 0.05), Gaussian(Polynomial(), 0.0)]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=repr)
STEPS = [(1.0, 0.6), (0.6, 0.55), (0.5, 0.0), (1.0, 0.0)]
each_step = pytest.mark.parametrize(("u", "s"), STEPS)


@each_process
def test_ends(process):
    """Level 1 is time 1 to the last digit, level 0 is ``t_min``; the signal is squeezed at both."""
    assert float(process.time(1.0)) == 1.0
    assert float(process.time(0.0)) == pytest.approx(process.t_min, abs=1e-15)
    assert float(process.squared_signal(1.0)) == pytest.approx(1e-4, abs=1e-15)
    assert float(process.noise(0.0)) >= 0.01 - 1e-15
    levels = np.linspace(0, 1, 201)
    assert np.all(np.diff(process.snr(levels)) < 0)
    np.testing.assert_allclose(process.signal(levels) ** 2 + process.noise(levels) ** 2, 1.0)


@pytest.mark.parametrize(
    ("schedule", "squared"),
    [
        ("sqrt", math.sqrt(0.5)),
        ("linear", 0.5),
        ("cosine", (math.cos(math.pi / 2 * 0.508 / 1.008) / math.cos(math.pi / 252)) ** 2),
        (Polynomial(3), 0.875),
    ],
)
def test_schedules(schedule, squared):
    process = Gaussian(schedule, t_min=0.0, squeeze=0.0)
    assert float(process.squared_signal(0.5)) == pytest.approx(squared, abs=1e-14)
    assert float(process.snr(0.5)) == pytest.approx(squared / (1 - squared), rel=1e-13)
    assert float(process.log_snr(0.5)) == pytest.approx(0.5 * math.log(squared / (1 - squared)))


@each_process
def test_level_of_inverts_log_snr(process):
    levels = np.linspace(0.01, 0.99, 23)
    np.testing.assert_allclose(process.level_of(process.log_snr(levels)), levels, atol=1e-9)
    np.testing.assert_allclose(process.level_of([99.0, -99.0]), [0.0, 1.0], atol=1e-15)


@each_process
@each_step
def test_bridge_is_the_exact_posterior(process, u, s):
    """Held to Bayes' rule for the joint law of ``y_s`` and ``y_u`` given ``y_0``."""
    (a_u, b_u), (a_s, b_s) = ((float(process.signal(x)), float(process.noise(x))) for x in (u, s))
    al = a_u / a_s
    w2 = b_u**2 - al**2 * b_s**2
    y_u, y_0 = 0.3, -1.7
    precision = 1 / b_s**2 + al**2 / w2
    mean = (a_s * y_0 / b_s**2 + al * y_u / w2) / precision
    got_mean, got_std = process.bridge(np.full((1, 1), y_u), np.full((1, 1), y_0), u, s)
    assert float(got_mean[0, 0]) == pytest.approx(mean, abs=1e-11)
    assert float(got_std) == pytest.approx(precision**-0.5, rel=1e-11)
    weight = a_s**2 * w2 / (2 * b_s**2 * b_u**2)
    assert float(process.kl_weight(u, s)) == pytest.approx(weight, rel=1e-9)


@each_process
@each_step
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_keeps_the_marginals(process, u, s, eta):
    keep, pull, std = process.step(u, s, eta)
    signal = keep * process.signal(u) + pull
    variance = keep**2 * process.noise(u) ** 2 + std**2
    assert float(signal) == pytest.approx(float(process.signal(s)), abs=1e-12)
    assert float(variance) == pytest.approx(float(process.noise(s)) ** 2, abs=1e-12)


@each_step
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_step_kl_is_that_of_the_normal_laws(u, s, eta):
    process, g = Gaussian(), torch.Generator().manual_seed(0)
    y, clean, guess = torch.randn((3, 4, 2, 3), generator=g, dtype=torch.float64)
    (there, std), (here, _) = (process.bridge(y, x, u, s, eta) for x in (clean, guess))
    expected = kl_divergence(Normal(there, std), Normal(here, std)).sum((-1, -2))
    torch.testing.assert_close(process.step_kl(clean, guess, u, s, eta), expected)
    assert process.kl_weight(u, s, 0.0) == math.inf


def test_prior_kl_is_that_of_the_normal_laws():
    process, clean = Gaussian(), torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(2, 2, 3)
    noisiest = Normal(process.signal(1.0) * clean, torch.tensor(process.noise(1.0)))
    expected = kl_divergence(noisiest, Normal(0.0, 1.0)).sum((-1, -2))
    torch.testing.assert_close(process.prior_kl(clean), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_of_rows(dtype):
    """A level per row gives what one row at a time gives, in the precision of the latent."""
    process, g = Gaussian("cosine"), torch.Generator().manual_seed(1)
    y, clean = torch.randn((2, 5, 3, 2, 4), generator=g, dtype=dtype)
    u = torch.linspace(0.5, 1.0, 15, dtype=torch.float64).reshape(5, 3)
    s = 0.5 * u
    mean, std = process.bridge(y, clean, u, s)
    noisy, kl = process.corrupt(clean, u, y), process.step_kl(clean, y, u, s)
    assert {mean.dtype, std.dtype, noisy.dtype, kl.dtype} == {dtype}
    for row in np.ndindex(5, 3):
        at, to = float(u[row]), float(s[row])
        one_mean, one_std = process.bridge(y[row], clean[row], at, to)
        torch.testing.assert_close(mean[row], one_mean)
        assert float(std[row]) == pytest.approx(float(one_std), rel=1e-6)
        torch.testing.assert_close(noisy[row], process.corrupt(clean[row], at, y[row]))
        torch.testing.assert_close(kl[row], process.step_kl(clean[row], y[row], at, to))


@each_process
def test_libraries_agree(process):
    levels = np.linspace(0, 1, 9)
    for name in ("time", "squared_signal", "signal", "noise", "snr", "log_snr"):
        here = getattr(process, name)(torch.tensor(levels, dtype=torch.float32))
        assert here.dtype == torch.float64
        np.testing.assert_allclose(here.numpy(), getattr(process, name)(levels), rtol=1e-12)
    clean = np.linspace(-1, 1, 24).reshape(2, 3, 4)
    there = process.bridge(torch.tensor(clean), torch.tensor(clean**2), 0.7, 0.2)[0]
    np.testing.assert_allclose(there, process.bridge(clean, clean**2, 0.7, 0.2)[0], atol=1e-14)


def linear_chain(process, num_steps):
    """Return bound and E[log q - log p] at level 0 for ``y_0 ~ N(0, 1)`` and the exact denoiser.

    Everything is normal: the marginals have variance 1, the prediction is ``a y``, its mean squared
    error ``b^2``, and the variance of the chain follows a linear recursion.
    """
    levels = np.linspace(1.0, 0.0, num_steps + 1)
    unit = np.ones((1, 1))  # every term is linear in squares, whose means are put in for them
    errors = [unit - float(process.noise(u)) for u in levels[:-1]]
    bound = gaussian_bound_terms(process, levels, unit, errors).sum()
    variance = 1.0
    for u, s in pairwise(levels):
        keep, pull, std = process.step(u, s)
        variance = (keep + pull * process.signal(u)) ** 2 * variance + std**2
    log_q = -0.5 * math.log(2 * math.pi * math.e * float(process.noise(0.0)) ** 2)
    log_p = -0.5 * math.log(2 * math.pi * variance) - 0.5 / variance
    return float(bound), float(log_q - log_p)


NUM_STEPS = [1, 2, 4, 16, 64, 1024]
BOUNDS = [4.4956, 2.6568, 1.8196, 1.2900, 1.1833, 1.15287]
EXACT = [4.4911, 1.5143, 1.2311, 1.1559, 1.1512, 1.15089]


@pytest.mark.parametrize(
    ("num_steps", "bound", "exact"), list(zip(NUM_STEPS, BOUNDS, EXACT, strict=True))
)
def test_bound_of_a_chain_that_ends_in_noise(num_steps, bound, exact):
    """Strict at every number of steps, and the gap closes; published digits."""
    process = Gaussian("linear", 0.1)
    digits = 5e-6 if num_steps == 1024 else 5e-5
    got_bound, got_exact = linear_chain(process, num_steps)
    assert got_bound == pytest.approx(bound, abs=digits)
    assert got_exact == pytest.approx(exact, abs=digits)
    ideal = 0.5 * math.log1p(float(process.snr(0.0)))
    assert ideal == pytest.approx(1.15089, abs=5e-6)
    assert got_bound > got_exact > ideal - 1e-12


@pytest.mark.parametrize(
    ("num_steps", "bound"), [(4, 1.8056), (16, 1.5056), (64, 1.9463), (1024, 3.1817)]
)
def test_a_clean_site_of_fixed_width_diverges(num_steps, bound):
    """The wrong way: a last variable ``y_0 ~ N(prediction, .3^2)``, true value log(1 / .3)."""
    process, width = Gaussian("linear", t_min=0.0), 0.3
    levels = np.linspace(1.0, 0.0, num_steps + 1)
    unit = np.ones((1, 1))
    errors = [unit - float(process.noise(u)) for u in levels[:-1]]
    terms = gaussian_bound_terms(process, levels[:-1], unit, errors[:-1])
    last = float(process.noise(levels[-2])) ** 2 / (2 * width**2) - 0.5
    assert float(terms.sum()) + last == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "square"}, "schedule must be one of sqrt, linear, cosine, got 'square'"),
        ({"t_min": 1.0}, r"t_min must lie in \[0, 1\), got 1.0"),
        ({"squeeze": 0.5}, r"squeeze must lie in \[0, 0.5\), got 0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Gaussian: {message}"):
        Gaussian(**options)


def test_bound_needs_a_prediction_per_step():
    with pytest.raises(ValueError, match="2 steps need as many predictions, got 1"):
        gaussian_bound_terms(Gaussian(), [1.0, 0.5, 0.0], np.ones((1, 1)), [np.ones((1, 1))])


def test_processes_are_values():
    assert Gaussian() == Gaussian("sqrt", 0.1) != Gaussian("sqrt", 0.2)
    assert len({Gaussian(), Gaussian(), Gaussian(Polynomial())}) == 2
