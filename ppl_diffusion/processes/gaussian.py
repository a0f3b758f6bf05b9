"""The Gaussian forward process of a continuous latent, on the levels of a path.

A level ``u`` in ``[0, 1]`` is the time ``t = t_min + (1 - t_min) u``, at which the latent is::

    y_u = a(u) y_0 + b(u) eps,        a^2 + b^2 = 1,        g = a^2 / b^2

The chain ends at level 0, that is at ``y_{t_min}``, which is noisy still; the clean latent ``y_0``
is no variable of the model. With a deterministic encoder its density would be infinite, and with
one of a fixed width the bound diverges as the grid is refined: the last but one variable says more
about ``y_0`` than a kernel of that width can use. Without it the bound is finite and strict::

    KL(q(y_1 | y_0) || N(0, I)) + sum of 0.5 (g(s) - g(u)) ||y_0 - prediction||^2

Sources: LADD (arXiv:2510.18114) for the schedules, DDIM (Song et al. 2021, arXiv:2010.02502, eq. 7)
for the family of bridges, DDPM (Ho et al. 2020, arXiv:2006.11239) for its member ``eta = 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ppl_diffusion.arrays import Array, array_namespace, to_float64
from ppl_diffusion.processes.schedules import Schedule

EVENT_DIMS = 2
"""A latent has slots and coordinates; what stands before them is the batch."""


class Bridge(NamedTuple):
    """A Gaussian step from level ``u`` to ``s``: ``keep y_u + pull y_0 + std eps``.

    :ivar keep: factor of the present latent.
    :ivar pull: factor of the clean one, or of what is predicted in its place.
    :ivar std: standard deviation, 0 for a deterministic step.
    """

    keep: Array
    pull: Array
    std: Array


@dataclass(frozen=True)
class Gaussian:
    """Signal and noise of a continuous latent; all methods take levels, numbers or one per row.

    :param schedule: squared signal ``a^2`` as a function of time: ``"sqrt"`` (``sqrt(1 - t)``, the
        published one), ``"linear"``, ``"cosine"`` (Nichol and Dhariwal 2021), or a
        :class:`~ppl_diffusion.processes.Schedule`.
    :param t_min: time at which the chain ends, in ``[0, 1)``.
    :param squeeze: ``a^2`` is moved into ``[squeeze, 1 - squeeze]``. With ``a = 0`` the log of the
        signal-to-noise ratio, in which solvers count their steps, would be infinite at the start
        and nothing could be said about ``y_0`` from the noise; with ``b = 0`` the last step would
        have no density. The bound pays for the signal that is left at level 1: :meth:`prior_kl`.
    :raises ValueError: if the schedule is unknown or a number is out of its range.
    """

    schedule: str | Schedule = "sqrt"
    t_min: float = 0.1
    squeeze: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SQUARED_SIGNALS:
            known = ", ".join(SQUARED_SIGNALS)
            raise ValueError(f"Gaussian: schedule must be one of {known}, got {self.schedule!r}.")
        if not 0.0 <= self.t_min < 1.0:
            raise ValueError(f"Gaussian: t_min must lie in [0, 1), got {self.t_min}.")
        if not 0.0 <= self.squeeze < 0.5:
            raise ValueError(f"Gaussian: squeeze must lie in [0, 0.5), got {self.squeeze}.")

    def time(self, u: Array) -> Array:
        """Return the time of a level, ``t_min`` at 0 and exactly 1 at 1."""
        return 1.0 - (1.0 - self.t_min) * (1.0 - to_float64(u))

    def squared_signal(self, u: Array) -> Array:
        """Return ``a(u)^2``, float64, shaped like ``u``."""
        t, schedule = self.time(u), self.schedule
        raw = SQUARED_SIGNALS[schedule](t) if isinstance(schedule, str) else schedule.alpha(t)
        return self.squeeze + (1.0 - 2.0 * self.squeeze) * raw

    def signal(self, u: Array) -> Array:
        """Return ``a(u)``."""
        squared = self.squared_signal(u)
        return array_namespace(squared).sqrt(squared)

    def noise(self, u: Array) -> Array:
        """Return ``b(u)``."""
        squared = self.squared_signal(u)
        return array_namespace(squared).sqrt(1.0 - squared)

    def snr(self, u: Array) -> Array:
        """Return the signal-to-noise ratio ``g(u) = a^2 / b^2``, which falls in ``u``."""
        squared = self.squared_signal(u)
        return squared / (1.0 - squared)

    def log_snr(self, u: Array) -> Array:
        """Return ``lambda(u) = log(a / b)``, half the log of :meth:`snr`."""
        squared = self.squared_signal(u)
        xp = array_namespace(squared)
        return 0.5 * (xp.log(squared) - xp.log1p(-squared))

    def level_of(self, log_snr: Array) -> np.ndarray:
        """Return the levels at which ``lambda`` has given values: the inverse of :meth:`log_snr`.

        Steps of equal size in ``lambda`` suit solvers of higher order.

        :param log_snr: values, any shape; beyond the ends of the process the ends are returned.
        """
        wanted = np.asarray(log_snr, dtype=np.float64)
        low, high = np.zeros_like(wanted), np.ones_like(wanted)
        for _ in range(60):  # bisection to the last digit: schedules have no common closed form
            middle = 0.5 * (low + high)
            cleaner = np.asarray(self.log_snr(middle)) > wanted
            low, high = np.where(cleaner, middle, low), np.where(cleaner, high, middle)
        return 0.5 * (low + high)

    def corrupt(self, clean: Array, u: Array, eps: Array) -> Array:
        """Return ``y_u = a(u) y_0 + b(u) eps``.

        :param clean: ``y_0``, float ``(*b, N, d)``.
        :param u: a level, or one per row ``(*b,)``.
        :param eps: standard normal noise, shaped like ``clean``.
        """
        return over_event(self.signal(u), clean) * clean + over_event(self.noise(u), clean) * eps

    def step(self, u: Array, s: Array, eta: float = 1.0) -> Bridge:
        """Return the factors of a step; every ``eta`` has the marginals of the process.

        :param u: level before the step.
        :param s: lower level after it.
        :param eta: noise of the step: 1 is that of the Markov process (DDPM), 0 none (DDIM).
        """
        h = self.log_snr(s) - self.log_snr(u)
        xp = array_namespace(h)
        fresh = -xp.expm1(-2.0 * h)
        stay = xp.sqrt(1.0 - eta**2 * fresh)  # share of the noise at s that was there at u
        keep = stay * self.noise(s) / self.noise(u)
        pull = self.signal(s) * (1.0 - stay * xp.exp(-h))
        return Bridge(keep, pull, eta * self.noise(s) * xp.sqrt(fresh))

    def bridge(
        self, latent: Array, clean: Array, u: Array, s: Array, eta: float = 1.0
    ) -> tuple[Array, Array]:
        """Return mean and standard deviation of ``y_s`` given ``y_u`` and ``y_0``.

        :param latent: ``y_u``, float ``(*b, N, d)``.
        :param clean: ``y_0``, or a prediction in its place: the step of the model.
        :param u: level of ``latent``, a number or ``(*b,)``.
        :param s: lower level.
        :param eta: as in :meth:`step`; 1 is the exact posterior of the Markov process.
        :returns: the mean, shaped like ``latent``, and the deviation, a number or ``(*b, 1, 1)``.
        """
        keep, pull, std = (over_event(x, latent) for x in self.step(u, s, eta))
        return keep * latent + pull * clean, std

    def kl_weight(self, u: Array, s: Array, eta: float = 1.0) -> Array:
        """Return what a unit of squared error costs: KL of the bridge to the step of the model.

        It is ``0.5 (g(s) - g(u))`` for ``eta = 1`` and infinite for 0, a step without a density.

        :param u: level before the step.
        :param s: level after it.
        """
        if eta == 1.0:
            return 0.5 * (self.snr(s) - self.snr(u))
        step = self.step(u, s, eta)
        return 0.5 * (step.pull / step.std) ** 2 if eta else 0.0 * step.pull + np.inf

    def prior_kl(self, clean: Array) -> Array:
        """Return KL(q(y_1 | y_0) || N(0, I)), summed over slots and coordinates, ``(*b,)``.

        :param clean: ``y_0``, float ``(*b, N, d)``.
        """
        squared = float(self.squared_signal(1.0))
        each = squared * clean**2 - squared - np.log1p(-squared)
        return 0.5 * _sum_event(each)

    def step_kl(
        self, clean: Array, prediction: Array, u: Array, s: Array, eta: float = 1.0
    ) -> Array:
        """Return the term of one step in the bound, ``(*b,)``.

        :param clean: ``y_0``, float ``(*b, N, d)``.
        :param prediction: what the model predicts for it at level ``u``, same shape.
        :param u: level before the step, a number or ``(*b,)``.
        :param s: level after it.
        """
        error = _sum_event((clean - prediction) ** 2)
        return _like(self.kl_weight(u, s, eta), error) * error


def gaussian_bound_terms(
    process: Gaussian, levels: Sequence[float], clean: Array, predictions: Sequence[Array]
) -> Array:
    """Return the terms of the strict bound on ``-log p(y_{t_min})``, up to the encoder's entropy.

    Averaged over draws of the forward process at the levels, their sum bounds the divergence of
    the chain at level 0 from ``q(y_{t_min} | y_0)``.

    :param levels: ``T + 1`` levels, from 1 to 0.
    :param clean: ``y_0``, float ``(*b, N, d)``.
    :param predictions: ``T`` predictions of it, made at all levels but the last.
    :returns: ``(*b, T + 1)``, first :meth:`Gaussian.prior_kl`, then one per step.
    :raises ValueError: if there are not as many predictions as steps.
    """
    pairs = list(pairwise(levels))
    if len(predictions) != len(pairs):
        raise ValueError(
            f"gaussian_bound_terms: {len(pairs)} steps need as many predictions, "
            f"got {len(predictions)}."
        )
    steps = [
        process.step_kl(clean, prediction, u, s)
        for prediction, (u, s) in zip(predictions, pairs, strict=True)
    ]
    return array_namespace(clean).stack([process.prior_kl(clean), *steps], axis=-1)


def over_event(level: Array, latent: Array) -> Array:
    """Return numbers of rows so that they multiply latents, in the precision of the latents.

    :param level: a number, or ``(*b,)``.
    :param latent: ``(*b, N, d)``.
    :returns: a number, or ``(*b, 1, 1)``.
    """
    level = _like(level, latent)
    return level[..., None, None] if getattr(level, "ndim", 0) else level


def _like(number: Array, array: Array) -> Array:
    """Return a number that leaves the precision of an array alone, or numbers cast to it."""
    if isinstance(number, float | np.generic) or (
        isinstance(number, np.ndarray) and not number.ndim
    ):
        return float(number)
    return array_namespace(array).astype(number, array.dtype, copy=False)


def _sum_event(array: Array) -> Array:
    return array_namespace(array).sum(array, axis=(-2, -1))


def _sqrt(t: Array) -> Array:
    return array_namespace(t).sqrt(1.0 - t)


def _linear(t: Array) -> Array:
    return 1.0 - t


def _cosine(t: Array) -> Array:
    offset = 0.008  # without it the signal would hardly change near t = 0
    scale = 0.5 * np.pi / (1.0 + offset)
    return (array_namespace(t).cos(scale * (t + offset)) / np.cos(scale * offset)) ** 2


SQUARED_SIGNALS: dict[str, Callable[[Array], Array]] = {
    "sqrt": _sqrt,
    "linear": _linear,
    "cosine": _cosine,
}
"""Squared signals ``a^2`` by the name of their schedule, as functions of time."""
