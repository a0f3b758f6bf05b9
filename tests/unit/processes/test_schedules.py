"""Schedules: exact ends, derivatives, inverses, array libraries."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.kernels import Cosine, Linear, LogLinear, Polynomial

SCHEDULES = [Linear(), LogLinear(), LogLinear(eps=0.1), Cosine(), Polynomial(), Polynomial(3.5)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@each_schedule
@pytest.mark.parametrize(
    "make", [float, np.float64, lambda t: torch.tensor(t)], ids=["py", "np", "torch"]
)
def test_ends_are_exact(schedule, make):
    assert float(schedule.alpha(make(0.0))) == 1.0
    assert float(schedule.alpha(make(1.0))) == 0.0
    assert float(schedule.log1m_alpha(make(0.0))) == -math.inf
    assert float(schedule.log1m_alpha(make(1.0))) == 0.0


@each_schedule
def test_alpha_decreases(schedule):
    alpha = np.asarray(schedule.alpha(np.linspace(0, 1, 1001)))
    assert np.all(np.diff(alpha) < 0)


@each_schedule
def test_derivative_matches_finite_differences(schedule):
    t, h = np.linspace(0.01, 0.99, 99), 1e-6
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    np.testing.assert_allclose(schedule.alpha_prime(t), slope, rtol=0, atol=1e-8)
    assert np.all(np.asarray(schedule.alpha_prime(np.array([0.0, 1.0]))) <= 0)


def test_derivative_check_has_power():
    """A cosine slope without its factor (a defect of published code) is off by far more."""
    t, h = 0.3, 1e-6
    schedule = Cosine()
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    assert abs(schedule.alpha_prime(t) / (math.pi / 2) - slope) > 0.1


@each_schedule
def test_log_noise_is_consistent_with_alpha(schedule):
    t = np.linspace(0.05, 1, 96)
    np.testing.assert_allclose(np.exp(schedule.log1m_alpha(t)), 1 - schedule.alpha(t), atol=1e-14)


@each_schedule
@pytest.mark.parametrize("t", [1e-300, 1e-17, 1e-9, 1e-3, 0.25, 0.5, 0.9, 0.999])
def test_inverse_round_trip(schedule, t):
    """Down to times at which ``1 - alpha`` in float64 would be zero."""
    assert float(schedule.time_from_log1m(schedule.log1m_alpha(t))) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=repr)
def test_inverse_round_trip_at_the_noisy_end(schedule):
    """The cosine is flat at ``t = 1``: half of the digits are lost there and no more."""
    t = np.float64(1 - 1e-6)
    assert float(schedule.time_from_log1m(schedule.log1m_alpha(t))) == pytest.approx(t, abs=2e-8)
    for end in (0.0, 1.0):
        assert float(schedule.time_from_log1m(schedule.log1m_alpha(end))) == end


@each_schedule
def test_float32_input_is_computed_in_float64(schedule):
    t = torch.tensor([0.1, 0.7], dtype=torch.float32)
    for fn in (
        schedule.alpha,
        schedule.alpha_prime,
        schedule.log1m_alpha,
        schedule.time_from_log1m,
    ):
        assert fn(t).dtype == torch.float64
    assert np.asarray(schedule.alpha(0.5)).dtype == np.float64


@each_schedule
def test_libraries_agree(schedule):
    t = np.linspace(0, 1, 33)
    for name in ("alpha", "alpha_prime", "log1m_alpha"):
        here = getattr(schedule, name)(torch.tensor(t))
        np.testing.assert_allclose(here.numpy(), getattr(schedule, name)(t), rtol=1e-14, atol=1e-15)
        one_by_one = [float(getattr(schedule, name)(float(x))) for x in t]
        np.testing.assert_allclose(one_by_one, getattr(schedule, name)(t), rtol=1e-14, atol=1e-15)


def test_schedules_are_values():
    assert LogLinear(0.1) == LogLinear(eps=0.1) != LogLinear(0.2)
    assert len({Linear(), Linear(), Cosine()}) == 2
    assert Polynomial(2) == Polynomial() != Polynomial(3)


@pytest.mark.parametrize("eps", [-0.1, 1.0, math.nan])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=r"LogLinear: eps must lie in \[0, 1\)"):
        LogLinear(eps)


def test_polynomial_of_power_one_is_linear():
    t = np.linspace(0, 1, 11)
    for name in ("alpha", "alpha_prime", "log1m_alpha"):
        np.testing.assert_array_equal(getattr(Polynomial(1.0), name)(t), getattr(Linear(), name)(t))


@pytest.mark.parametrize("power", [0.5, 0.0, -1.0, math.inf, math.nan])
def test_bad_power(power):
    with pytest.raises(ValueError, match=r"Polynomial: power must lie in \[1, inf\)"):
        Polynomial(power)
