"""The own k-hat against ArviZ's, against laws of known shape, and at its edges."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import genpareto

from ppl_diffusion.diagnostics import khat

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

ARVIZ_MAJOR = int(arviz.__version__.split(".")[0])


def arviz_khat(log_weights):
    if ARVIZ_MAJOR == 0:
        return arviz.psislw(log_weights)[1]
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights, axis=-1)[1]  # 1.x takes log-likelihood ratios


def heavy(shape, rows, particles, seed=0):
    generator = np.random.default_rng(seed)
    return np.log(genpareto.rvs(shape, size=(rows, particles), random_state=generator) + 1)


# 1.x rounds the tail size down where 0.x, and the paper, round it up
SIZES = [25, 64, 256, 5000] if ARVIZ_MAJOR == 0 else [256, 6400]


@pytest.mark.parametrize("particles", SIZES)
@pytest.mark.parametrize("shape", [0.1, 0.5, 0.9, 2.0])
def test_khat_equals_arviz(shape, particles):
    log_weights = heavy(shape, 7, particles)
    np.testing.assert_allclose(khat(log_weights), arviz_khat(log_weights), rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(ARVIZ_MAJOR > 0, reason="1.x keeps weights tied with the cutoff in the tail")
def test_khat_equals_arviz_with_ties_and_zero_weights():
    generator = np.random.default_rng(1)
    log_weights = generator.choice([-np.inf, *np.linspace(-6, 3, 40)], size=(9, 300))
    np.testing.assert_allclose(khat(log_weights), arviz_khat(log_weights), rtol=1e-8)


def test_khat_finds_the_shape_of_a_pareto_law():
    # 20,000 particles, tail of 425: sd of the shape about (1 + k) / sqrt(425) < 0.1 for k <= 1;
    # the mean of 25 rows is off by 0.1 (5 sd, plus a prior bias below 0.015) once in 1e5
    for shape in (0.2, 0.5, 1.0):
        assert khat(heavy(shape, 25, 20_000)).mean() == pytest.approx(shape, abs=0.1)


def test_khat_ignores_the_scale_and_order_of_weights():
    log_weights = heavy(0.6, 3, 400)
    shuffled = np.random.default_rng(2).permuted(log_weights, axis=1)
    np.testing.assert_allclose(khat(shuffled + 1234.5), khat(log_weights), rtol=1e-7)


def test_khat_keeps_leading_dimensions_and_takes_tensors():
    log_weights = heavy(0.4, 6, 100).reshape(2, 3, 100)
    values = khat(torch.tensor(log_weights, requires_grad=True))
    assert values.shape == (2, 3)
    assert khat(log_weights[1, 2]).shape == ()
    assert values[1, 2] == khat(log_weights[1, 2])


@pytest.mark.parametrize(
    "log_weights",
    [
        np.zeros(1000),
        np.full(1000, -np.inf),
        np.r_[0.0, np.full(999, -np.inf)],
        np.r_[np.zeros(4), np.full(996, -1.0)],
        np.log(np.arange(1.0, 21.0)),
        np.zeros(1),
    ],
    ids=["equal", "dead", "one-holds-all", "four-above", "twenty-particles", "one-particle"],
)
def test_khat_without_a_tail_is_nan(log_weights):
    assert np.isnan(khat(log_weights))


def test_khat_is_finite_from_twenty_one_particles_on():
    assert np.isfinite(khat(np.log(np.arange(1.0, 22.0))))


def test_khat_mixes_rows_with_and_without_a_tail():
    rows = np.stack([np.zeros(200), heavy(0.5, 1, 200)[0], np.full(200, -np.inf)])
    values = khat(rows)
    assert np.isnan(values[[0, 2]]).all()
    assert values[1] == khat(rows[1])


def test_khat_is_finite_where_a_grid_point_is_zero():
    # 16 excesses, quartile exactly a third of the maximum: the grid of m = 34 holds theta = 0
    excess = np.r_[np.full(4, 0.25), np.full(11, 0.5), 0.75]
    weights = np.r_[np.full(64, 0.25), 0.25 + excess]
    assert np.isfinite(khat(np.log(weights)))


def test_khat_survives_weights_at_the_edge_of_double_precision():
    values = khat(np.linspace(-745, 0, 100))
    assert values > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_khat_names_the_improper_weight(bad):
    log_weights = np.zeros((2, 30))
    log_weights[1, 7] = bad
    with pytest.raises(ValueError, match=r"log_weights\[1, 7\] is (nan|inf): .* potential"):
        khat(log_weights)


def test_khat_treats_weights_equal_up_to_rounding_as_tied():
    # a tail of one repeated weight, seen through float32 noise, must not pass for a power law
    noise = 1e-7 * np.random.default_rng(3).random(300)
    assert np.isnan(khat(np.r_[np.full(700, -2.0), noise]))
