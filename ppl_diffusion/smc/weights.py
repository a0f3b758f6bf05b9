"""Log-weights of a particle population, the one object every run keeps right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ppl_diffusion.arrays import Array, array_namespace, to_float64


@dataclass(frozen=True)
class Weights:
    """Unnormalised log-weights, float64 ``(*runs, N)``; immutable, array-API only.

    Weights accumulate between resampling steps. ``-inf`` is a dead particle; a population of
    dead particles has evidence zero and effective sample size zero, never NaN.

    :param log: the log-weights.
    """

    log: Array

    @property
    def num_particles(self) -> int:
        """Number ``N`` of particles per run."""
        return int(self.log.shape[-1])

    def add(self, increment: Array) -> Weights:
        """Return the weights after adding log-increments; dead particles stay dead.

        :param increment: ``(*runs, N)``.
        """
        xp = array_namespace(self.log)
        dead = self.log == -math.inf
        safe = xp.where(dead, 0.0, to_float64(increment))
        return Weights(self.log + safe)

    @cached_property
    def _split(self) -> tuple[Array, Array, Array]:
        return _split_off_max(self.log)

    @cached_property
    def log_sum(self) -> Array:
        """Log of the sum of the weights, ``(*runs,)``; ``-inf`` where all are dead."""
        _, log_total, top = self._split
        return log_total + top

    @property
    def log_mean(self) -> Array:
        """Log of the mean weight, ``(*runs,)``: the evidence increment at a resampling step."""
        return self.log_sum - math.log(self.num_particles)

    @property
    def alive(self) -> Array:
        """Whether a run has any particle of positive weight, bool ``(*runs,)``."""
        return self.log_sum > -math.inf

    @cached_property
    def log_normalised(self) -> Array:
        """Log-weights that sum to one in each run; all ``-inf`` in a dead run."""
        # Not log - log_sum: next to an offset of 1e16 the log of a particle count is round-off.
        xp = array_namespace(self.log)
        scaled, log_total, _ = self._split
        total = log_total[..., None]
        return scaled - xp.where(total > -math.inf, total, 0.0)

    @cached_property
    def normalised(self) -> Array:
        """Weights that sum to one in each run; all zero in a dead run."""
        return array_namespace(self.log).exp(self.log_normalised)

    @property
    def ess(self) -> Array:
        """Effective sample size ``(sum w)^2 / sum w^2``, ``(*runs,)``; zero in a dead run."""
        xp = array_namespace(self.log)
        total = xp.sum(self.normalised**2, axis=-1)
        with np.errstate(divide="ignore"):
            return xp.where(total > 0, 1 / total, total)


def log_base(weights: Weights, log_z: Array, twist: Array) -> Array:
    """Return the log of the weights with all twists taken off again; their mean is one.

    :param log_z: log of the product of the mean weights at resamplings so far, ``(*runs,)``.
    :param twist: the twists that the particles carry, ``(*runs, N)``.
    """
    base = log_z[..., None] + weights.log - twist
    return array_namespace(base).where(weights.log == -math.inf, -math.inf, base)


def log_sum_exp(x: Array) -> Array:
    """Return ``log sum exp`` over the last axis; ``-inf`` rows give ``-inf``, not NaN.

    :param x: float array ``(..., N)``.
    """
    _, log_total, top = _split_off_max(x)
    return log_total + top


def _split_off_max(x: Array) -> tuple[Array, Array, Array]:
    """Return ``x - top``, the log of the sum of its exponentials, and the finite maxima ``top``."""
    xp = array_namespace(x)
    largest = xp.max(x, axis=-1, keepdims=True)
    top = xp.where(largest > -math.inf, largest, 0.0)
    scaled = x - top
    with np.errstate(divide="ignore"):  # the log of nothing is -inf, which only NumPy complains of
        return scaled, xp.log(xp.sum(xp.exp(scaled), axis=-1)), top[..., 0]
