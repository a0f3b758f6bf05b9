"""Sudoku: filled grids of nine by nine digits, generated, and their rules as a reward.

Grids are found by a random search (the cell with the fewest digits left first, its digits in
random order), then turned into others by what keeps the rules: digits renamed, rows and columns
exchanged within bands, bands exchanged, the grid turned over. A token is a digit less one.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ppl_diffusion.models.sequences import Sequences, unrelated
from ppl_diffusion.potentials.embedded import EmbeddedPotential

DIGITS = "123456789"
CELLS = 81
_ALL = (1 << 9) - 1
_SEED = 20_251_129
_GRIDS = {"train": 2000, "valid": 100, "test": 400}
_VARIANTS = 20  # of a grid to train on


@cache
def units() -> Tensor:
    """Return the cells of each row, column and box, int64 ``(27, 9)``."""
    grid = torch.arange(CELLS).reshape(9, 9)
    boxes = grid.reshape(3, 3, 3, 3).transpose(1, 2).reshape(9, 9)
    return torch.cat([grid, grid.T, boxes])


@cache
def pairs() -> Tensor:
    """Return which cells must differ, bool ``(81, 81)``: 810 pairs."""
    together = torch.zeros(CELLS, CELLS, dtype=torch.bool)
    for unit in units():
        together[unit[:, None], unit] = True
    return together & ~torch.eye(CELLS, dtype=torch.bool)


class SudokuRules(EmbeddedPotential):
    """Minus the expected number of pairs of equal digits that a row, column or box forbids.

    With ``e (81, 9)`` the laws of independent cells (at a grid, its one-hot rows), ``A`` the pairs
    that must differ and a temperature ``T``::

        log g(e) = - sum_v e_v^T A e_v / (2 T)

    Exact at grids, multilinear in between, with a gradient everywhere. A pair that two units
    forbid counts once.

    :param temperature: broken pairs per nat, positive.
    :raises ValueError: if it is not.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"SudokuRules: temperature must be positive, got {temperature}.")
        self.temperature = float(temperature)
        self._pairs = pairs().float()
        super().__init__(self._log_g, torch.eye(9), name="sudoku rules")

    def broken(self, x0: Tensor) -> Tensor:
        """Return how many pairs of each grid break a rule, int64 ``(*batch,)``.

        :param x0: tokens 0 to 8, int64 ``(*batch, 81)``.
        """
        equal = x0[..., :, None] == x0[..., None, :]
        return (equal & pairs().to(x0.device)).sum((-2, -1)) // 2

    def _log_g(self, embeddings: Tensor) -> Tensor:
        neighbours = self._pairs.to(embeddings) @ embeddings
        return -(embeddings * neighbours).sum((-2, -1)) / (2 * self.temperature)


def filled_grid(source: random.Random) -> list[int]:
    """Return a random filled grid, 81 tokens row by row.

    Every grid has a chance, but not the same one.

    :param source: what chance comes from.
    """
    taken = [0] * 27  # bits of the digits that each unit holds
    grid = [-1] * CELLS
    _fill(grid, taken, source)
    return grid


def variants(grids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return random grids that symmetries make of others, int64 ``(n * count, 81)``.

    :param grids: filled grids, int64 ``(n, 81)``.
    :param count: how many of each.
    """
    return torch.stack([_turned(grid, generator) for grid in grids for _ in range(count)])


def sequences(folder: str | Path | None = None) -> Sequences:
    """Return generated grids, split by the grid that symmetries turned; no data are read."""
    source, generator = random.Random(_SEED), torch.Generator().manual_seed(_SEED)
    grids = {
        part: torch.tensor([filled_grid(source) for _ in range(count)])
        for part, count in _GRIDS.items()
    }
    grids["train"] = variants(grids["train"], _VARIANTS, generator)
    return unrelated(
        list(grids.values()),
        licence="Data: none, the grids are generated.",
        source=f"{_GRIDS['train']} filled Sudoku grids found by a random search, {_VARIANTS} "
        "random symmetries of each; those of the test part are found anew.",
        vocabulary=DIGITS,
        noun="filled Sudoku grids",
        unit="cell",
        bundled=True,
    )


@cache
def _units_of() -> list[tuple[int, int, int]]:
    places = [(cell // 9, cell % 9) for cell in range(CELLS)]
    return [(row, 9 + column, 18 + row // 3 * 3 + column // 3) for row, column in places]


def _fill(grid: list[int], taken: list[int], source: random.Random) -> bool:
    best, fewest = -1, 10
    for cell, (row, column, box) in enumerate(_units_of()):
        if grid[cell] < 0:
            left = _ALL & ~(taken[row] | taken[column] | taken[box])
            if (count := left.bit_count()) < fewest:
                best, fewest, free = cell, count, left
                if count <= 1:
                    break
    if best < 0:
        return True
    digits = [digit for digit in range(9) if free >> digit & 1]
    source.shuffle(digits)
    for digit in digits:
        grid[best] = digit
        for unit in _units_of()[best]:
            taken[unit] ^= 1 << digit
        if _fill(grid, taken, source):
            return True
        for unit in _units_of()[best]:
            taken[unit] ^= 1 << digit
    grid[best] = -1
    return False


def _turned(grid: Tensor, generator: torch.Generator) -> Tensor:
    rows, columns = (_lines(generator) for _ in range(2))
    square = torch.randperm(9, generator=generator)[grid].reshape(9, 9)[rows][:, columns]
    over = bool(torch.rand((), generator=generator) < 0.5)
    return (square.T if over else square).flatten()


def _lines(generator: torch.Generator) -> Tensor:
    """Return an order of nine lines that keeps bands of three together."""
    bands = torch.randperm(3, generator=generator)
    return torch.cat([3 * band + torch.randperm(3, generator=generator) for band in bands])
