"""DEIS: Adams-Bashforth on the noise (Zhang and Chen 2023, arXiv:2204.13902).

With ``rho = b / a`` the scaled latent obeys ``d (y / a) / d rho = E``, where ``E`` is the predicted
noise. A step integrates a polynomial through the last ``E``, so that its estimate of the noise is::

    E* = sum of w_j E_{i-j},    w_j = integral of l_j over the step / its length,    sum of w_j = 1

for the Lagrange polynomials ``l_j`` in ``rho`` (rhoAB) or in time (tAB). iPNDM takes the weights of
equal steps whatever the steps are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import History, Level
from ppl_diffusion.kernels.latent_solvers.history import LEVELS, PAST, VALID, Multistep, row_levels
from ppl_diffusion.processes.gaussian import Gaussian, over_event

BASES = ("rho", "t", "ipndm")
"""Variables in which DEIS interpolates, and iPNDM."""

EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams-Bashforth weights of equal steps by order, newest first."""


@dataclass(frozen=True)
class DEIS(Multistep):
    """The deterministic multistep solver of orders 1 (:class:`DDIM`) to 4.

    The first steps, and those after a restart, have the order that their history allows.

    :param order: number of noise predictions that a step combines, ``q + 1`` for rhoAB-q.
    :param basis: ``"rho"``, ``"t"`` or ``"ipndm"``.
    :raises ValueError: if ``order`` or ``basis`` is none of these.
    """

    order: int = 3
    basis: str = "rho"

    eta = 0.0

    def __post_init__(self) -> None:
        if self.order not in range(1, len(EQUAL_STEPS) + 1):
            raise ValueError(f"DEIS: order must be 1, 2, 3 or 4, got {self.order}.")
        if self.basis not in BASES:
            raise ValueError(f"DEIS: basis must be one of {', '.join(BASES)}, got {self.basis!r}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``deis``, its basis and its order."""
        return f"deis {self.basis} {self.order}"

    def remember(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        history: History,
        restart: bool | Tensor = False,
    ) -> History:
        """Return the history with the predicted noise in front."""
        return self.push(history, _noise(process, latent, prediction, u), u, restart)

    def estimate(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> Tensor:
        """Return the clean latent that belongs to the estimate of the noise."""
        if self.order == 1:
            return prediction
        change = history[PAST] - _noise(process, latent, prediction, u).unsqueeze(-3)
        weights = self._past_weights(process, u, s, history).to(change.dtype)
        # The weights sum to one, and differences keep order 1 equal to DDIM to the last digit.
        drift = (weights[..., None, None] * change).sum(-3)
        return prediction - over_event(process.noise(u) / process.signal(u), latent) * drift

    def _past_weights(self, process: Gaussian, u: Level, s: Level, history: History) -> Tensor:
        """Return the weights of what is remembered, float64 ``(*b, order - 1)``."""
        ends = torch.stack([row_levels(s, history), row_levels(u, history)], -1)
        rows = torch.cat([ends, history[LEVELS], history[VALID].unsqueeze(-1)], -1)
        # Rows of one chain share their levels, so that few weights are computed, and once.
        kinds, which = torch.unique(rows.reshape(-1, rows.shape[-1]), dim=0, return_inverse=True)
        table = [self._weights_of(process, kind) for kind in kinds.tolist()]
        weights = torch.tensor(table, dtype=torch.float64, device=rows.device)
        return weights[which].reshape(*rows.shape[:-1], -1)

    def _weights_of(self, process: Gaussian, kind: list[float]) -> list[float]:
        valid = int(kind[-1])
        weights = noise_weights(process, self.basis, tuple(kind[: valid + 2]))
        return [*weights[1:], *[0.0] * (self.order - 1 - valid)]


@lru_cache(maxsize=4096)
def noise_weights(process: Gaussian, basis: str, levels: tuple[float, ...]) -> tuple[float, ...]:
    """Return the weights of the last noise predictions in a step, newest first; they sum to one.

    :param basis: one of :data:`BASES`.
    :param levels: the level after the step, the one before it, and those of the steps before,
        newest first: one more than there are weights.
    """
    if basis == "ipndm":
        return EQUAL_STEPS[len(levels) - 2]
    at = np.array(levels)
    rho = _rho(process, at)
    points = rho if basis == "rho" else at
    nodes = (points - points[1]) / (points[0] - points[1])  # the step runs from 0 to 1
    cardinal = [_lagrange(nodes[1:], j) for j in range(len(nodes) - 1)]
    if basis == "rho":
        return tuple(float(polynomial.integ()(1.0)) for polynomial in cardinal)
    return tuple(_by_parts(process, polynomial, at, rho) for polynomial in cardinal)


def _by_parts(process: Gaussian, polynomial: Polynomial, at: np.ndarray, rho: np.ndarray) -> float:
    """Return the mean of a polynomial in time over a step in rho, without the slope of rho."""
    nodes, weights = leggauss(64)
    x = 0.5 * (nodes + 1.0)
    done = (_rho(process, at[1] + (at[0] - at[1]) * x) - rho[1]) / (rho[0] - rho[1])
    return float(polynomial(1.0) - 0.5 * weights @ (done * polynomial.deriv()(x)))


def _lagrange(nodes: np.ndarray, j: int) -> Polynomial:
    factors = [Polynomial([-x, 1.0]) / (nodes[j] - x) for x in np.delete(nodes, j)]
    return prod(factors, start=Polynomial([1.0]))


def _rho(process: Gaussian, level: np.ndarray) -> np.ndarray:
    return np.exp(-process.log_snr(level))


def _noise(process: Gaussian, latent: Tensor, prediction: Tensor, u: Level) -> Tensor:
    signal, noise = (over_event(x, latent) for x in (process.signal(u), process.noise(u)))
    return (latent - signal * prediction) / noise
