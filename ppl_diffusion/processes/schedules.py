"""Signal schedules: how much of a clean token survives at time ``t``.

``alpha(t)`` is the probability that a token is still clean: one at ``t = 0`` and zero at
``t = 1``, both exactly. Everything is float64. The inverse takes ``log(1 - alpha)``, because
``1 - alpha`` is what becomes small where resolution matters (first-hitting times, t -> 0).
Sources: MDLM (Sahoo et al. 2024, arXiv:2406.07524) for the log-linear form, Nichol and Dhariwal
(2021, arXiv:2102.09672) and MDLM's code for the cosine.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from ppl_diffusion.arrays import Array, array_namespace, to_float64


@dataclass(frozen=True)
class Schedule(ABC):
    """A decreasing signal level on ``[0, 1]`` with ``alpha(0) = 1`` and ``alpha(1) = 0``."""

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Return the signal level.

        :param t: times in ``[0, 1]``, a number or an array of any shape.
        :returns: float64, shaped like ``t``.
        """

    @abstractmethod
    def alpha_prime(self, t: Array) -> Array:
        """Return d alpha / d t (never positive), float64, shaped like ``t``.

        :param t: times in ``[0, 1]``.
        """

    @abstractmethod
    def log1m_alpha(self, t: Array) -> Array:
        """Return ``log(1 - alpha(t))`` without cancellation; ``-inf`` at ``t = 0``.

        :param t: times in ``[0, 1]``.
        """

    @abstractmethod
    def time_from_log1m(self, y: Array) -> Array:
        """Return the time at which ``log(1 - alpha) = y``.

        :param y: log noise levels, ``-inf`` to 0.
        """


@dataclass(frozen=True)
class Linear(Schedule):
    """``alpha(t) = 1 - t``."""

    def alpha(self, t: Array) -> Array:
        """Return ``1 - t``."""
        return 1.0 - to_float64(t)

    def alpha_prime(self, t: Array) -> Array:
        """Return -1."""
        return 0.0 * to_float64(t) - 1.0

    def log1m_alpha(self, t: Array) -> Array:
        """Return ``log t``."""
        return _log(to_float64(t))

    def time_from_log1m(self, y: Array) -> Array:
        """Return ``exp(y)``."""
        return _clip_unit(_exp(to_float64(y)))


@dataclass(frozen=True)
class LogLinear(Schedule):
    """``alpha(t) = 1 - (1 - eps) t`` for ``t < 1``, and 0 at ``t = 1``.

    The published schedule leaves ``alpha(1) = eps`` although its chain starts from pure noise.
    Here the end is pinned, so the first reverse step carries the last ``eps`` of signal. The
    continuous-time integrand of :func:`~ppl_diffusion.processes.nelbo_terms` does not see that
    jump; :func:`~ppl_diffusion.processes.step_kl` from ``a = 0`` to ``b = eps`` is what it adds.

    :param eps: signal level just before ``t = 1``, in ``[0, 1)``.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"LogLinear: eps must lie in [0, 1), got {self.eps}.")

    def alpha(self, t: Array) -> Array:
        """Return the signal level, with the end pinned at zero."""
        t = to_float64(t)
        return _where(t >= 1.0, 0.0 * t, 1.0 - (1.0 - self.eps) * t)

    def alpha_prime(self, t: Array) -> Array:
        """Return ``-(1 - eps)``."""
        return 0.0 * to_float64(t) - (1.0 - self.eps)

    def log1m_alpha(self, t: Array) -> Array:
        """Return ``log((1 - eps) t)``, and 0 at ``t = 1``."""
        t = to_float64(t)
        return _where(t >= 1.0, 0.0 * t, _log(t) + math.log1p(-self.eps))

    def time_from_log1m(self, y: Array) -> Array:
        """Return ``exp(y) / (1 - eps)``, at most 1."""
        return _clip_unit(_exp(to_float64(y) - math.log1p(-self.eps)))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``alpha(t) = 1 - t ** power``: tokens are kept longer than linearly, then lost faster.

    :param power: exponent, at least 1 (:class:`Linear`); below 1 the slope at ``t = 0`` would be
        infinite. LADD (arXiv:2510.18114) has 2 for the codes of its latents.
    :raises ValueError: if ``power`` is less than 1 or infinite.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.power < math.inf:
            raise ValueError(f"Polynomial: power must lie in [1, inf), got {self.power}.")

    def alpha(self, t: Array) -> Array:
        """Return ``1 - t ** power``."""
        return 1.0 - to_float64(t) ** self.power

    def alpha_prime(self, t: Array) -> Array:
        """Return ``-power t ** (power - 1)``."""
        return -self.power * to_float64(t) ** (self.power - 1.0)

    def log1m_alpha(self, t: Array) -> Array:
        """Return ``power log t``."""
        return self.power * _log(to_float64(t))

    def time_from_log1m(self, y: Array) -> Array:
        """Return ``exp(y / power)``."""
        return _clip_unit(_exp(to_float64(y) / self.power))


@dataclass(frozen=True)
class Cosine(Schedule):
    """``alpha(t) = 1 - cos(pi/2 (1 - t)) = 1 - sin(pi t / 2)``."""

    def alpha(self, t: Array) -> Array:
        """Return ``2 sin^2(pi (1 - t) / 4)``, the form without cancellation near ``t = 1``."""
        t = to_float64(t)
        xp = array_namespace(t)
        return _where(t <= 0.0, 0.0 * t + 1.0, 2.0 * xp.sin(math.pi / 4 * (1.0 - t)) ** 2)

    def alpha_prime(self, t: Array) -> Array:
        """Return ``-(pi/2) cos(pi t / 2)``, written as a sine so that it is 0 at ``t = 1``."""
        t = to_float64(t)
        return -math.pi / 2 * array_namespace(t).sin(math.pi / 2 * (1.0 - t))

    def log1m_alpha(self, t: Array) -> Array:
        """Return ``log sin(pi t / 2)``."""
        t = to_float64(t)
        return _log(array_namespace(t).sin(math.pi / 2 * t))

    def time_from_log1m(self, y: Array) -> Array:
        """Return ``(2/pi) arcsin(exp(y))``."""
        u = _clip_unit(_exp(to_float64(y)))
        return 2.0 / math.pi * array_namespace(u).asin(u)


def _log(x: Array) -> Array:
    """Return ``log x`` with ``log 0 = -inf`` and no warning."""
    xp = array_namespace(x)
    return _where(x > 0.0, xp.log(_where(x > 0.0, x, 0.0 * x + 1.0)), 0.0 * x - math.inf)


def _exp(x: Array) -> Array:
    return array_namespace(x).exp(x)


def _clip_unit(x: Array) -> Array:
    return _where(x > 1.0, 0.0 * x + 1.0, x)


def _where(condition: Array, x: Array, y: Array) -> Array:
    return array_namespace(x).where(condition, x, y)
