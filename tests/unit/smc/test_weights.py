"""Log-weights: normalisation, evidence increments, dead populations."""

import math

import pytest
import torch

from ppl_diffusion.smc import Weights
from ppl_diffusion.smc.weights import log_sum_exp

INF = math.inf


def weights(*rows):
    return Weights(torch.tensor(rows, dtype=torch.float64))


def test_normalised():
    w = weights([0.0, math.log(3)], [5.0, 5.0])
    torch.testing.assert_close(w.normalised, torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double())
    torch.testing.assert_close(w.log_mean, torch.tensor([math.log(2), 5.0]).double())
    torch.testing.assert_close(w.ess, torch.tensor([1.6, 2.0]).double())


def test_huge_and_tiny_weights():
    w = weights([1e6, 1e6 - 1], [-1e6, -1e6 - 1])
    assert bool(torch.isfinite(w.normalised).all())
    torch.testing.assert_close(w.normalised[0], w.normalised[1])
    assert w.log_sum[0] - 1e6 == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize("offset", [1e16, -1e16, 1e300])
def test_a_common_offset_does_not_unbalance_equal_weights(offset):
    w = weights([offset] * 1000, [offset] * 500 + [-INF] * 500)
    torch.testing.assert_close(w.ess, torch.tensor([1000.0, 500.0]).double())
    torch.testing.assert_close(w.normalised.sum(-1), torch.ones(2).double())


def test_dead_population_is_zero_not_nan():
    w = weights([-INF, -INF], [0.0, -INF])
    assert w.log_sum.tolist() == [-INF, 0.0]
    assert w.alive.tolist() == [False, True]
    assert w.ess.tolist() == [0.0, 1.0]
    assert w.normalised.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert w.log_normalised.tolist() == [[-INF, -INF], [0.0, -INF]]


def test_dead_particles_stay_dead():
    """Even where a spoiled increment would be NaN or revive them."""
    w = weights([-INF, 1.0]).add(torch.tensor([[INF, 2.0]], dtype=torch.float64))
    assert w.log.tolist() == [[-INF, 3.0]]
    w = weights([-INF, 1.0]).add(torch.tensor([[math.nan, -INF]], dtype=torch.float64))
    assert w.log.tolist() == [[-INF, -INF]]


def test_weights_are_immutable():
    w = weights([0.0, 1.0])
    w.add(torch.ones(1, 2, dtype=torch.float64))
    assert w.log.tolist() == [[0.0, 1.0]]
    with pytest.raises(AttributeError):
        w.log = None


def test_log_sum_exp_shapes():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(log_sum_exp(x), torch.logsumexp(x, -1))
