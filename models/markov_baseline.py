"""The Markov chain that a prior has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MarkovBaseline:
    """A homogeneous Markov chain with ``order`` tokens of context, fitted by smoothed counts.

    The first tokens of a sequence, which have no full context, are predicted by chains of lower
    order, so that the likelihood is that of a whole sequence.

    :param rows: training sequences, int64 ``(n, L)``.
    :param count: pseudo-count added to every cell.
    :param weights: how much each row counts, float64 ``(n,)``; 1 by default.
    """

    def __init__(
        self,
        rows: Tensor,
        order: int,
        vocab_size: int,
        *,
        count: float = 0.5,
        weights: Tensor | None = None,
    ) -> None:
        self.order = order
        self.vocab_size = vocab_size
        if weights is None:
            weights = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        self._tables = [self._fit(rows, k, count, weights) for k in range(order + 1)]

    def bits(self, rows: Tensor) -> Tensor:
        """Return the code length of every token of rows ``(n, L)``, in bits."""
        columns = [self._bits(rows, k)[:, :1] for k in range(self.order)]
        return torch.cat([*columns, self._bits(rows, self.order)], dim=1)

    def sample(self, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw sequences, int64 ``(count, length)``."""
        rows = torch.empty(count, 0, dtype=torch.int64, device=self._tables[0].device)
        for position in range(length):
            order = min(position, self.order)
            context = kmers(rows[:, position - order :], order, self.vocab_size)[:, -1]
            drawn = torch.multinomial(self._tables[order][context], 1, generator=generator)
            rows = torch.cat([rows, drawn], dim=1)
        return rows

    def _fit(self, rows: Tensor, order: int, count: float, weights: Tensor) -> Tensor:
        size = self.vocab_size
        cells = kmers(rows, order, size)[:, :-1] * size + rows[:, order:]
        mass = weights[:, None].expand(cells.shape).flatten()
        counts = torch.bincount(cells.flatten(), mass, minlength=size ** (order + 1)) + count
        table = counts.reshape(-1, size)
        return table / table.sum(1, keepdim=True)

    def _bits(self, rows: Tensor, order: int) -> Tensor:
        contexts = kmers(rows, order, self.vocab_size)[:, :-1]
        return -self._tables[order][contexts, rows[:, order:]].log() / math.log(2.0)


def kmers(rows: Tensor, k: int, size: int) -> Tensor:
    """Return the numbers of all k-mers of rows ``(n, L)`` over ``size`` symbols, in base ``size``.

    :returns: int64 ``(n, L - k + 1)``; all 0 for ``k`` = 0.
    """
    count = rows.shape[1] - k + 1
    numbers = torch.zeros(len(rows), count, dtype=torch.int64, device=rows.device)
    for shift in range(k):
        numbers = numbers * size + rows[:, shift : shift + count]
    return numbers
