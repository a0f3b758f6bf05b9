"""Which path costs least under a budget of network evaluations.

A step from the point ``(t, u)``, token level and latent level, to ``(t', u')`` pays for what it
reveals from what the network knows *before* it::

    (k(t') - k(t)) A(t, u) + (m(u') - m(u)) B(t, u)

``A`` is the expected cross-entropy of the hidden tokens per unit of hidden mass, ``B`` the same of
codes, or the squared error of a continuous latent; ``k`` is the share of tokens that are clean and
``m`` that of codes, or half the signal-to-noise ratio. The bound of a path is the sum of its steps,
each a function of its two ends: the cheapest path is a shortest path, found by dynamic programming.
What a step loses by revealing things together is its cost less that of the finest way between the
same points: their total correlation, in expectation, where the network is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ppl_diffusion.kernels.path import Path
from ppl_diffusion.processes.base import whole_number

_LEVEL_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class PathCosts:
    """What a step costs in nats, over a grid of levels.

    :param token_levels: from 0 to 1, increasing, ``(I + 1,)``.
    :param latent_levels: the same of the latent, ``(J + 1,)``.
    :param tokens: ``A``, nats per unit of token mass, ``(I + 1, J + 1)``.
    :param latent: ``B``, nats per unit of latent mass, ``(I + 1, J + 1)``.
    :param token_mass: ``k``, decreasing, ``(I + 1,)``.
    :param latent_mass: ``m``, decreasing, ``(J + 1,)``.
    :param constant: what every path pays that draws the latent: its prior and its encoder.
    :raises ValueError: if the shapes do not fit, or the levels do not go from 0 to 1.
    """

    token_levels: np.ndarray
    latent_levels: np.ndarray
    tokens: np.ndarray
    latent: np.ndarray
    token_mass: np.ndarray
    latent_mass: np.ndarray
    constant: float = 0.0

    def __post_init__(self) -> None:
        for name in ("token_levels", "latent_levels"):
            _check_levels(getattr(self, name), name)
        rows, columns = len(self.token_levels), len(self.latent_levels)
        wanted: dict[str, tuple[int, ...]] = {"tokens": (rows, columns), "latent": (rows, columns)}
        wanted |= {"token_mass": (rows,), "latent_mass": (columns,)}
        for name, shape in wanted.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ValueError(f"PathCosts: {name} must have the shape {shape}, got {found}.")
        # Nothing is left to reveal there, so that whatever the tables say counts for nothing.
        object.__setattr__(self, "tokens", _without(self.tokens, np.s_[0, :]))
        object.__setattr__(self, "latent", _without(self.latent, np.s_[:, 0]))

    def steps(self, path: Path) -> np.ndarray:
        """Return the cost of every step of a path, nats, ``(T,)``.

        :raises ValueError: if a level of the path is none of the grid.
        """
        points = self._points(path)
        pairs = pairwise(points)
        return np.array([self._step(before, after) for before, after in pairs])

    def nelbo(self, path: Path) -> float:
        """Return the bound of a path, nats per sequence.

        :raises ValueError: if a level of the path is none of the grid.
        """
        return float(self.steps(path).sum()) + self.constant * path.draws_latent

    def _points(self, path: Path) -> list[tuple[int, int]]:
        levels = np.array(path.levels)
        rows = _indices(levels[:, 0], self.token_levels, "token")
        columns = _indices(levels[:, 1], self.latent_levels, "latent")
        return list(zip(rows.tolist(), columns.tolist(), strict=True))

    def _step(self, before: tuple[int, int], after: tuple[int, int]) -> float:
        tokens = self.token_mass[after[0]] - self.token_mass[before[0]]
        latent = self.latent_mass[after[1]] - self.latent_mass[before[1]]
        return float(tokens * self.tokens[before] + latent * self.latent[before])


def best_path(costs: PathCosts, evaluations: int, *, min_gain: float = 1e-9) -> Path:
    """Return the path over the grid with the least bound, of at most so many steps.

    Exact, by dynamic programming over the number of evaluations; with ``I`` token levels and ``J``
    latent levels it takes ``O(evaluations I^2 J^2)`` additions and ``O(I J^2)`` memory. A path that
    never draws the latent (masked diffusion) is among those compared.

    :param costs: what steps cost.
    :param evaluations: budget of network evaluations, one per step.
    :param min_gain: nats that a path must gain over one of fewer steps, or over one that leaves the
        latent alone, to be preferred to it.
    :raises ValueError: if the budget is less than one.
    """
    budget = whole_number(evaluations, "best_path: evaluations")
    rows, columns = costs.tokens.shape
    reached = np.full((rows, columns), np.inf)
    reached[-1, -1] = 0.0
    origins: list[np.ndarray] = []
    found: tuple[float, int, tuple[int, int]] | None = None
    for count in range(budget):
        reached, origin = _advance(costs, reached)
        origins.append(origin)
        for end, extra in (((0, columns - 1), 0.0), ((0, 0), costs.constant)):
            total = reached[end] + extra
            if found is None or total < found[0] - min_gain:
                found = (float(total), count, end)
    assert found is not None
    return _trace(costs, origins[: found[1] + 1], found[2])


def total_correlation(costs: PathCosts, path: Path) -> np.ndarray:
    """Return what each step of a path loses by revealing things together, nats, ``(T,)``.

    It is the cost of the step less the least cost between the same two points in moves of one
    level of one channel at a time. A grid is not infinitely fine, so this is a lower bound on the
    expected total correlation of what the step reveals, where the costs are those of an exact
    network; where they are estimates it can be slightly negative. The sum over the steps is what a
    path could gain by more evaluations.

    :raises ValueError: if a level of the path is none of the grid.
    """
    points = costs._points(path)
    pairs = pairwise(points)
    least = np.array([_finest(costs, before, after) for before, after in pairs])
    return np.asarray(costs.steps(path) - least)


def _advance(costs: PathCosts, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost of every point after one more step, and where that step came from."""
    rows, columns = reached.shape
    latent_gain = costs.latent_mass[:, None] - costs.latent_mass  # (after, before)
    upwards = np.arange(columns)[:, None] > np.arange(columns)
    after, origin = np.full_like(reached, np.inf), np.zeros((rows, columns), dtype=np.int64)
    for row in range(rows):
        base = (
            reached[row:]
            + (costs.token_mass[row] - costs.token_mass[row:, None]) * (costs.tokens[row:])
        )
        totals = base[:, None, :] + latent_gain * costs.latent[row:, None, :]
        totals[:, upwards] = np.inf  # no level rises
        totals[0, np.arange(columns), np.arange(columns)] = np.inf  # a step changes something
        if row == 0:  # finished tokens beside a latent on its way are no path
            totals[1:, 1:-1] = np.inf
        flat = totals.transpose(1, 0, 2).reshape(columns, -1)
        origin[row] = flat.argmin(1) + row * columns
        after[row] = flat.min(1)
    return after, origin


def _trace(costs: PathCosts, origins: Sequence[np.ndarray], end: tuple[int, int]) -> Path:
    points, columns = [end], len(costs.latent_levels)
    for origin in reversed(origins):
        row, column = divmod(int(origin[points[-1]]), columns)
        points.append((row, column))
    return Path((costs.token_levels[i], costs.latent_levels[j]) for i, j in reversed(points))


def _finest(costs: PathCosts, before: tuple[int, int], after: tuple[int, int]) -> float:
    """Return the least cost between two points in moves of one level of one channel."""
    (top, right), (bottom, left) = before, after
    least = np.full((top - bottom + 1, right - left + 1), np.inf)
    least[-1, -1] = 0.0
    for row in range(top, bottom - 1, -1):
        for column in range(right, left - 1, -1):
            here = least[row - bottom, column - left]
            for target in ((row - 1, column), (row, column - 1)):
                if target[0] >= bottom and target[1] >= left:
                    at = (target[0] - bottom, target[1] - left)
                    least[at] = min(least[at], here + costs._step((row, column), target))
    return float(least[0, 0])


def _check_levels(levels: np.ndarray, name: str) -> None:
    given = np.asarray(levels, dtype=np.float64)
    if given.ndim != 1 or len(given) < 2 or not np.all(np.diff(given) > 0):
        raise ValueError(f"PathCosts: {name} must be a vector of increasing levels.")
    if given[0] != 0.0 or given[-1] != 1.0:
        raise ValueError(f"PathCosts: {name} must go from 0 to 1, got {given[0]} to {given[-1]}.")


def _without(table: Any, where: Any) -> np.ndarray:
    cleared = np.array(table, dtype=np.float64)
    cleared[where] = 0.0
    return cleared


def _indices(levels: np.ndarray, grid: np.ndarray, channel: str) -> np.ndarray:
    nearest = np.abs(levels[:, None] - grid).argmin(1)
    off = np.abs(levels - grid[nearest])
    if off.max() > _LEVEL_TOLERANCE:
        level = levels[off.argmax()]
        raise ValueError(
            f"PathCosts: the {channel} level {level:.4g} is none of the grid's {len(grid)}; choose "
            "a path of its levels, or estimate the costs on a grid that has them."
        )
    return np.asarray(nearest)
