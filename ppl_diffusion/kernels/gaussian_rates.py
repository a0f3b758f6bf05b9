"""Feynman-Kac correctors of Gaussian diffusions: drift and weight rate in continuous time.

Experts ``q_i`` with one forward process ``dx = f dt + sqrt(s2) dW`` and scores
``s_i = grad log q_i``; reverse time runs from noise to data. To follow::

    pi ~ prod_i q_i**b_i * exp(b r),   S = sum_i b_i s_i,   B = sum_i b_i

particles move with :func:`corrected_drift` and squared diffusion ``c s2`` for any ``c >= 0``, and
their log-weights grow by :func:`weight_rate`, the same for every ``c`` (Skreta et al. 2025,
arXiv:2503.02819). Exact as the step goes to zero; an Euler step of size ``dt`` leaves a bias of
order ``dt`` in the target, so that a program built on these rates says ``exact=False``.

Pure array-API functions: a weight is added to whatever else a particle's step books.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ppl_diffusion.arrays import Array, array_namespace


class RewardTilt(NamedTuple):
    """A reward at the current states, and how far it is switched on.

    :param value: ``r(x)``, ``(*batch,)``.
    :param gradient: its gradient, ``(*batch, d)``.
    :param level: ``b``, from 0 at noise to 1 at the data.
    :param level_rate: derivative of ``b`` in reverse time.
    """

    value: Array
    gradient: Array
    level: float
    level_rate: float


def corrected_drift(
    scores: Sequence[Array],
    exponents: Sequence[float],
    drift: Array,
    s2: float,
    *,
    noise: float = 1.0,
    tilt: RewardTilt | None = None,
) -> Array:
    """Return the drift of the particles in reverse time.

    ``u = -f + (1 + c)/2 s2 S + c/2 s2 b grad r``

    :param scores: ``s_i``, each ``(*batch, d)``.
    :param exponents: ``b_i``, as many.
    :param drift: forward drift ``f``, ``(*batch, d)``.
    :param s2: squared forward diffusion, per unit of time.
    :param noise: ``c``: 1 keeps the forward noise, 0 is deterministic, ``1/beta`` tempers it.
    :param tilt: the reward, or None.
    :returns: ``(*batch, d)``.
    :raises ValueError: if ``noise`` is negative.
    """
    if noise < 0:
        raise ValueError(f"corrected_drift: noise must be >= 0, got {noise}.")
    moved = -drift + (1 + noise) / 2 * s2 * _combined(scores, exponents)
    return moved if tilt is None else moved + noise / 2 * s2 * tilt.level * tilt.gradient


def weight_rate(
    scores: Sequence[Array],
    exponents: Sequence[float],
    drift: Array,
    drift_divergence: Array | float,
    s2: float,
    *,
    tilt: RewardTilt | None = None,
) -> Array:
    """Return the rate of the log-weight in reverse time.

    ``g = (B - 1) div f + s2/2 (|S|^2 - sum_i b_i |s_i|^2) + b' r + b grad r . (-f + s2 S/2)``

    :param scores: ``s_i``, each ``(*batch, d)``.
    :param exponents: ``b_i``, as many.
    :param drift: forward drift ``f``, ``(*batch, d)``.
    :param drift_divergence: ``div f``, a number or ``(*batch,)``.
    :param s2: squared forward diffusion, per unit of time.
    :param tilt: the reward, or None.
    :returns: ``(*batch,)``; exactly zero for a single expert with exponent 1 and no reward.
    """
    xp = array_namespace(scores[0])
    total = _combined(scores, exponents)
    gap = xp.sum(total * total, axis=-1)
    for score, exponent in zip(scores, exponents, strict=True):
        gap = gap - exponent * xp.sum(score * score, axis=-1)
    rate = (sum(exponents) - 1) * drift_divergence + s2 / 2 * gap
    if tilt is None:
        return rate
    along = xp.sum(tilt.gradient * (-drift + s2 / 2 * total), axis=-1)
    return rate + tilt.level_rate * tilt.value + tilt.level * along


def _combined(scores: Sequence[Array], exponents: Sequence[float]) -> Array:
    first, *rest = [b * s for b, s in zip(exponents, scores, strict=True)]
    for term in rest:
        first = first + term
    return first
