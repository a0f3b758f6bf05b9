"""Paths of masked chains as tables: which token each position gets, and at which step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.kernels.base import SAMPLE_ONLY
from ppl_diffusion.kernels.events import predict_at
from ppl_diffusion.kernels.masked_paths import flat_given, flat_paths, read_reveals
from ppl_diffusion.smc.path_state import PathModel, PathState


def reveals_alone(chain: ReverseChain) -> bool:
    """Return whether a path of a chain is its clean sequence and when each position was revealed.

    These moments are then random, independent of the network, and positions may trade them.
    """
    kernel = chain.kernel
    if type(kernel) is OrderedKernel:
        return kernel.capability != SAMPLE_ONLY
    # A subclass may let the network decide what is revealed.
    plain = type(kernel) is InterpolatingKernel
    return plain and kernel.process.absorbing and kernel.ancestral  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RevealTable:
    """Paths, one row for each particle and plate element.

    :param model: chain and potential.
    :param shape: ``(R, N, *plates)``; ``B`` is its size.
    :param x0: clean tokens, int64 ``(B, L)``.
    :param step_of: the step that reveals each position, int64 ``(B, L)``, -1 for the prompt.
    :param log_c: log-probability of each reveal, float64 ``(B, L)``, NaN where unknown.
    """

    model: PathModel
    shape: torch.Size
    x0: Tensor
    step_of: Tensor
    log_c: Tensor
    given: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: PathModel, state: PathState) -> RevealTable:
        """Read the paths of a state."""
        chain, shape = model.chain, state.path.shape[:-2]
        rows, prompts = flat_paths(state.path, chain.prompt)
        process = chain.kernel.process
        shown = process.shown(rows[:, 0], prompts)
        step_of = read_reveals(rows, process.vocab_size, shown).step_of
        x0 = rows[:, -1]
        if state.log_c is None:
            log_c = torch.full(x0.shape, torch.nan, dtype=torch.float64, device=x0.device)
        else:
            log_c = state.log_c.reshape(x0.shape)
        return cls(model, shape, x0, step_of, log_c, flat_given(chain.kernel, chain.given, shape))

    @property
    def free(self) -> Tensor:
        """Positions that are revealed at all, bool ``(B, L)``."""
        return self.step_of >= 0

    @property
    def mask(self) -> int:
        """Id of the mask."""
        return self.model.chain.kernel.process.vocab_size

    def path(self, x0: Tensor, step_of: Tensor) -> Tensor:
        """Return whole paths, int64 ``(R, N, *plates, T + 1, L)``.

        :param x0: clean tokens, int64 ``(B, L)``.
        :param step_of: int64 ``(B, L)``.
        """
        steps = torch.arange(self.model.chain.num_steps + 1, device=x0.device)[:, None]
        path = torch.where(steps > step_of[:, None], x0[:, None], self.mask)
        return path.reshape(*self.shape, *path.shape[1:])

    def whole(self, values: Tensor) -> Tensor:
        """Return values of rows ``(B, ...)`` as ``(R, N, *plates, ...)``."""
        return values.reshape(*self.shape, *values.shape[1:])

    def times(self, step_of: Tensor, step: Tensor) -> Tensor:
        """Return the time of a step of each of some paths, float64 ``(M,)``.

        :param step_of: int64 ``(M, L)``.
        :param step: int64 ``(M,)``.
        """
        kernel: Any = self.model.chain.kernel
        time: Tensor = kernel.time_of_step(step_of, step)
        return time

    def between(self, first: Tensor, last: Tensor) -> Tensor:
        """Return the steps of a range that reveal anything, bool ``(B, T)``.

        :param first: int64 ``(B,)``.
        :param last: int64 ``(B,)``, itself in the range.
        """
        steps = torch.arange(self.model.chain.num_steps, device=first.device)
        return self.at_steps(self.free) & (steps >= first[:, None]) & (steps <= last[:, None])

    def at_steps(self, positions: Tensor) -> Tensor:
        """Return the steps that reveal any of some positions, bool ``(B, T)``.

        :param positions: bool ``(B, L)``.
        """
        steps = self.model.chain.num_steps
        found = torch.zeros(len(positions), steps + 1, dtype=torch.bool, device=positions.device)
        index = torch.where(self.free & positions, self.step_of, steps)
        return found.scatter(1, index, True)[:, :-1]

    def score(self, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Score the reveals of some steps, for several orders of reveals at once.

        :param parts: for each order ``step_of (B, L)`` and which steps are wanted, ``(B, T)``.
        :returns: log-probabilities of the reveals of wanted steps, float64 ``(B, L)`` each; NaN
            elsewhere.
        """
        row, step, order = [], [], []
        for step_of, wanted in parts:
            rows, steps = wanted.nonzero(as_tuple=True)
            row.append(rows)
            step.append(steps)
            order.append(step_of[rows])
        rows, steps, orders = torch.cat(row), torch.cat(step), torch.cat(order)
        reveals = orders == steps[:, None]
        values = self._log_c(rows, orders, steps, reveals)
        found, sizes = [], [len(r) for r in row]
        for r, chosen, value in zip(row, reveals.split(sizes), values.split(sizes), strict=True):
            which, site = chosen.nonzero(as_tuple=True)
            log_c = torch.full_like(self.log_c, torch.nan)
            log_c[r[which], site] = value[which, site]
            found.append(log_c)
        return found

    def _log_c(self, row: Tensor, order: Tensor, step: Tensor, reveals: Tensor) -> Tensor:
        """Return log-probabilities of the clean tokens where asked for, float64 ``(M, L)``."""
        x0 = self.x0[row]
        which, site = reveals.nonzero(as_tuple=True)
        log_d = self.predict(row, torch.where(order < step[:, None], x0, self.mask),
                             self.times(order, step), which, site)  # fmt: skip
        values = torch.zeros(x0.shape, dtype=torch.float64, device=x0.device)
        values[which, site] = log_d.gather(-1, x0[which, site][:, None])[:, 0]
        return values

    def predict(
        self, row: Tensor, states: Tensor, times: Tensor, which: Tensor, site: Tensor
    ) -> Tensor:
        """Return predictions at some positions of some states, float64 ``(m, V)``.

        :param row: the row each state belongs to, int64 ``(M,)``.
        :param states: int64 ``(M, L)``.
        :param times: float64 ``(M,)``.
        :param which: state of each position asked about, int64 ``(m,)``, in order.
        :param site: the positions, int64 ``(m,)``.
        """
        length, size = states.shape[-1], self.mask
        if not len(states):
            return torch.zeros(0, size, dtype=torch.float64, device=states.device)
        given = {name: value[row] for name, value in self.given.items()}
        sites = which * length + site
        found = predict_at(self.model.denoiser, states, times, sites, given)
        return clean_log_probs(found, sites.shape, size).to(torch.float64)
