"""Continuous latents whose denoisers are known exactly, and chains over them."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ppl_diffusion.arrays import array_namespace, to_float64
from ppl_diffusion.processes import Gaussian
from ppl_diffusion.processes.schedules import Schedule


@dataclass(frozen=True)
class LinearLogSNR(Schedule):
    """``log(a / b)`` falls linearly in time, so that equal levels are equal steps of a solver."""

    high: float = 3.0
    low: float = -3.0

    def alpha(self, t):
        t = to_float64(t)
        log_snr = self.high + (self.low - self.high) * t
        return 1.0 / (1.0 + array_namespace(t).exp(-2.0 * log_snr))

    alpha_prime = log1m_alpha = time_from_log1m = None


def log_linear(high=3.0, low=-3.0):
    """Return a process from ``lambda = low`` to ``high``, exactly."""
    return Gaussian(LinearLogSNR(high, low), t_min=0.0, squeeze=0.0)


@dataclass(frozen=True)
class Mixture:
    """``y_0`` is a mixture of normal laws in every coordinate, of which all is known."""

    process: Gaussian
    shares: tuple
    means: tuple
    variances: tuple

    def predict(self, latent, u):
        """Return ``E[y_0 | y_u]``, shaped like the latent; ``u`` is a number."""
        a, b = float(self.process.signal(u)), float(self.process.noise(u))
        m, v = (torch.tensor(x, dtype=latent.dtype) for x in (self.means, self.variances))
        spread, away = a**2 * v + b**2, latent[..., None] - a * m
        log_r = torch.log(torch.tensor(self.shares, dtype=latent.dtype))
        log_r = log_r - 0.5 * away**2 / spread - 0.5 * torch.log(spread)
        return (torch.softmax(log_r, -1) * (m + a * v * away / spread)).sum(-1)

    def density(self, y, u):
        """Return the density of ``y_u``."""
        a, b = float(self.process.signal(u)), float(self.process.noise(u))
        parts = zip(self.shares, self.means, self.variances, strict=True)
        return sum(
            w
            * torch.exp(-0.5 * (y - a * m) ** 2 / (a * a * v + b * b))
            / math.sqrt(2 * math.pi * (a * a * v + b * b))
            for w, m, v in parts
        )

    def moments(self, u):
        """Return ``E[y_u]`` and ``E[y_u^2]``."""
        a, b = float(self.process.signal(u)), float(self.process.noise(u))
        parts = list(zip(self.shares, self.means, self.variances, strict=True))
        first = sum(w * m for w, m, _ in parts)
        second = sum(w * (m * m + v) for w, m, v in parts)
        return a * first, a * a * second + b * b


def one_normal(mean=0.7, variance=0.3, **ends):
    """Return the fixture on which everything is linear."""
    return Mixture(log_linear(**ends), (1.0,), (mean,), (variance,))


def two_normals():
    """Return a fixture of two modes of unequal weight and width."""
    process = log_linear(high=2.0)
    return Mixture(process, (0.4, 0.6), (-1.0, 1.2), (0.05, 0.1))


def codes(schedule, t_min=0.1):
    """Return the two codes of a bit, -1 and 1."""
    return Mixture(Gaussian(schedule, t_min), (0.5, 0.5), (-1.0, 1.0), (0.0, 0.0))


def grid(num_steps):
    """Return the steps of a chain of equal levels, pairs (u, s)."""
    return list(pairwise(float(x) for x in np.linspace(1.0, 0.0, num_steps + 1)))


def descend(solver, problem, latent, steps, after=None):
    """Take the latent down along the mean of every step; ``after(k, latent, history)`` may act."""
    history = solver.start(latent)
    for k, (u, s) in enumerate(steps):
        clean = problem.predict(latent, solver.label(u))
        law = solver.law(problem.process, latent, clean, u, s, history)
        history = solver.remember(problem.process, latent, clean, u, history)
        latent = law.mean
        if after is not None:
            latent, history = after(k, latent, history)
    return latent


def pushed(solver, problem, y, num_steps):
    """Return where a deterministic solver takes scalars ``(n,)``."""
    return descend(solver, problem, y[:, None, None], grid(num_steps))[:, 0, 0]


def transported(solver, problem, y, density, num_steps):
    """Return the density on a fine grid ``y`` after a chain of first-order stochastic steps."""
    latent = y[:, None, None]
    for u, s in grid(num_steps):
        law = solver.law(problem.process, latent, problem.predict(latent, u), u, s, {})
        density = torch.exp(law.log_prob(y[:, None, None, None])) @ density * (y[1] - y[0])
    return density


def moment_errors(solver, problem, evaluations):
    """Return the error of E[y] + that of E[y^2] at the end of chains, by evaluations.

    The start is the exact law of the noisiest latent, so that the solver alone is judged.
    """
    y = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)
    start, found = problem.density(y, 1.0), {}
    for count in evaluations:
        if solver.stochastic:
            mass, at = transported(solver, problem, y, start, count), y
        else:
            mass, at = start, pushed(solver, problem, y, count)
        mass = mass / mass.sum()
        moments = ((at * mass).sum(), (at**2 * mass).sum())
        exact = problem.moments(0.0)
        found[count] = sum(abs(float(x) - e) for x, e in zip(moments, exact, strict=True))
    return found
