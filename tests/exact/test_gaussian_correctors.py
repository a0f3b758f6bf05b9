"""Gaussian correctors as particles on the one engine, against Gaussian integrals.

Forward process ``dx = -x dt + sqrt(2) dW``; everything stays Gaussian, so that means, variances
and normalising constants are known. Euler steps leave a bias of order ``dt``; tolerances are that
bias plus four standard errors of 20 runs of 1000 particles (false alarm 6e-5 per number).
"""

import math

import pytest
import torch

from ppl_diffusion.kernels.gaussian_rates import RewardTilt, corrected_drift, weight_rate
from ppl_diffusion.smc import RESAMPLERS, smc_loop
from ppl_diffusion.smc.feynman_kac import take_particles

END, S2 = 1.5, 2.0
GRID = torch.linspace(-15, 15, 6001, dtype=torch.float64)


class GaussianEngine:
    """Experts ``N(mean, variance)`` at the data, with exponents and a linear reward ``slope x``."""

    def __init__(self, experts, exponents, *, slope=0.0, noise=1.0, num_steps=300):
        self.experts, self.exponents = experts, exponents
        self.slope, self.noise, self.num_steps = slope, noise, num_steps

    def moments(self, tau):
        shrink = math.exp(-(END - tau))
        return [(m * shrink, v * shrink**2 + 1 - shrink**2) for m, v in self.experts]

    def composed(self, tau):
        """Return precision and linear coefficient of ``prod_i q_i**b_i``."""
        pairs = list(zip(self.moments(tau), self.exponents, strict=True))
        return sum(b / v for (_, v), b in pairs), sum(b * m / v for (m, v), b in pairs)

    def log_mass(self, tau, slope=0.0):
        total = slope * GRID
        for (m, v), b in zip(self.moments(tau), self.exponents, strict=True):
            total = total + b * (-((GRID - m) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v))
        return float(torch.logsumexp(total, 0) + (GRID[1] - GRID[0]).log())

    @property
    def log_z(self):
        return self.log_mass(END, self.slope) - self.log_mass(0.0)

    def init(self, runs, particles, generator):
        precision, linear = self.composed(0.0)
        noise = torch.randn(runs, particles, dtype=torch.float64, generator=generator)
        return {"x": linear / precision + noise / math.sqrt(precision)}

    def move(self, carry, k, generator):
        x, dt, tau = carry["x"], END / self.num_steps, k * END / self.num_steps
        scores = [-(x - m)[..., None] / v for m, v in self.moments(tau)]
        drift = -x[..., None]
        reward = self.slope * x
        level = tau / END
        tilt = RewardTilt(reward, torch.full_like(drift, self.slope), level, 1 / END)
        tilt = tilt if self.slope else None
        u = corrected_drift(scores, self.exponents, drift, S2, noise=self.noise, tilt=tilt)
        g = weight_rate(scores, self.exponents, drift, -1.0, S2, tilt=tilt)
        noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        return {"x": x + u[..., 0] * dt + math.sqrt(self.noise * S2 * dt) * noise}, g * dt

    def log_twist(self, carry, k, generator):
        return None

    def gather(self, carry, ancestors):
        return {name: take_particles(value, ancestors) for name, value in carry.items()}


def run(engine, seed=0):
    """Return ``Z_hat / Z`` per run, and the mean and variance of the weighted particles."""
    generator = torch.Generator().manual_seed(seed)
    trace = smc_loop(engine, engine.num_steps, 1000, 20, RESAMPLERS["systematic"], 0.5, generator)
    w, x = trace.weights.normalised / 20, trace.carry["x"]
    mean = (w * x).sum()
    return (trace.log_evidence_steps[:, -1] - engine.log_z).exp(), mean, (w * (x - mean) ** 2).sum()


CASES = {
    "anneal": (([(0.5, 0.5)], [2.0]), {}, (0.5, 0.25)),  # T2.2: variance v / beta
    "tempered": (([(0.5, 0.5)], [1.5]), {"noise": 2 / 3}, (0.5, 1 / 3)),
    "flatten": (([(0.5, 0.5)], [0.5]), {}, (0.5, 1.0)),
    "product": (([(1.0, 0.5), (-0.5, 1.5)], [1.0, 1.0]), {}, (0.625, 0.375)),  # T2.5
    "guided": (([(1.0, 0.5), (0.0, 1.0)], [2.0, -1.0]), {}, (4 / 3, 1 / 3)),
    "reward": (([(0.5, 0.5)], [1.0]), {"slope": 0.8}, (0.9, 0.5)),  # T2.6: shifted by slope * v
}


@pytest.mark.parametrize("case", CASES)
def test_moments_and_normalising_constant(case):
    arguments, options, (mean, variance) = CASES[case]
    ratio, found_mean, found_variance = run(GaussianEngine(*arguments, **options))
    assert float(found_mean) == pytest.approx(mean, abs=0.06)
    assert float(found_variance) == pytest.approx(variance, abs=0.06)
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.03


def test_a_linear_reward_has_the_moment_generating_function_as_its_constant():
    """T2.6: ``E[exp(a x)] = exp(a m + a^2 v / 2)``."""
    engine = GaussianEngine([(0.5, 0.5)], [1.0], slope=0.8)
    assert engine.log_z == pytest.approx(0.8 * 0.5 + 0.8**2 * 0.5 / 2, abs=1e-6)


def test_without_weights_the_law_is_another():
    """The failing twin: the annealed drift alone."""
    engine = GaussianEngine([(1.0, 0.5), (-0.5, 1.5)], [1.0, 1.0])
    trace = smc_loop(engine, 300, 500, 20, RESAMPLERS["systematic"], 0.0, None)
    assert abs(float(trace.carry["x"].mean()) - 0.625) > 0.1


def test_smaller_steps_are_nearer():
    """T2.7: the bias of ``Z_hat`` falls with ``dt`` (12 % and then below the noise of 1 %)."""
    gaps = [
        abs(float(run(GaussianEngine([(0.5, 0.5)], [1.5], num_steps=num_steps))[0].mean()) - 1)
        for num_steps in (15, 120)
    ]
    assert gaps[1] < gaps[0] / 2
