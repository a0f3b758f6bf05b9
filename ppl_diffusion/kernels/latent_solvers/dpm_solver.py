"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), in steps of ``lambda = log(a / b)``.

With ``h`` the present step in ``lambda`` and ``h'`` the one before, the estimate of the clean
latent is the prediction, extrapolated linearly to the middle of the step (2M)::

    K = D + h / (2 h') (D - D')

The deterministic and the stochastic form share the estimate and differ in ``eta``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import History, Level
from ppl_diffusion.kernels.latent_solvers.history import (
    LEVELS,
    PAST,
    TAKEN,
    VALID,
    Multistep,
    row_levels,
)
from ppl_diffusion.processes.gaussian import Gaussian, over_event

FEW_STEPS = 10
"""Chains shorter than this end with a step of order 1, as those of the official solver."""


@dataclass(frozen=True)
class DPMSolver(Multistep):
    """The multistep solver of order 1 (1S) or 2 (2M), without noise or with it.

    :param order: 1 is :class:`DDIM` without noise, and :class:`Ancestral` with it.
    :param sde: draw the noise of the forward process in every step, which has a density then.
    :param lower_final: whether the step to level 0 has order 1; None means in chains of fewer than
        :data:`FEW_STEPS` steps.
    :param projection: what is done to every estimate of the clean latent, ``(*b, N, d)`` to the
        same shape: a projection to the hull of a codebook, where latents are embeddings.
    :raises ValueError: if ``order`` is neither 1 nor 2.
    """

    order: int = 2
    sde: bool = False
    lower_final: bool | None = None
    projection: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"DPMSolver: order must be 1 or 2, got {self.order}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """``dpm-solver++``, its order, and whether it is the stochastic form."""
        return f"dpm-solver++ {self.order}{' sde' if self.sde else ''}"

    @property
    def eta(self) -> float:  # type: ignore[override]
        """1 for the stochastic form and 0 for the other."""
        return float(self.sde)

    def remember(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        history: History,
        restart: bool | Tensor = False,
    ) -> History:
        """Return the history with the prediction in front."""
        return self.push(history, prediction, u, restart)

    def estimate(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> Tensor:
        """Return the prediction in the middle of the step, projected."""
        estimate = prediction
        if self.order == 2:
            before = history[PAST][..., 0, :, :]
            ahead = over_event(self._ahead(process, u, s, history), prediction)
            estimate = prediction + ahead * (prediction - before)
        return estimate if self.projection is None else self.projection(estimate)

    def _ahead(self, process: Gaussian, u: Level, s: Level, history: History) -> Tensor:
        """Return half a step in units of the one before, per row; 0 for a step of order 1."""
        now, after = row_levels(u, history), row_levels(s, history)
        before = history[LEVELS][..., 0]
        # Predictions of one level, before and after tokens changed, have no slope in it either.
        usable = (history[VALID] > 0) & (before > now) & ~self._lowered(after, history[TAKEN])
        level, start, end = (process.log_snr(x) for x in (now, before, after))
        return torch.where(usable, 0.5 * (end - level) / (level - start), 0.0)

    def _lowered(self, after: Tensor, taken: Tensor) -> Tensor:
        lower = taken + 1 < FEW_STEPS if self.lower_final is None else self.lower_final
        return (after <= 0.0) & lower
