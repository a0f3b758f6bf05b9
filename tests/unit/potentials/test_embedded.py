import math

import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement, Potential
from ppl_diffusion.testing import PotentialContract
from ppl_diffusion.testing.anchored_toys import CODES, averages, measured_toy


class TestTheContract(PotentialContract):
    def make_potential(self):
        return measured_toy().potential

    def make_sequences(self):
        return measured_toy().states[::37]


def test_the_toy_has_the_printed_constants():
    toy = measured_toy()
    assert toy.evidence == pytest.approx(0.015893, abs=5e-7)
    assert toy.states[toy.posterior.argmax()].tolist() == [0, 3, 3, 1]
    assert float(toy.posterior.max()) == pytest.approx(0.1404, abs=5e-5)


def test_a_measurement_scores_as_the_normal_density():
    toy = measured_toy()
    rows = toy.states[::17]
    law = dist.Normal(averages(CODES[rows]), toy.potential.sigma).to_event(1)
    torch.testing.assert_close(toy.potential(rows), law.log_prob(toy.potential.y))


def test_points_between_codes_have_a_gradient():
    toy = measured_toy()
    points = torch.zeros(3, 4, 2, dtype=torch.float64, requires_grad=True)
    toy.potential.embedded(points).sum().backward()
    assert points.grad is not None
    assert bool((points.grad != 0).any())
    assert toy.potential.num_embedded == 3


def test_it_adds_and_scales_like_any_potential():
    toy = measured_toy()
    both = 2.0 * toy.potential + Potential(lambda x: x[..., 0] * 1.0)
    rows = toy.states[:5]
    torch.testing.assert_close(both(rows), 2 * toy.potential(rows) + rows[:, 0])


@pytest.mark.parametrize(
    ("codebook", "words"),
    [(CODES[0], "one finite row"), (CODES * math.inf, "one finite row"), ([[1.0]], "finite row")],
)
def test_a_codebook_that_is_none_is_refused(codebook, words):
    with pytest.raises(ValueError, match=words):
        EmbeddedPotential(lambda e: e.sum((-1, -2)), codebook)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be positive"):
        GaussianMeasurement(averages, torch.zeros(4), sigma, CODES)


def test_data_that_are_no_vector_are_refused():
    with pytest.raises(ValueError, match="y is a vector"):
        GaussianMeasurement(averages, torch.zeros(2, 2), 1.0, CODES)


def test_nan_is_an_error():
    broken = EmbeddedPotential(lambda e: e.sum((-1, -2)) * math.nan, CODES, name="broken")
    with pytest.raises(PotentialError, match="broken returned NaN"):
        broken(torch.zeros(2, 4, dtype=torch.int64))


def test_correlated_noise_scores_as_the_normal_density():
    toy = measured_toy()
    root = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = root @ root.mT + 0.1 * torch.eye(4).double()
    y = toy.potential.y
    found = GaussianMeasurement.correlated(averages, y, covariance, CODES, linear=True)
    rows = toy.states[::29]
    law = dist.MultivariateNormal(averages(CODES[rows]), covariance)
    torch.testing.assert_close(found(rows), law.log_prob(y))
    assert found.linear


@pytest.mark.parametrize("matrix", [torch.eye(3), -torch.eye(4)])
def test_a_covariance_that_is_none_is_refused(matrix):
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMeasurement.correlated(averages, torch.zeros(4), matrix, CODES)
