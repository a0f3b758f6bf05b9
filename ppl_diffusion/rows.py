"""Distinct rows of integer matrices, and values remembered by row.

Rows are compared through 64-bit hashes and every match is verified token by token, so that a
collision costs time and never a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIER = 6364136223846793005  # Knuth's MMIX constant: odd, hence invertible modulo 2**64


def hash_rows(rows: Tensor) -> Tensor:
    """Return one int64 hash per row.

    :param rows: int64 ``(B, L)``.
    """
    powers = _powers(rows.shape[-1]).to(rows.device)
    mixed = (rows * powers).add_(powers)
    # Modulo 2**64 the last factor may be taken out of the sum.
    return (mixed >> 29).bitwise_xor_(mixed).sum(-1) * _MULTIPLIER


@lru_cache(maxsize=64)
def _powers(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    high = torch.randint(-(2**62), 2**62, (length,), generator=generator, device="cpu")
    return high * 2 + 1


class DistinctRows(NamedTuple):
    """One representative of every distinct row: ``rows[first][inverse]`` are the rows again.

    :ivar first: index of the first row of its kind, int64 ``(U,)``, in the order of the hashes.
    :ivar inverse: the position of each row's representative in it, int64 ``(B,)``.
    :ivar hashes: of the representatives, ascending int64 ``(U,)``.
    """

    first: Tensor
    inverse: Tensor
    hashes: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> DistinctRows:
        """Find them, by one hash, one sort and one read of the device.

        :param rows: int64 ``(B, L)``.
        """
        count = len(rows)
        hashes, order = hash_rows(rows).sort(stable=True)
        group = torch.nn.functional.pad(hashes[1:] != hashes[:-1], (1, 0)).cumsum(0)[:count]
        inverse = torch.empty_like(order).scatter_(0, order, group)
        # Where each group begins, for as many groups as there could be.
        begin = torch.searchsorted(group, torch.arange(count, device=rows.device))
        begin = begin.clamp_max_(max(count - 1, 0))
        first = order[begin]
        unlike = rows.index_select(0, first[inverse]).bitwise_xor_(rows).count_nonzero()
        size, collided = torch.stack([(group[-1:] + 1).sum(), unlike]).tolist()
        if collided:
            return cls._one_by_one(rows)
        return cls(first[:size], inverse, hashes[begin[:size]])

    @classmethod
    def _one_by_one(cls, rows: Tensor) -> DistinctRows:
        """Compare rows token by token, where two of them have one hash."""
        unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
        hashes, order = hash_rows(unique).sort(stable=True)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=rows.device)
        )[inverse]
        places = torch.arange(len(rows), device=rows.device)
        first = torch.full_like(order, len(rows)).scatter_reduce_(0, inverse, places, "amin")
        return cls(first, inverse, hashes)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find one representative of every distinct row: ``rows[first][inverse] == rows``.

    :param rows: int64 ``(B, L)``.
    :returns: indices of one representative per distinct row, int64 ``(U,)``, and the position of
        each row's representative in it, int64 ``(B,)``.
    """
    distinct = DistinctRows.of(rows)
    return distinct.first, distinct.inverse


@dataclass(frozen=True)
class RowTable:
    """Values remembered for distinct rows.

    :param hashes: sorted int64 ``(U,)``.
    :param rows: int64 ``(U, L)``.
    :param values: tensor ``(U, ...)``.
    """

    hashes: Tensor
    rows: Tensor
    values: Tensor

    @classmethod
    def build(cls, rows: Tensor, values: Tensor, hashes: Tensor | None = None) -> RowTable:
        """Store ``values`` under distinct ``rows``.

        :param rows: int64 ``(U, L)``, distinct.
        :param values: tensor ``(U, ...)``.
        :param hashes: of the rows where they are known and ascend (:class:`DistinctRows`).
        """
        if hashes is not None:
            return cls(hashes, rows, values)
        hashes, order = hash_rows(rows).sort()
        return cls(hashes, rows[order], values[order])

    def find(self, rows: Tensor, hashes: Tensor | None = None) -> Tensor:
        """Return the index of each row in the table, -1 where it is not there.

        :param rows: int64 ``(B, L)``.
        :param hashes: of the rows, where they are known.
        """
        if len(self.hashes) == 0:
            return torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        hashes = hash_rows(rows) if hashes is None else hashes
        index = torch.searchsorted(self.hashes, hashes).clamp_max(len(self.hashes) - 1)
        same = (self.rows[index] == rows).all(-1)
        return torch.where(same, index, -1)
