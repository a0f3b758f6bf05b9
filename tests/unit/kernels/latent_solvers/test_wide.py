"""Wide steps are exact where latents are standard normal, and cost their divergence."""

from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ppl_diffusion.kernels.latent_solvers import Ancestral, Wide
from ppl_diffusion.processes import Gaussian


def predict(process, y, u):
    """Return the mean of a standard normal latent given a noisy one: ``a y``."""
    return float(process.signal(u)) * y


@pytest.mark.parametrize("levels", [(1.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.9, 0.2, 0.0)])
def test_a_standard_normal_latent_stays_one(levels):
    """Variances follow from the means and deviations of the laws; those of DDPM fall short."""
    process, one = Gaussian(), torch.ones(1, 1, 1, dtype=torch.float64)
    for solver, exact in ((Wide(), True), (Ancestral(), False)):
        variance = 1.0
        for u, s in pairwise(levels):
            law = solver.law(process, one, predict(process, one, u), u, s, {})
            variance = float(law.mean) ** 2 * variance + float(law.variance)
        assert (abs(variance - 1.0) < 1e-9) == exact
        assert variance < 1.0 + 1e-9


def test_the_bound_pays_the_divergence_of_the_bridge():
    process, source = Gaussian(), torch.Generator().manual_seed(0)
    y, clean, guess = torch.randn(3, 4, 2, 3, dtype=torch.float64, generator=source)
    u = torch.linspace(0.5, 1.0, 4, dtype=torch.float64)
    found = Wide().step_kl(process, y, clean, guess, u, 0.3, {})
    mean, std = process.bridge(y, clean, u, 0.3)
    bridge = Normal(mean, std.expand_as(mean))
    law = Wide().law(process, y, guess, u, 0.3, {})
    by_hand = kl_divergence(bridge, Normal(law.mean, law.stddev)).sum((-2, -1))
    torch.testing.assert_close(found, by_hand)


def test_many_steps_are_those_of_ddpm():
    process = Gaussian()
    y, guess = torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double()
    wide, plain = (s.law(process, y, guess, 0.5, 0.4999, {}) for s in (Wide(), Ancestral()))
    torch.testing.assert_close(wide.stddev, plain.stddev, rtol=1e-3, atol=0.0)
    assert Wide() != Ancestral()
