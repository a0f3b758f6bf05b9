"""What a sample of names or molecules is worth, beside held-out ones.

Needed is the committed table only; the data folder adds what takes rows: the kernel distance, the
share of sequences that are known, and bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks._kernel_distance import kernel_distance
from benchmarks._references import Reference, letter_entropy
from ppl_diffusion.models.datasets import load_sequences, unpad

_MOST_ROWS = 2048  # of the kernel distance, whose cost grows with their square
_FLOOR_DRAWS = 8


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """Rows of a data set, for what the committed table cannot tell.

    :param rows: validation and test rows, evenly spread, int64 ``(n, L)``.
    :param test: test rows, for bounds.
    :param train: training rows.
    :param letters: the vocabulary.
    """

    rows: Tensor
    test: Tensor
    train: Tensor
    letters: str

    def known(self) -> frozenset[str]:
        """Return the training sequences, as they are spelt."""
        return frozenset(
            unpad("".join(self.letters[i] for i in row)) for row in self.train.tolist()
        )

    def floor(self, size: int) -> tuple[float, float]:
        """Return mean and standard deviation of the distance of training rows to held-out ones.

        :param size: how many training rows at a time.
        """
        source = torch.Generator().manual_seed(0)
        draws = [torch.randperm(len(self.train), generator=source) for _ in range(_FLOOR_DRAWS)]
        found = [kernel_distance(self.train[draw[:size]], self.rows) for draw in draws]
        return mean(found), stdev(found)


def read_rows(name: str, folder: Path) -> HeldOutRows:
    """Read the rows of a data set.

    :param name: ``"names"`` or ``"qm9"``.
    :param folder: the data folder.
    """
    data = load_sequences(name, folder)
    rows = torch.cat([data.valid, data.test])
    count = min(len(rows), _MOST_ROWS)
    spread = rows[torch.arange(count) * len(rows) // count]
    return HeldOutRows(spread, data.test, data.train, data.vocabulary)


def describe(
    texts: Sequence[str], reference: Reference, known: frozenset[str] | None = None
) -> tuple[float, dict[str, Any]]:
    """Return the divergence of a sample from held-out sequences, and what stands beside it.

    :param texts: decoded sequences, with their filling; as many as have a noise floor.
    :param reference: held-out statistics.
    :param known: training sequences, where there are any.
    """
    divergence, error = reference.divergence(texts)
    floor, spread = reference.floors[len(texts)]
    entropies = [letter_entropy(reference.spelt(text)) for text in texts]
    spelt = [unpad(text) for text in texts]
    return divergence, {
        "se": error,
        "floor": floor,
        "floor_sd": spread,
        "entropy": mean(entropies),
        "entropy_se": stdev(entropies) / math.sqrt(len(texts)),
        "entropy_held_out": reference.entropy,
        "distinct": len(set(spelt)) / len(spelt),
        "known": None if known is None else mean(text in known for text in spelt),
    }


def find_parser() -> Callable[[str], bool] | None:
    """Return what says whether a SMILES is a molecule, None where RDKit is not installed."""
    try:
        chem, log = import_module("rdkit.Chem"), import_module("rdkit.RDLogger")
    except ModuleNotFoundError:
        return None
    log.DisableLog("rdApp.*")
    return lambda text: bool(text) and chem.MolFromSmiles(text) is not None
