"""Plot of a comparison: evidence, a score against its cost, and effective sample size."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics._plot_data import PlotData
from ppl_diffusion.diagnostics.comparison import LOG_POTENTIAL, Comparison
from ppl_diffusion.diagnostics.plots import COLOURS, GREY, legend_line, new_axes, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIGURES = ("log_evidence", "ess", "evaluations")
_SHIFTS = (-0.12, 0.12)
_MARKERS = "osD^vP*X<>"
"""Colours come round after seven results, and markers move on: seventy look different."""


def plot_comparison_data(comparison: Comparison, *, score: str | None = None) -> PlotData:
    """Numbers of :func:`plot_comparison`; the second axis holds the run as it is and its share.

    :param score: name of the score; by default the first that all have besides the potential.
    :returns: ``label`` and ``target`` ``(C,)``; ``log_evidence``, ``score``, ``score_se``, ``ess``
        and ``evaluations`` ``(C, 2)``, NaN where there is none; ``log_evidence_interval`` and
        ``log_evidence_range`` (lowest and highest run) ``(C, 2, 2)``; ``name`` of the score ``()``.
    :raises ValueError: if not every contender has the score.
    """
    each = [row["scores"] for row in comparison.rows]
    names = [name for name in each[0] if all(name in scores for scores in each)]
    beside = [name for name in names if name != LOG_POTENTIAL]
    name = score or next(iter(beside), LOG_POTENTIAL)
    if name not in names:
        raise ValueError(
            f"plot_comparison: not every result has the score {name!r}; choose of "
            f"{', '.join(names)}."
        )
    pairs = [(row, row["equal"]) for row in comparison.rows]

    def column(number: Callable[[Mapping[str, Any]], Any]) -> NDArray[np.float64]:
        # None becomes NaN
        return np.array([[number(part) for part in pair] for pair in pairs], dtype=np.float64)

    return {
        "label": np.array([row["label"] for row in comparison.rows]),
        "target": np.array([row["target"] for row in comparison.rows]),
        "name": np.array(name),
        "score": column(lambda part: part["scores"][name]["mean"]),
        "score_se": column(lambda part: part["scores"][name]["se"]),
        "log_evidence_interval": column(lambda part: part["log_evidence_interval"] or (None, None)),
        "log_evidence_range": column(lambda part: part["log_evidence_range"] or (None, None)),
        **{key: column(itemgetter(key)) for key in _FIGURES},
    }


def plot_comparison(
    comparison: Comparison, *, score: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Evidence, a score against network rows, and effective sample size of several results.

    Filled marks are the runs as they are, open ones the share that the common budget pays for;
    bars are 95 % of the evidence (none where runs disagree) and one standard error of the score,
    and thin lines run from the lowest to the highest single run.
    Letters say which evidences have one target; a result without evidence has no mark.

    :param score: name of the score; by default the first that all have besides the potential.
    :param ax: where to draw; the panels become its ``child_axes``.
    :raises ValueError: if not every contender has the score.
    """
    data = plot_comparison_data(comparison, score=score)
    ax = new_axes(ax, (12.0, 4.2))
    evidence, against, size = panels(
        ax, (0.0, 0.0, 0.27, 1.0), (0.36, 0.0, 0.27, 1.0), (0.73, 0.0, 0.27, 1.0)
    )
    _by_contender(evidence, data, "log_evidence", "log evidence (nats)", letters=True)
    _ranges(evidence, data)
    _against_cost(against, data)
    _by_contender(size, data, "ess", "effective sample size")
    return ax


def _by_contender(
    ax: "Axes", data: PlotData, key: str, title: str, *, letters: bool = False
) -> None:
    ends = data.get(f"{key}_interval", np.full((*data[key].shape, 2), np.nan))
    places = range(len(data["label"]))
    for part, shift in enumerate(_SHIFTS):
        for place in places:
            value, (low, high) = data[key][place, part], ends[place, part]
            # The mean of the runs may lie outside what its own law gives it.
            error = np.array([[value - low], [high - value]]).clip(0)
            _mark(ax, place + shift, value, error, place, part)
    names = [
        f"{label} ({target})" if letters else str(label)
        for label, target in zip(data["label"], data["target"], strict=True)
    ]
    ax.set_xticks(places, names, rotation=30, ha="right")
    ax.set(xlim=(-0.6, len(places) - 0.4), title=title)


def _ranges(ax: "Axes", data: PlotData) -> None:
    """Draw how far apart single runs are; say why there is nothing where no result has any."""
    if not np.isfinite(data["log_evidence"]).any():
        ax.set_yticks([])
        said = "no evidence: every run is dead,\nor no result declares a law"
        ax.text(0.5, 0.5, said, transform=ax.transAxes, ha="center", va="center")
    for place, parts in enumerate(data["log_evidence_range"]):
        for (low, high), shift in zip(parts, _SHIFTS, strict=True):
            if high > low:
                ax.vlines(place + shift, low, high, color=_colour(place), lw=0.8, alpha=0.6)


def _against_cost(ax: "Axes", data: PlotData) -> None:
    for place, label in enumerate(data["label"]):
        for part in (0, 1):
            value, error = data["score"][place, part], data["score_se"][place, part]
            _mark(ax, data["evaluations"][place, part], value, error, place, part)
        legend_line(ax, str(label), marker=_marker(place), ls="", color=_colour(place))
    legend_line(ax, "equal evaluations", marker="o", ls="", color=GREY, mfc="white")
    title = str(data["name"]).replace("_", " ")
    ax.set(xlabel="network rows", title=title)
    ax.set_xlim(0, 1.08 * data["evaluations"].max())
    columns = 1 + len(data["label"]) // 6
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
    ax.legend(**where, ncols=columns, frameon=False, fontsize="small")


def _mark(ax: "Axes", x: float, y: float, error: Any, place: int, part: int) -> None:
    style: dict[str, Any] = {"color": _colour(place), "ms": 6, "capsize": 3}
    face = _colour(place) if part == 0 else "white"
    bar = error if np.isfinite(error).all() else None
    if np.isfinite(y):
        ax.errorbar(x, y, yerr=bar, mfc=face, ls="", marker=_marker(place), **style)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _marker(place: int) -> str:
    return _MARKERS[place // len(COLOURS) % len(_MARKERS)]
