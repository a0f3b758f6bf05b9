"""Training, validation and test rows, with whole families in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppl_diffusion.models.near_copies import Families, Ids, families
from ppl_diffusion.models.sequence_files import PARTS

SHARES = (0.8, 0.1, 0.1)
FEWEST = 10
"""Rows without which there is nothing to split."""


@dataclass(frozen=True)
class Split:
    """Which rows are for what.

    :param train: numbers of the rows to train on, in their order, int64 ``(n,)``.
    :param valid: of those to stop by; ``test`` of those for the quoted bound.
    :param test_family: family of each test row, int64 ``(k,)``.
    :param rule: how the rows were split, in words.
    """

    train: Ids
    valid: Ids
    test: Ids
    test_family: Ids
    rule: str

    @property
    def sizes(self) -> dict[str, int]:
        return {part: len(getattr(self, part)) for part in PARTS}


def split_rows(
    texts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    *,
    parts: Sequence[str] | None = None,
    molecules: bool = False,
    seed: int = 0,
) -> Split:
    """Split rows into 80 % for training, 10 % for validation and 10 % for the test, by families.

    Families are shuffled, and each goes to the part that is furthest from its share; one that is
    larger than what a held-out part lacks goes to the training rows.

    :param parts: ``train``, ``valid`` or ``test`` of each row, if they are given. Where no row is
        ``valid`` or ``test``, a part of the training rows takes its place.
    :param molecules: whether the texts are SMILES.
    :param seed: of the order of the families.
    :raises ValueError: if there are too few rows, or no row to train on.
    """
    if len(texts) < FEWEST:
        raise ValueError(
            f"There are {len(texts)} usable sequences, too few to split into rows for training, "
            f"validation and test; give {FEWEST} or more."
        )
    found = families(texts, tokens, molecules=molecules)
    if parts is None:
        return _split(_assigned(found, SHARES, seed), found, f"families by {found.rule}")
    numbers = _given(parts, found, seed)
    return _split(numbers, found, f"as the file says; errors over families by {found.rule}")


def _split(part: Ids, found: Families, rule: str) -> Split:
    train, valid, test = (np.flatnonzero(part == number) for number in range(len(PARTS)))
    if not len(train) or not len(valid) or not len(test):
        empty = PARTS[[len(train), len(valid), len(test)].index(0)]
        raise ValueError(
            f"No sequence is left for {empty}: the families are too few or too large; give more "
            "sequences, or name a column with the parts by --split-column."
        )
    return Split(train, valid, test, found.ids[test], rule)


def _given(parts: Sequence[str], found: Families, seed: int) -> Ids:
    numbers = np.array([PARTS.index(part) for part in parts], dtype=np.int64)
    missing = [number for number in (1, 2) if not (numbers == number).any()]
    if missing:
        own = np.flatnonzero(numbers == 0)
        shares = [SHARES[n] if n in missing or n == 0 else 0.0 for n in range(len(PARTS))]
        some = Families(found.ids[own], found.rule)
        numbers[own] = _assigned(some, shares, seed)
    return numbers


def _assigned(found: Families, shares: Sequence[float], seed: int) -> Ids:
    """Return the part of each row: 0 to train on, 1 for validation, 2 for the test."""
    sizes = np.bincount(found.ids)
    order = np.random.default_rng(seed).permutation(len(sizes))
    wanted = np.array(shares) / sum(shares) * len(found.ids)
    lacks = wanted.copy()
    part = np.zeros(len(sizes), dtype=np.int64)
    for family in order:
        size = sizes[family]
        fits = [n for n in (1, 2) if 0 < size <= max(lacks[n], 1.0 if lacks[n] > 0 else 0.0)]
        relative = {n: lacks[n] / max(wanted[n], 1.0) for n in (0, *fits)}
        part[family] = max(relative, key=lambda n: relative[n])
        lacks[part[family]] -= size
    return part[found.ids]
