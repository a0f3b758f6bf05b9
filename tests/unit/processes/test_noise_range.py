"""The range of noise at which codes can be confused."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import ndtr

from ppl_diffusion.processes import Gaussian, NoiseRange
from ppl_diffusion.processes.noise_range import nearest_distances


@pytest.mark.parametrize(("dim", "rate"), [(1, 0.309), (4, 0.159), (16, 0.023), (64, 0.0)])
@pytest.mark.parametrize("distance", [0.1, 3.0])
def test_error_rate_of_two_codes(dim, rate, distance):
    """``Q(sqrt(d) / 2)`` at any distance: the rule loses its meaning in many dimensions."""
    codes = np.zeros((2, dim))
    codes[1] = distance / math.sqrt(dim)
    found = NoiseRange.from_codebook(codes)
    assert found.squared_noise == pytest.approx(distance**2 / dim)
    assert found.error_rate == pytest.approx(rate, abs=5e-4)
    assert found.error_rate == pytest.approx(ndtr(-math.sqrt(dim) / 2), abs=1e-12)


def test_error_rate_is_how_often_codes_are_confused():
    """By simulation; false alarm below 1e-6 (5 standard errors)."""
    found, g = NoiseRange.from_codebook(np.array([[0.0], [1.0]])), np.random.default_rng(0)
    process = Gaussian("linear", t_min=0.0)
    u = found.level(process)
    noisy = float(process.noise(u) / process.signal(u)) * g.standard_normal(40_000)
    rate = np.mean(noisy > 0.5)
    assert abs(rate - found.error_rate) < 5 * math.sqrt(found.error_rate / 40_000)


def test_noise_level_and_end_of_a_chain():
    found = NoiseRange.from_codebook(torch.tensor([[0.0, 0.0], [0.0, 0.5], [3.0, 0.5]]))
    mean = (0.25 + 0.25 + 9.0) / 3 / 2
    assert found.squared_noise == pytest.approx(mean)
    assert found.noise == pytest.approx(math.sqrt(mean / (1 + mean)))
    process = Gaussian("sqrt", found.t_min("sqrt"))
    assert float(process.noise(0.0)) == pytest.approx(found.noise, rel=1e-9)
    assert found.level(process) == pytest.approx(0.0, abs=1e-9)


def test_quantile_and_offset():
    codes = np.array([[0.0], [1.0], [3.0], [10.0]])  # squared distances 1, 1, 4, 49
    assert NoiseRange.from_codebook(codes, quantile=0.0).squared_noise == 1.0
    assert NoiseRange.from_codebook(codes, quantile=1.0).squared_noise == 49.0
    assert NoiseRange.from_codebook(codes, offset=1.0).squared_noise == 55 / 4 + 1
    rates = [NoiseRange.from_codebook(codes, quantile=q).error_rate for q in (0.1, 0.5, 0.9)]
    assert rates == sorted(rates)


def test_nearest_distances_in_chunks():
    points = np.random.default_rng(1).standard_normal((37, 5))
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_allclose(nearest_distances(points, chunk=8), distances.min(-1), rtol=1e-12)


def test_bad_codebooks():
    with pytest.raises(ValueError, match=r"at least two codes, got shape \(1, 3\)"):
        NoiseRange.from_codebook(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="distance 0"):
        NoiseRange.from_codebook(np.zeros((3, 2)))
