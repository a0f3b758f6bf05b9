"""What an oracle is worth: correlation, error and calibration on held-out families, beside ridges.

Rows of one family are near copies, so that error bars resample whole families.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ppl_diffusion.models.oracles import Oracle
from scipy import sparse, special

Array = NDArray[Any]
LEVELS = (0.5, 0.8, 0.95)
NATIVE = 1  # the kind of native promoter fragments in the data file
_FILE = "dna/yeast_promoters_80bp.npz"


@dataclass(frozen=True)
class Promoters:
    """Rows of the yeast reporter assay.

    :param x: bases, int64 ``(N, 80)``.
    :param y: expression in complex medium, float64 ``(N,)``.
    :param other: expression in defined medium, float64 ``(N,)``.
    :param family: family of near copies, ``(N,)``.
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
        """Return the rows where ``keep`` is true.

        :param keep: bool ``(N,)``.
        """
        return Promoters(**{name: value[keep] for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.y)


def load_promoters(folder: str | Path | None = None) -> Promoters:
    """Read the yeast promoters.

    :param folder: the folder that holds ``dna/``; by default the environment variable
        ``PPL_DIFFUSION_DATA``.
    :raises FileNotFoundError: if the file is not there.
    """
    folder = folder or os.environ.get("PPL_DIFFUSION_DATA")
    if folder is None:
        raise FileNotFoundError(
            f"No data folder was given: pass --data, or set PPL_DIFFUSION_DATA, to the folder "
            f"that holds {_FILE}."
        )
    path = Path(folder) / _FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"The data folder {str(folder)!r} does not hold {_FILE}: check --data."
        )
    with np.load(path, allow_pickle=False) as z:
        x, y, other = (z[k].astype(t) for k, t in _COLUMNS)
        return Promoters(x, y, other, z["family"], z["kind"], z["split"])


_COLUMNS = (("x", np.int64), ("y_complex", np.float64), ("y_defined", np.float64))


def evaluate_predictor(rows: Promoters, mean: Array, sd: Array | None = None) -> dict[str, Any]:
    """Compare predictions with measurements.

    :param rows: the measurements.
    :param mean: predicted expression, ``(N,)``.
    :param sd: predicted standard deviation, ``(N,)``.
    :returns: ``rows``, ``families``, Pearson ``r`` with the central 95 % ``r_interval`` of a
        bootstrap over families, ``rmse``, and with ``sd`` also ``z_sd`` and the ``coverage`` of the
        central intervals of :data:`LEVELS`.
    """
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


def evaluate_oracle(oracle: Oracle, data: Promoters) -> dict[str, dict[str, Any]]:
    """Evaluate an oracle on the test rows, and on the native ones among them.

    :param oracle: the oracle.
    :param data: all rows.
    """
    test = data.where(data.split == 2)
    mean, sd = (a.double().numpy() for a in oracle.predict(torch.from_numpy(test.x)))
    return _all_and_native(test, mean, sd)


def evaluate_ridges(data: Promoters) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluate the baselines: ridges on 5-mer and 6-mer counts, fitted on **all** train rows.

    :param data: all rows.
    """
    train, test = data.where(data.split == 0), data.where(data.split == 2)
    return {f"{k}-mer ridge": _all_and_native(test, ridge(train, test, k)) for k in (5, 6)}


def _all_and_native(test: Promoters, mean: Array, sd: Array | None = None) -> dict[str, Any]:
    parts = {"test": np.ones(len(test), bool), "native test": test.kind == NATIVE}
    return {
        name: evaluate_predictor(test.where(keep), mean[keep], None if sd is None else sd[keep])
        for name, keep in parts.items()
    }


def ridge(train: Promoters, test: Promoters, k: int, penalty: float = 1000.0) -> Array:
    """Predict expression from k-mer counts by ridge regression.

    :param train: rows to fit.
    :param test: rows to predict.
    :param k: length of a k-mer.
    :param penalty: on the squared weights; the count features are centred, not scaled.
    """
    counts = _count_kmers(train.x, k)
    centre, level = np.asarray(counts.mean(0)).ravel(), train.y.mean()
    gram = (counts.T @ counts).toarray() - len(train) * np.outer(centre, centre)
    gram[np.diag_indices_from(gram)] += penalty
    weights = np.linalg.solve(gram, counts.T @ (train.y - level))
    return _count_kmers(test.x, k) @ weights - centre @ weights + level


def _count_kmers(x: Array, k: int) -> Any:
    windows = np.lib.stride_tricks.sliding_window_view(x, k, axis=1)
    index = windows @ (4 ** np.arange(k)[::-1])
    starts = np.arange(len(x) + 1) * index.shape[1]
    counts = sparse.csr_array((np.ones(index.size), index.ravel(), starts), (len(x), 4**k))
    counts.sum_duplicates()
    return counts


def error_correlation(oracles: Sequence[Oracle], data: Promoters) -> float:
    """Return how far two oracles err alike on test rows: the correlation of their residuals.

    :param oracles: two oracles.
    :param data: all rows.
    """
    test = data.where(data.split == 2)
    tokens = torch.from_numpy(test.x)
    first, second = (oracle(tokens).double().numpy() - test.y for oracle in oracles)
    return _pearson(first, second)


def print_table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print one line for each predictor and part of the test rows.

    :param results: predictor -> part -> metrics.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("predictor", "rows", "families", "r", "95 % of r", "RMSE", "z sd", "50/80/95 %")
    for predictor, parts in results.items():
        for part, metrics in parts.items():
            table.add_row(f"{predictor}, {part}", *(_format(metrics, key) for key in _KEYS))
    Console().print(table)


_KEYS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("rows", str),
    ("families", str),
    ("r", lambda v: f"{v:.3f}"),
    ("r_interval", lambda v: f"{v[0]:.3f} to {v[1]:.3f}"),
    ("rmse", lambda v: f"{v:.2f}"),
    ("z_sd", lambda v: f"{v:.2f}"),
    ("coverage", lambda v: " / ".join(f"{100 * c:.0f}" for c in v)),
)


def _format(metrics: dict[str, Any], key: tuple[str, Callable[[Any], str]]) -> str:
    name, text = key
    return text(metrics[name]) if name in metrics else ""


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write ``card.json`` and the same facts as prose in ``card.md``.

    :param folder: folder of the artefact.
    :param card: what is known about it.
    """
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(_prose(card), encoding="utf-8")


def _prose(card: dict[str, Any]) -> str:
    facts = ("summary", "data", "licence", "halves", "training", "limits")
    lines = [f"# {card['name']}", ""]
    for fact in facts:
        lines += [f"**{fact.capitalize()}.** {card[fact]}", ""]
    lines += ["| test rows | rows | families | r | 95 % of r | RMSE | z sd | 50/80/95 % inside |"]
    lines += ["| --- " * 8 + "|"]
    for part, metrics in card["metrics"].items():
        lines.append(f"| {part} | " + " | ".join(_format(metrics, k) for k in _KEYS) + " |")
    return "\n".join(lines) + "\n"
