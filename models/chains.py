"""Markov chains of every order for sequences of any length: what a prior of one's own must beat.

A chain of order ``k`` predicts a token from the last ``k``, the beginning of the sequence among
them. Where lengths differ it also predicts where a sequence ends, so that its code length is that
of the whole sequence, length included. Counts of a context are mixed with what the next shorter
context says::

    p_k(x | c) = (n(c x) + a p_{k-1}(x | c')) / (n(c) + a),        p_{-1} uniform

which is far better than a constant added to every count where contexts are rare. The strength ``a``
is chosen on validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STRENGTHS = (0.5, 2.0, 8.0, 32.0, 128.0)
MAX_ORDER = 6

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class MarkovChains:
    """Chains of the orders 0 to ``max_order``, fitted together.

    :param rows: training sequences, as token ids from 0 up.
    :param vocab_size: how many tokens there are.
    :param ends: whether the end of a sequence is a token too; without it all have one length.
    :param weights: how much each row counts, 1 by default.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        ends: bool,
        max_order: int = MAX_ORDER,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.max_order = max_order
        self.ends = ends
        # The end of a sequence is the token V; what stands before its beginning is V + 1.
        self._end, self._before = vocab_size, vocab_size + 1
        self._outcomes = vocab_size + ends
        flat = self._flat(rows)
        mass = np.repeat(np.ones(len(rows)) if weights is None else np.asarray(weights), flat.sizes)
        self._contexts: list[_Table] = []
        self._cells: list[_Table] = []
        codes = np.zeros(len(flat.tokens), dtype=np.int64)
        for order in range(max_order + 1):
            if order:
                codes = self._contexts[-1].find(codes) * self._base + flat.lagged(order)
            self._contexts.append(_Table(codes, mass))
            cells = self._contexts[-1].find(codes) * self._base + flat.tokens
            self._cells.append(_Table(cells, mass))

    def bits(self, rows: Sequence[Sequence[int]], strength: float) -> Floats:
        """Return code lengths in bits.

        :returns: float64 ``(max_order + 1, n)``, one row per order.
        """
        flat = self._flat(rows)
        share = np.full(len(flat.tokens), 1.0 / self._outcomes)
        codes = np.zeros(len(flat.tokens), dtype=np.int64)
        found = []
        for order, (contexts, cells) in enumerate(zip(self._contexts, self._cells, strict=True)):
            if order:
                known = self._contexts[order - 1].find(codes)
                codes = np.where(known < 0, -1, known * self._base + flat.lagged(order))
            number = contexts.find(codes)
            there = cells.mass(np.where(number < 0, -1, number * self._base + flat.tokens))
            share = (there + strength * share) / (contexts.mass(codes) + strength)
            found.append(np.add.reduceat(-np.log2(share), flat.begins))
        return np.stack(found)

    @property
    def _base(self) -> int:
        return self._before + 1

    def _flat(self, rows: Sequence[Sequence[int]]) -> _Flat:
        end = [self._end] if self.ends else []
        return _Flat([[*row, *end] for row in rows], self._before)


class _Flat:
    """Rows one after the other."""

    def __init__(self, rows: Sequence[Sequence[int]], before: int) -> None:
        self.sizes = np.array([len(row) for row in rows])
        self.tokens = np.array([token for row in rows for token in row], dtype=np.int64)
        self.begins = np.concatenate([[0], self.sizes.cumsum()[:-1]])
        self._place = np.arange(len(self.tokens)) - np.repeat(self.begins, self.sizes)
        self._sentinel = before

    def lagged(self, lag: int) -> Ids:
        """Return the token ``lag`` before each, or what stands before the beginning."""
        return np.where(self._place >= lag, np.roll(self.tokens, lag), self._sentinel)


class _Table:
    """How much mass each code has; codes that never occurred have none."""

    def __init__(self, codes: Ids, mass: Floats) -> None:
        self._codes, index = np.unique(codes, return_inverse=True)
        self._mass = np.bincount(index, mass)

    def find(self, codes: Ids) -> Ids:
        """Return the numbers of codes, -1 for unknown ones."""
        place = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        return np.where(self._codes[place] == codes, place, -1)

    def mass(self, codes: Ids) -> Floats:
        number = self.find(codes)
        return np.where(number < 0, 0.0, self._mass[number])


def strengths(chains: MarkovChains, valid: Sequence[Sequence[int]]) -> list[float]:
    """Return the strength of each order that codes validation rows best."""
    means = np.stack([chains.bits(valid, strength).mean(1) for strength in STRENGTHS])
    return [STRENGTHS[int(best)] for best in means.argmin(0)]


def bits_of_orders(
    chains: MarkovChains, rows: Sequence[Sequence[int]], chosen: Sequence[float]
) -> Floats:
    """Return code lengths in bits, float64 ``(max_order + 1, n)``, each order at its strength."""
    by_strength = {strength: chains.bits(rows, strength) for strength in set(chosen)}
    return np.stack([by_strength[strength][order] for order, strength in enumerate(chosen)])


def expected_copies(bits: Floats) -> float:
    """Return the chance that a draw is one of the different rows of these code lengths."""
    return float(np.exp2(-bits).sum()) if len(bits) else math.nan
