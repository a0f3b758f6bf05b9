"""What multistep solvers remember: the last predictions of every row, newest first."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import History, LatentSolver, Level
from ppl_diffusion.processes.gaussian import EVENT_DIMS

PAST = "past"
"""Values that were remembered, ``(*b, q, N, d)``."""

LEVELS = "levels"
"""Levels at which they were made, float64 ``(*b, q)``."""

VALID = "valid"
"""How many of them the next step may use, int64 ``(*b,)``."""

TAKEN = "taken"
"""Steps that were taken since the start, int64 ``(*b,)``."""


class Multistep(LatentSolver):
    """A solver that looks back ``order - 1`` steps."""

    def start(self, latent: Tensor) -> History:
        """Return an empty history; a solver of order 1 remembers nothing."""
        if self.order == 1:
            return {}
        batch, size = latent.shape[: latent.ndim - EVENT_DIMS], self.order - 1
        none = torch.zeros(batch, dtype=torch.int64, device=latent.device)
        return {
            PAST: latent.new_zeros((*batch, size, *latent.shape[-EVENT_DIMS:])),
            LEVELS: torch.ones((*batch, size), dtype=torch.float64, device=latent.device),
            VALID: none,
            TAKEN: none.clone(),
        }

    def forget(self, history: History, rows: bool | Tensor = True) -> History:
        """Return a history of which the next step uses nothing, in some rows."""
        if not history:
            return history
        rows = torch.as_tensor(rows, device=history[VALID].device)
        return {**history, VALID: torch.where(rows, 0, history[VALID])}

    def push(self, history: History, value: Tensor, u: Level, restart: bool | Tensor) -> History:
        """Return the history with a value that was made at level ``u`` in front."""
        if not history:
            return history
        past, levels = history[PAST], history[LEVELS]
        newest = row_levels(u, history)
        pushed = {
            PAST: torch.cat([value.to(past.dtype).unsqueeze(-3), past[..., :-1, :, :]], -3),
            LEVELS: torch.cat([newest.unsqueeze(-1), levels[..., :-1]], -1),
            VALID: (history[VALID] + 1).clamp_max(self.order - 1),
            TAKEN: history[TAKEN] + 1,
        }
        return self.forget(pushed, restart)


def row_levels(u: Level, history: History) -> Tensor:
    """Return a level as one per row, float64 ``(*b,)``."""
    like = history[LEVELS]
    return torch.as_tensor(u, dtype=like.dtype, device=like.device).expand(like.shape[:-1])
