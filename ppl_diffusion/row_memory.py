"""Numbers remembered for the rows of integer matrices, over many questions and within bounds.

What an answer costs is up to who gives it; finding it again costs one binary search per row, and
remembering it one pass over the sorted hashes of what is known. Rows themselves are written once
and never moved: they are what takes room.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 2**18
MAX_BYTES = 2**28
"""Bounds of what is remembered: rows, and the bytes of their tokens."""


class RowMemory:
    """Values by row, float64; the oldest are forgotten.

    :param dtype: integer type that holds the tokens.
    :param max_rows: rows remembered at most; between a half of them and all of them are.
    :param max_bytes: bytes of their tokens at most.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.int32,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.dtype, self.max_rows, self.max_bytes = dtype, max_rows, max_bytes
        self._generations: list[Generation] = []

    def __len__(self) -> int:
        return sum(map(len, self._generations))

    def find(self, rows: Tensor, hashes: Tensor) -> tuple[Tensor, Tensor]:
        """Return remembered values, NaN where there are none, and whether there are.

        :param rows: int64 ``(B, L)``.
        :param hashes: of the rows, ``(B,)``.
        :returns: float64 ``(B,)`` and bool ``(B,)``.
        """
        values = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=rows.device)
        known = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        missing: Tensor | None = None  # all of them
        for generation in reversed(self._generations):
            if generation.fits(rows) and len(generation):
                sought = hashes if missing is None else hashes.index_select(0, missing)
                hits, found = generation.find(rows, sought, missing)
                values[hits], known[hits] = found, True
                missing = (~known).nonzero()[:, 0]
        return values, known

    def add(self, rows: Tensor, hashes: Tensor, values: Tensor) -> None:
        """Remember values of distinct rows that are not remembered yet.

        :param rows: int64 ``(B, L)``.
        :param hashes: of the rows, ascending ``(B,)``.
        :param values: float64 ``(B,)``.
        """
        size = rows.shape[-1] * self.dtype.itemsize
        bound = max(1, min(self.max_rows, self.max_bytes // max(size, 1)) // 2)
        young = self._generations[-1] if self._generations else None
        if young is None or not young.fits(rows) or len(young) + len(rows) > bound:
            # Forgetting the older half at once spares each row an age.
            young = Generation(rows, self.dtype)
            self._generations = [*self._generations[-1:], young]
        young.add(rows[:bound], hashes[:bound], values[:bound])


class Generation:
    """Rows in the order in which they came, and their hashes sorted."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.rows = like.new_empty((0, like.shape[-1]), dtype=dtype)
        self.values = like.new_empty(0, dtype=torch.float64)
        self.hashes, self.places = like.new_empty(0), like.new_empty(0)

    def __len__(self) -> int:
        return len(self.hashes)

    def fits(self, rows: Tensor) -> bool:
        return self.rows.shape[-1] == rows.shape[-1] and self.rows.device == rows.device

    def find(self, rows: Tensor, hashes: Tensor, which: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the indices of rows that are here, among those asked for, and their values.

        :param hashes: of those asked for.
        :param which: their indices; None for all rows.
        """
        index = torch.searchsorted(self.hashes, hashes).clamp_(max=len(self) - 1)
        # Few rows come again: comparing those alone is worth one more read.
        alike = (self.hashes.index_select(0, index) == hashes).nonzero()[:, 0]
        places = self.places.index_select(0, index.index_select(0, alike))
        hits = alike if which is None else which.index_select(0, alike)
        unlike = rows.index_select(0, hits).to(self.rows.dtype)
        unlike = unlike.bitwise_xor_(self.rows.index_select(0, places))
        if bool(unlike.count_nonzero()):  # other rows of the same hash
            same = ~unlike.any(-1)
            hits, places = hits[same], places[same]
        return hits, self.values.index_select(0, places)

    def add(self, rows: Tensor, hashes: Tensor, values: Tensor) -> None:
        begin, end = len(self), len(self) + len(rows)
        if end > len(self.rows):
            self._grow(max(end, 2 * len(self.rows)))
        self.rows[begin:end], self.values[begin:end] = rows, values
        places = torch.arange(begin, end, device=rows.device)
        # Two sorted lists become one: where the new ones go, and the old ones around them.
        here = torch.searchsorted(self.hashes, hashes) + (places - begin)
        old = torch.ones(end, dtype=torch.bool, device=rows.device)
        old[here] = False
        self.hashes = _merged(self.hashes, hashes, here, old)
        self.places = _merged(self.places, places, here, old)

    def _grow(self, size: int) -> None:
        used = len(self)
        rows = self.rows.new_empty((size, self.rows.shape[-1]))
        values = self.values.new_empty(size)
        rows[:used], values[:used] = self.rows[:used], self.values[:used]
        self.rows, self.values = rows, values


def _merged(known: Tensor, new: Tensor, here: Tensor, old: Tensor) -> Tensor:
    merged = known.new_empty(len(old))
    merged[here] = new
    return merged.masked_scatter_(old, known)
