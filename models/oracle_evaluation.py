"""What an oracle is worth: correlation, error and calibration on held-out families, beside ridges.

Rows of one family are near copies, so that error bars resample whole families.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse, special

from ppl_diffusion.models.datasets import BASES, NATIVE, YEAST_FILE, find_data
from ppl_diffusion.models.markov_baseline import kmers
from ppl_diffusion.models.oracles import Oracle

Array = NDArray[Any]
Report = dict[str, dict[str, Any]]
HALVES = ("design", "judge")
LEVELS = (0.5, 0.8, 0.95)
_MEDIA = ("complex", "defined")


@dataclass(frozen=True)
class Promoters:
    """Rows of the yeast reporter assay.

    :param x: bases, int64 ``(N, 80)``.
    :param y: expression in complex medium, float64 ``(N,)``.
    :param other: expression in defined medium, float64 ``(N,)``.
    :param kind: 1 native, 2 random, 0, 3 and 4 designed, ``(N,)``.
    :param split: 0 train, 1 valid, 2 test, ``(N,)``.
    """

    x: Array
    y: Array
    other: Array
    family: Array
    kind: Array
    split: Array

    def where(self, keep: Array) -> Promoters:
        """Return the rows where ``keep``, bool ``(N,)``, is true."""
        return Promoters(**{name: value[keep] for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.y)


def load_promoters(folder: str | Path | None = None) -> Promoters:
    with np.load(find_data(folder, YEAST_FILE), allow_pickle=False) as z:
        x, y, other = z["x"].astype(np.int64), *(z[f"y_{k}"].astype(float) for k in _MEDIA)
        return Promoters(x, y, other, z["family"], z["kind"], z["split"])


def evaluate_predictor(rows: Promoters, mean: Array, sd: Array | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "rows": len(rows),
        "families": len(np.unique(rows.family)),
        "r": _pearson(mean, rows.y),
        "r_interval": _family_interval(rows, mean),
        "rmse": float(np.sqrt(np.mean((mean - rows.y) ** 2))),
    }
    return result if sd is None else result | _calibration((rows.y - mean) / sd)


def _pearson(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _family_interval(rows: Promoters, mean: Array, repeats: int = 1000) -> list[float]:
    # Pearson's r needs only sums, and sums over resampled families are counts times family sums.
    _, inverse = np.unique(rows.family, return_inverse=True)
    y = rows.y
    moments = np.stack([np.ones_like(y), mean, y, mean * mean, y * y, mean * y], -1)
    sums = np.zeros((inverse.max() + 1, moments.shape[1]))
    np.add.at(sums, inverse, moments)
    picks = np.random.default_rng(0).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=repeats
    )
    n, a, b, aa, bb, ab = (picks @ sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))
    low, high = np.nanquantile(r, [0.025, 0.975])
    return [float(low), float(high)]


def _calibration(z: Array) -> dict[str, Any]:
    bounds = np.sqrt(2) * special.erfinv(np.array(LEVELS))
    coverage = [float(np.mean(np.abs(z) <= bound)) for bound in bounds]
    return {"z_sd": float(z.std()), "coverage": coverage}


def evaluate_oracle(oracle: Oracle, data: Promoters) -> Report:
    """Evaluate an oracle on the test rows, on the native ones among them, and on other natives."""
    return {
        part: evaluate_predictor(
            rows, *(a.double().numpy() for a in oracle.predict(torch.from_numpy(rows.x)))
        )
        for part, rows in _parts(data, oracle.config.half).items()
    }


def evaluate_ridges(data: Promoters, half: str = "") -> dict[str, Report]:
    """Evaluate ridges on 5-mer and 6-mer counts, fitted on one half, or on all rows if empty."""
    train = rows_of_half(data, half, split=0) if half else data.where(data.split == 0)
    parts = _parts(data, half)
    name = f"ridge ({half or 'all'})"
    return {
        f"{k}-mer {name}": {
            part: evaluate_predictor(rows, ridge(train, rows, k)) for part, rows in parts.items()
        }
        for k in (5, 6)
    }


def _parts(data: Promoters, half: str) -> dict[str, Promoters]:
    test = data.where(data.split == 2)
    parts = {"test": test, "native test": test.where(test.kind == NATIVE)}
    if half in HALVES:
        other = rows_of_half(data, HALVES[1 - HALVES.index(half)], split=0)
        parts["native, other half"] = other.where(other.kind == NATIVE)
    return parts


def rows_of_half(data: Promoters, half: str, *, split: int) -> Promoters:
    """Return the rows of one split, 0 train or 1 valid, that are dealt to one half."""
    rows = data.where(data.split == split)
    return rows.where(assign_halves(rows.family, rows.kind) == HALVES.index(half))


def assign_halves(family: Array, kind: Array) -> NDArray[np.int64]:
    """Deal families to the two halves: 0 designs, 1 judges."""
    names, first, inverse, size = np.unique(
        family, return_index=True, return_inverse=True, return_counts=True
    )
    digests = [hashlib.sha256(f"oracle|{name}".encode()).hexdigest() for name in names]
    rows: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    half = np.zeros(len(names), np.int64)
    for i in sorted(range(len(names)), key=lambda i: (-size[i], digests[i])):
        filled = rows[int(kind[first[i]])]
        half[i] = int(filled[1] < filled[0])
        filled[half[i]] += int(size[i])
    return half[inverse]


def ridge(train: Promoters, test: Promoters, k: int, penalty: float = 1000.0) -> Array:
    """Predict the expression of ``test`` from k-mer counts, as :func:`fit_ridge` fits it."""
    weights, intercept = fit_ridge(train, k, penalty)
    return _count_kmers(test.x, k) @ weights + intercept


def fit_ridge(train: Promoters, k: int, penalty: float) -> tuple[Array, float]:
    """Fit expression to centred k-mer counts."""
    counts = _count_kmers(train.x, k)
    centre, level = np.asarray(counts.mean(0)).ravel(), train.y.mean()
    gram = (counts.T @ counts).toarray() - len(train) * np.outer(centre, centre)
    gram[np.diag_indices_from(gram)] += penalty
    weights = np.linalg.solve(gram, counts.T @ (train.y - level))
    return weights, float(level - centre @ weights)


def _count_kmers(x: Array, k: int) -> Any:
    index = kmers(torch.from_numpy(x), k, len(BASES)).numpy()
    starts = np.arange(len(x) + 1) * index.shape[1]
    counts = sparse.csr_array((np.ones(index.size), index.ravel(), starts), (len(x), 4**k))
    counts.sum_duplicates()
    return counts


def error_correlation(oracles: Sequence[Oracle], data: Promoters) -> float:
    """Return how far two oracles err alike on test rows: the correlation of their residuals."""
    test = data.where(data.split == 2)
    first, second = (
        oracle(torch.from_numpy(test.x)).double().numpy() - test.y for oracle in oracles
    )
    return _pearson(first, second)


def print_table(results: dict[str, Report]) -> None:
    table = Table("predictor", "rows of", *(heading for heading, _, _ in _COLUMNS_OF_TABLE))
    for predictor, parts in results.items():
        for part, metrics in parts.items():
            table.add_row(predictor, part, *_cells(metrics))
    Console(width=120).print(table)


_COLUMNS_OF_TABLE: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("rows", "rows", str),
    ("families", "families", str),
    ("r", "r", lambda v: f"{v:.3f}"),
    ("95 % of r", "r_interval", lambda v: f"{v[0]:.2f} to {v[1]:.2f}"),
    ("RMSE", "rmse", lambda v: f"{v:.2f}"),
    ("z sd", "z_sd", lambda v: f"{v:.2f}"),
    ("inside 50/80/95 %", "coverage", lambda v: " / ".join(f"{100 * c:.0f}" for c in v)),
)


def _cells(metrics: dict[str, Any]) -> list[str]:
    return [text(metrics[key]) if key in metrics else "" for _, key, text in _COLUMNS_OF_TABLE]


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write what is known about an oracle as ``card.json``, and as prose in ``card.md``."""
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(_prose(card), encoding="utf-8")


def _prose(card: dict[str, Any]) -> str:
    facts = ("summary", "data", "licence", "halves", "training", "evaluation", "limits")
    lines = [f"# {card['name']}", ""]
    for fact in facts:
        lines += [f"**{fact.capitalize()}.** {card[fact]}", ""]
    headings = ("rows of", *(heading for heading, _, _ in _COLUMNS_OF_TABLE))
    table = [headings, ["---"] * len(headings)]
    table += [[part, *_cells(metrics)] for part, metrics in card["metrics"].items()]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in table]) + "\n"
