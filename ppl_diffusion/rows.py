"""Distinct rows of integer matrices, and values remembered by row.

Rows are compared through 64-bit hashes and every match is verified token by token, so that a
collision costs time and never a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIER = 6364136223846793005  # Knuth's MMIX constant: odd, hence invertible modulo 2**64


def hash_rows(rows: Tensor) -> Tensor:
    """Return one int64 hash per row.

    :param rows: int64 ``(B, L)``.
    """
    powers = _powers(rows.shape[-1]).to(rows.device)
    mixed = (rows + 1) * powers
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIER
    return mixed.sum(-1)


@lru_cache(maxsize=64)
def _powers(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    high = torch.randint(-(2**62), 2**62, (length,), generator=generator, device="cpu")
    return high * 2 + 1


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find one representative of every distinct row: ``rows[first][inverse] == rows``.

    :param rows: int64 ``(B, L)``.
    :returns: indices of one representative per distinct row, int64 ``(U,)``, and the position of
        each row's representative in it, int64 ``(B,)``.
    """
    hashes, inverse = torch.unique(hash_rows(rows), return_inverse=True)
    first = torch.empty_like(hashes)
    order = torch.arange(len(rows) - 1, -1, -1, device=rows.device)
    first.scatter_(0, inverse.flip(0), order)
    if not torch.equal(rows[first][inverse], rows):  # a hash collision
        unique, inverse = torch.unique(rows, dim=0, return_inverse=True)
        first = torch.empty(len(unique), dtype=torch.int64, device=rows.device)
        first.scatter_(0, inverse.flip(0), order)
    return first, inverse


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
    def build(cls, rows: Tensor, values: Tensor) -> RowTable:
        """Store ``values`` under distinct ``rows``.

        :param rows: int64 ``(U, L)``, distinct.
        :param values: tensor ``(U, ...)``.
        """
        hashes, order = hash_rows(rows).sort()
        return cls(hashes, rows[order], values[order])

    def find(self, rows: Tensor) -> Tensor:
        """Return the index of each row in the table, -1 where it is not there.

        :param rows: int64 ``(B, L)``.
        """
        if len(self.hashes) == 0:
            return torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        index = torch.searchsorted(self.hashes, hash_rows(rows)).clamp_max(len(self.hashes) - 1)
        same = (self.rows[index] == rows).all(-1)
        return torch.where(same, index, -1)
