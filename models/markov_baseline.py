"""The Markov chain that a prior has to beat."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MarkovBaseline:
    """A homogeneous Markov chain of fixed order, fitted by smoothed counts.

    The first tokens of a sequence, which have no full context, are predicted by chains of lower
    order, so that the likelihood is that of a whole sequence.

    :param rows: training sequences, int64 ``(n, L)``.
    :param order: number of tokens of context.
    :param vocab_size: number of symbols ``V``.
    :param count: pseudo-count added to every cell.
    """

    def __init__(self, rows: Tensor, order: int, vocab_size: int, *, count: float = 0.5) -> None:
        self.order = order
        self.vocab_size = vocab_size
        self._tables = [self._fit(rows, k, count) for k in range(order + 1)]

    def bits(self, rows: Tensor) -> Tensor:
        """Return the code length of every token.

        :param rows: int64 ``(n, L)``.
        :returns: bits, float64 ``(n, L)``.
        """
        columns = [self._bits(rows, k)[:, :1] for k in range(self.order)]
        return torch.cat([*columns, self._bits(rows, self.order)], dim=1)

    def _fit(self, rows: Tensor, order: int, count: float) -> Tensor:
        size = self.vocab_size
        cells = (self._contexts(rows, order) * size + rows[:, order:]).flatten()
        counts = torch.bincount(cells, minlength=size ** (order + 1)).double() + count
        table = counts.reshape(-1, size)
        return table / table.sum(1, keepdim=True)

    def _bits(self, rows: Tensor, order: int) -> Tensor:
        return -torch.log(
            self._tables[order][self._contexts(rows, order), rows[:, order:]]
        ) / math.log(2.0)

    def _contexts(self, rows: Tensor, order: int) -> Tensor:
        contexts = torch.zeros_like(rows[:, order:])
        for shift in range(order):
            column = rows[:, shift : rows.shape[1] - order + shift]
            contexts = contexts * self.vocab_size + column
        return contexts
