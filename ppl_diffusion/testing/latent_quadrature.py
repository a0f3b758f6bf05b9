"""What a path does to tokens beside one continuous number, by quadrature in one dimension.

The value of a state, the law of the finished sequence from there, is carried backwards on a grid of
the latent: a step with a density averages it over a normal law, a deterministic one reads it where
the step leads. Updates are written out here; no solver, kernel or chain of the library is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from ppl_diffusion.denoisers.latent import LatentDenoiser
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.processes.schedules import Linear, Schedule
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.latent_toys import Diffusing, LatentProblem

Update = Callable[[Tensor, Tensor, float, float], tuple[Tensor, float]]
"""From latent, predicted clean latent and two levels to the mean and deviation of what is next."""

REACH = 9.0
"""How far the grid of the latent goes; no toy has codes beyond 2."""


def ancestral(process: Diffusing) -> Update:
    """Return the exact posterior of a less noisy latent, with the prediction put in (DDPM)."""

    def update(y: Tensor, clean: Tensor, u: float, s: float) -> tuple[Tensor, float]:
        a, b = _scales(process, s)
        at, bt = _scales(process, u)
        kept = at / a
        fresh = bt**2 - (kept * b) ** 2
        return (kept * b**2 * y + a * fresh * clean) / bt**2, math.sqrt(fresh) * b / bt

    return update


def ddim(process: Diffusing) -> Update:
    """Return the deterministic step that keeps the predicted noise (DDIM)."""

    def update(y: Tensor, clean: Tensor, u: float, s: float) -> tuple[Tensor, float]:
        a, b = _scales(process, s)
        at, bt = _scales(process, u)
        return a * clean + b * (y - at * clean) / bt, 0.0

    return update


@dataclass(frozen=True)
class ScalarLatent:
    """Quadrature for a problem whose latent is one number.

    :param problem: a continuous problem with one slot of one coordinate.
    :param process: the noise of the latent.
    :param denoiser: the problem's own by default.
    :param num_points: points of the grid.
    :param spacing: of the nodes of a standard normal.
    """

    problem: LatentProblem
    process: Diffusing
    denoiser: LatentDenoiser | None = None
    token_schedule: Schedule = Linear()
    num_points: int = 4001
    spacing: float = 0.1

    def tokens(self, path: Path, update: Update) -> Tensor:
        """Return the law of generated sequences, ``(V,) * L``."""
        states = all_states(self.problem.vocab_size + 1, self.problem.length)
        grid = torch.linspace(-REACH, REACH, self.num_points, dtype=torch.float64)
        clean = (states < self.problem.vocab_size).all(-1)
        value = torch.eye(len(states), dtype=torch.float64)[:, clean]
        value = value[:, None].expand(-1, len(grid), -1)
        levels = list(zip(path.levels[:-1], path.levels[1:], strict=True))
        for before, after in reversed(levels):
            value = self._backwards(value, states, grid, before, after, update)
        density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
        law = density @ value[-1]  # all holes is the last state
        return law.reshape([self.problem.vocab_size] * self.problem.length)

    def bounds(self, path: Path) -> Tensor:
        """Return the exact NELBO of each sequence in nats, ``(V,) * L``.

        The model's steps are :func:`ancestral`; the chain of the latent ends at level 0, where the
        process still has noise, and its encoder is a function of the sequence.
        """
        sequences, means = self._encoded()
        a, b = _scales(self.process, 1.0)
        total = ((a * means) ** 2 + b**2 - 1 - 2 * math.log(b)) / 2
        for before, after in zip(path.levels[:-1], path.levels[1:], strict=True):
            total = total + self._step_cost(sequences, means, before, after)
        return total.reshape([self.problem.vocab_size] * self.problem.length)

    def _encoded(self) -> tuple[Tensor, Tensor]:
        """Every sequence, and its code; nan where the sequence cannot occur."""
        sequences = all_states(self.problem.vocab_size, self.problem.length)
        means = torch.full((len(sequences),), math.nan, dtype=torch.float64)
        kept = self.problem.tokens.argmax(-1)
        for row, mean in zip(kept, self.problem.latent[:, 0, 0], strict=True):
            means[(sequences == row).all(-1)] = mean
        return sequences, means

    def _step_cost(
        self,
        sequences: Tensor,
        means: Tensor,
        before: tuple[float, float],
        after: tuple[float, float],
    ) -> Tensor:
        nodes, weights = self._nodes()
        a, b = _scales(self.process, before[1])
        y = a * means.nan_to_num()[:, None] + b * nodes  # (X, nodes)
        gain = (self._snr(after[1]) - self._snr(before[1])) / 2
        keep, rho = self._keep(before[0]), self._reveal(before[0], after[0])
        total = torch.zeros(len(sequences), dtype=torch.float64)
        for hidden in all_states(2, self.problem.length).bool():
            chance = (1 - keep) ** int(hidden.sum()) * keep ** int((~hidden).sum())
            if chance == 0:
                continue
            tokens = torch.where(hidden, self.problem.vocab_size, sequences)[:, None]
            log_p, clean = self._predict(tokens.expand(-1, len(nodes), -1), y, before)
            own = log_p.gather(-1, sequences[:, None, :, None].expand(*log_p.shape[:-1], 1))
            miss = -(own[..., 0] * hidden).sum(-1) * rho
            miss = miss + gain * (clean - means[:, None]) ** 2
            total = total + chance * miss @ weights
        return total

    def _backwards(
        self,
        value: Tensor,
        states: Tensor,
        grid: Tensor,
        before: tuple[float, float],
        after: tuple[float, float],
        update: Update,
    ) -> Tensor:
        """Return the value before a step, ``(S, G, X)``, zero where no path comes by."""
        result = torch.zeros_like(value)
        for index in _possible(states, self.problem.vocab_size, before[0]):
            state = states[index]
            log_p, clean = self._predict(state.expand(len(grid), -1), grid, before)
            moves = self._moves(state, log_p.exp(), states, self._reveal(before[0], after[0]))
            for other in torch.nonzero(moves.sum(0) > 0)[:, 0].tolist():
                ahead = value[other]
                if after[1] < before[1]:
                    ahead = self._ahead(ahead, grid, *update(grid, clean, before[1], after[1]))
                result[index] += moves[:, other, None] * ahead
        return result

    def _ahead(self, value: Tensor, grid: Tensor, mean: Tensor, std: float) -> Tensor:
        """Average a value over where the latent goes, ``(G, X)``."""
        spline = CubicSpline(grid.numpy(), value.numpy())
        if std == 0:
            return torch.from_numpy(spline(mean.clamp(-REACH, REACH).numpy()))
        nodes, weights = self._nodes()
        there = (mean[:, None] + std * nodes).clamp(-REACH, REACH)
        return torch.einsum("n,gnx->gx", weights, torch.from_numpy(spline(there.numpy())))

    def _moves(self, state: Tensor, probs: Tensor, states: Tensor, rho: float) -> Tensor:
        """Return where the tokens of a state go at each latent, ``(G, S)``."""
        hole, moves = self.problem.vocab_size, torch.ones(len(probs), len(states)).double()
        for site, token in enumerate(state.tolist()):
            there = states[:, site]
            stay = torch.full_like(probs[:, site, :1], 1 - rho)
            drawn = torch.cat([rho * probs[:, site], stay], -1)
            row = drawn if token == hole else torch.eye(hole + 1).double()[token].expand_as(drawn)
            moves = moves * row[:, there]
        return moves

    def _predict(
        self, tokens: Tensor, y: Tensor, level: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        denoiser, count = self.denoiser or self.problem.denoiser(self.process), tokens.shape[-1]
        rows = denoiser.joint(tokens, level[0], latent=y[..., None, None], latent_time=level[1])
        rows = rows.detach()
        head, clean = (
            denoiser.head(rows[..., :count, :]),
            denoiser.latent_head(rows[..., count:, :]),
        )
        return head.double(), clean[..., 0, 0].double()

    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights of a standard normal, by the trapezoid rule."""
        nodes = torch.arange(-8.0, 8.0 + self.spacing / 2, self.spacing, dtype=torch.float64)
        return nodes, torch.softmax(-nodes.square() / 2, 0)

    def _snr(self, level: float) -> float:
        a, b = _scales(self.process, level)
        return (a / b) ** 2

    def _keep(self, level: float) -> float:
        return float(self.token_schedule.alpha(level))

    def _reveal(self, before: float, after: float) -> float:
        kept = self._keep(before)
        return 0.0 if before == after else (self._keep(after) - kept) / (1 - kept)


def _possible(states: Tensor, hole: int, level: float) -> list[int]:
    """Return which states tokens can be in at a level."""
    holes = (states == hole).sum(-1)
    wanted = holes == (states.shape[-1] if level == 1 else 0)
    return torch.nonzero(wanted | (0 < level < 1))[:, 0].tolist()


def _scales(process: Diffusing, level: float) -> tuple[float, float]:
    return float(process.signal(level)), float(process.noise(level))
