"""Families of near copies, so that no part of a split holds what another was trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ppl_diffusion.tokenisers import canonical_smiles, molecule_library

SIMILAR = 0.5
"""Jaccard similarity of the k-mers of two rows from which on they are near copies."""
LARGEST = 0.5
"""Share of the rows above which one family cannot be kept together."""
_HASHES, _BAND = 32, 2
_CHANCE = 10.0
_SEED = 20_240_607
_WHOLE = (1 << 61) - 1
_ROWS = 4096  # whose hashes are held at once

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Families:
    """Which rows belong together.

    :param ids: family of each row, int64 ``(n,)``, counted from 0.
    :param rule: what makes rows a family, in words.
    """

    ids: Ids
    rule: str

    @property
    def count(self) -> int:
        return int(self.ids.max()) + 1 if len(self.ids) else 0


def families(
    texts: Sequence[str], tokens: Sequence[Sequence[int]], *, molecules: bool = False
) -> Families:
    """Put near copies together.

    Rows are near copies if at least half of all their k-mers are common to both; so are rows that
    near copies of one row lead to. Candidates are found by min-wise hashes (Broder 1997), so that
    time grows like the number of rows. Molecules are put together by their Murcko scaffold, where
    RDKit is installed; those without rings stand for themselves. If a family would hold more than
    half of the rows, only copies of one text are kept together.

    :param texts: the rows as text.
    :param tokens: the same as token ids.
    :param molecules: whether the texts are SMILES.
    """
    copies = _numbered(texts)
    found = _scaffolds(texts, copies) if molecules else None
    if found is None:
        found = _by_kmers(tokens, copies)
    if np.bincount(found.ids).max() > LARGEST * len(texts):
        share = np.bincount(found.ids).max() / len(texts)
        why = f"copies of one text only: by {found.rule} one family would hold {share:.0%} of rows"
        return Families(copies, why)
    return found


def _by_kmers(tokens: Sequence[Sequence[int]], copies: Ids) -> Families:
    _, firsts = np.unique(copies, return_index=True)
    once = [tokens[i] for i in firsts]
    k = word_length(once)
    words = [_kmers(row, k) for row in once]
    pairs = np.array([(a, b) for a, b in _similar(words)], dtype=np.int64).reshape(-1, 2)
    return Families(_joined(pairs, len(once))[copies], f"shared {k}-mers")


def word_length(tokens: Sequence[Sequence[int]]) -> int:
    """Return the ``k`` at which rows share few k-mers by chance.

    That is ``log(10 L) / H``, rounded up, from 2 up, for rows of ``L`` tokens of the entropy ``H``.
    """
    counts = np.array(list(Counter(token for row in tokens for token in row).values()))
    if len(counts) < 2:
        return 2
    share = counts / counts.sum()
    length = counts.sum() / len(tokens)
    entropy = float(-(share * np.log(share)).sum())
    return max(2, math.ceil(math.log(_CHANCE * length) / entropy))


def _kmers(row: Sequence[int], k: int) -> frozenset[int]:
    if len(row) <= k:
        return frozenset([hash(tuple(row))])
    return frozenset(hash(tuple(row[i : i + k])) for i in range(len(row) - k + 1))


def _similar(words: Sequence[frozenset[int]]) -> Iterator[tuple[int, int]]:
    """Give pairs that lead from any row to its near copies."""
    signatures = _signatures(words)
    for band in range(0, _HASHES, _BAND):
        first: dict[bytes, int] = {}
        for row, key in enumerate(signatures[:, band : band + _BAND]):
            other = first.setdefault(key.tobytes(), row)
            if other != row and _jaccard(words[row], words[other]) >= SIMILAR:
                yield other, row


def _signatures(words: Sequence[frozenset[int]]) -> NDArray[np.uint64]:
    """Return min-wise hashes of the k-mers of each row."""
    source = np.random.default_rng(_SEED)
    factors = source.integers(1, _WHOLE, (_HASHES, 1), dtype=np.uint64) | np.uint64(1)
    shifts = source.integers(0, _WHOLE, (_HASHES, 1), dtype=np.uint64)
    parts = []
    for start in range(0, len(words), _ROWS):
        some = words[start : start + _ROWS]
        sizes = np.array([len(row) for row in some])
        flat = np.array([word for row in some for word in sorted(row)], dtype=np.int64)
        mixed = flat.view(np.uint64) * factors + shifts
        mixed ^= mixed >> np.uint64(29)
        begins = np.concatenate([[0], sizes.cumsum()[:-1]])
        parts.append(np.minimum.reduceat(mixed, begins, axis=1).T)
    return np.ascontiguousarray(np.concatenate(parts))


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _scaffolds(texts: Sequence[str], copies: Ids) -> Families | None:
    try:
        molecule_library("rdkit.Chem", "mol")
    except ModuleNotFoundError:
        return None
    # Without rings a molecule stands for itself, however it is written.
    keys = [_scaffold(text) or f" {canonical_smiles(text) or text}" for text in texts]
    numbers = _numbered(keys)
    pairs = np.stack([copies, numbers + copies.max() + 1], axis=1)
    joined = _joined(pairs, int(pairs.max()) + 1)[copies]
    return Families(_numbered(joined.tolist()), "Murcko scaffolds")


def _scaffold(text: str) -> str:
    library = molecule_library("rdkit.Chem.Scaffolds.MurckoScaffold", "mol")
    if canonical_smiles(text) is None:
        return ""
    return str(library.MurckoScaffoldSmiles(smiles=text))


def _joined(pairs: Ids, count: int) -> Ids:
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    found: Ids = connected_components(graph, directed=False)[1].astype(np.int64)
    return found


def _numbered(keys: Sequence[object]) -> Ids:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
