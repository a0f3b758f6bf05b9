"""How ``kappa`` of a Psi-posterior may be chosen: rules per step, and the room below zero.

A *rule* maps the signal levels ``(a, b)`` and the times ``t`` of the steps to ``kappa``. Most are
rules for ``sigma = (1 - kappa)(1 - b)``, the probability that the absorbing process masks a
revealed token again: ReMDM (Wang et al. 2025, arXiv:2503.00307), forward-backward (Campbell et al.
2022, arXiv:2205.14987) and the corrector of discrete flow matching (Gat et al. 2024,
arXiv:2407.15595).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ppl_diffusion.processes.base import Process

_ROUND_OFF = 1e-12

KappaRule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""``(a, b, t) -> kappa``: signal before and after each step, and the time it starts from."""


def kappa_room(process: Process, alphas: np.ndarray) -> np.ndarray:
    """Return the smallest ``kappa`` for which every step is a distribution, whatever the denoiser.

    Multiplied by ``D = a c_z + (1 - a) pi_z`` the probability of each move is linear in ``c_z``,
    so it is enough to look at ``c_z = 0`` and ``c_z = 1``. Moves to another state never become
    negative for ``kappa <= 1``; staying at ``z`` does below::

        c_z = 0:   -(1 - a) pi_z / [r (1 - pi_z) + a pi_z]
        c_z = 1:   -[a + (1 - a) pi_z] / [(r - a)(1 - pi_z)]
        pi_z = 0:  -b / (1 - b)                     (a revealed token of the absorbing process)

    with ``r = a / b``. At ``b = 1`` the kernel does not depend on ``kappa``.

    :param process: forward process; every state of it counts.
    :param alphas: signal levels of the grid, ``(T + 1,)``.
    :returns: float64 ``(T,)``, never positive, ``-inf`` where any ``kappa`` will do.
    """
    a, b = (x[:, None] for x in (np.asarray(alphas[:-1]), np.asarray(alphas[1:])))
    pi, clean = np.asarray(process.prior), np.arange(process.num_states) < process.vocab_size
    r = np.divide(a, b, out=np.ones_like(a), where=b > 0)
    absent = _lowest((1 - a) * pi, r * (1 - pi) + a * pi)
    certain = np.where(clean, _lowest(a + (1 - a) * pi, (r - a) * (1 - pi)), -np.inf)
    frozen = np.broadcast_to(_lowest(b, 1 - b), absent.shape)
    room = np.where(pi > 0, np.maximum(absent, certain), frozen)
    return np.where(b[:, 0] >= 1, -np.inf, room.max(-1))


def _lowest(slack: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the ``kappa`` from which on ``slack + kappa slope >= 0``."""
    slack, slope = np.broadcast_arrays(slack, slope)
    return -np.divide(slack, slope, out=np.full(slack.shape, np.inf), where=slope > 0)


def check_kappa(kappa: Any, alphas: np.ndarray, process: Process) -> np.ndarray:
    """Return ``kappa`` of every step, float64 ``(T,)`` or ``(T, L)``.

    :param kappa: one number, one per step, or one per step and site.
    :param alphas: signal levels of the grid, ``(T + 1,)``.
    :raises ValueError: if it has another shape, or makes a probability negative.
    """
    steps = len(alphas) - 1
    given = np.asarray(kappa, dtype=np.float64)
    if given.ndim > 2 or (given.ndim > 0 and given.shape[0] != steps) or 0 in given.shape:
        raise ValueError(
            "InterpolatingKernel: kappa must be one number, one per step or one per step and "
            f"site, for {steps} steps, got shape {given.shape}."
        )
    values = np.broadcast_to(given, (steps,)).copy() if given.ndim == 0 else given.copy()
    if not np.all(np.isfinite(values)) or values.max() > 1:
        raise ValueError("InterpolatingKernel: kappa must be finite and at most 1.")
    lowest = values.reshape(steps, -1).min(1)
    bad = np.flatnonzero(lowest < np.minimum(kappa_room(process, alphas), 0) - _ROUND_OFF)
    if bad.size:
        raise ValueError(
            f"InterpolatingKernel: kappa = {lowest[bad[0]]} at step {bad[0]} makes a probability "
            "negative; raise it."
        )
    return values


def fixed(kappa: float) -> KappaRule:
    """Return the rule of one ``kappa`` for every step: 1 "pure posterior", 0 "pure corrector".

    :param kappa: the value, at most 1.
    """
    return lambda a, b, t: np.full(a.shape, float(kappa))


def remasking(sigma: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> KappaRule:
    """Return the rule ``kappa = 1 - sigma / (1 - b)`` of a remasking probability.

    :param sigma: ``(a, b, t) -> sigma`` per step. Never used where ``b = 1``: nothing can be
        masked in the last step.
    """

    def rule(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
        noise = np.where(b < 1, 1 - b, 1.0)
        return np.where(b < 1, 1 - sigma(a, b, t) / noise, 1.0)

    return rule


def constant_eta(eta: float) -> KappaRule:
    """Return the rule ``sigma = eta``.

    :param eta: remasking probability in ``[0, 1]``.
    """
    eta = fraction(eta, "eta")
    return remasking(lambda a, b, t: np.full(a.shape, eta))


def capped(eta: float) -> KappaRule:
    """Return the rule ``sigma = min(eta, (1 - b) / a)`` (ReMDM-cap).

    :param eta: remasking probability in ``[0, 1]``.
    """
    eta = fraction(eta, "eta")
    return remasking(lambda a, b, t: np.minimum(eta, most_remasking(a, b)))


def rescaled(eta: float) -> KappaRule:
    """Return the rule ``sigma = eta min(1, (1 - b) / a)`` (ReMDM-rescale).

    :param eta: factor in ``[0, 1]``.
    """
    eta = fraction(eta, "eta")
    return remasking(lambda a, b, t: eta * most_remasking(a, b))


def rescaled_duo(eta: float) -> KappaRule:
    """Return the rule ``sigma = eta min(eta, (1 - b) / a)`` with ``kappa`` clipped to ``[0, 1]``.

    This is what the published code of Duo computes under the name "rescale": about ``eta`` times
    the corrections of :func:`rescaled`.

    :param eta: factor in ``[0, 1]``.
    """
    eta = fraction(eta, "eta")
    rule = remasking(lambda a, b, t: eta * np.minimum(eta, most_remasking(a, b)))
    return lambda a, b, t: np.clip(rule(a, b, t), 0.0, 1.0)


def backward(weight: float | None = 1.0) -> KappaRule:
    """Return the rule ``sigma = w (b - a) / a``: forward moves weigh ``1 + w``, backward ``w``.

    The remasking is capped where a probability would leave ``[0, 1]``, and is zero while
    ``a = 0``, where nothing is revealed yet.

    :param weight: ``w >= 0``; None is ``10 (t (1 - t))^(1/4)``, what ReMDM's code compares with.
    """
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number >= 0, got {weight}.")

    def sigma(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
        w = 10.0 * (t * (1 - t)) ** 0.25 if weight is None else np.full(a.shape, weight)
        asked = w * (b - a) / np.where(a > 0, a, 1.0)
        return np.where(a > 0, np.minimum(asked, most_remasking(a, b)), 0.0)

    return remasking(sigma)


def most_remasking(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``min(1, (1 - b) / a)``, the largest remasking probability that leaves a marginal.

    :param a: signal level before the step.
    :param b: signal level after it.
    """
    return np.minimum(1.0, np.divide(1 - b, a, out=np.ones_like(a), where=a > 0))


def fraction(value: float, name: str) -> float:
    """Return a number of ``[0, 1]``.

    :raises ValueError: if it lies outside.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    return float(value)
