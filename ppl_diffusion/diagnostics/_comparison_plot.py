"""Plot of a comparison: evidences law by law, a score against its cost, effective sample size."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics._drawing import (
    COLOURS,
    GREY,
    as_text,
    finite,
    legend_line,
    new_axes,
    panels,
    say,
)
from ppl_diffusion.diagnostics._plot_data import PlotData
from ppl_diffusion.diagnostics.comparison import LOG_POTENTIAL, Comparison

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
        ``log_evidence_range`` (lowest and highest run) ``(C, 2, 2)``; ``log_evidence_runs``
        ``(C, 2, R)``, every run, NaN beyond those there are; ``name`` of the score ``()``.
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
        "log_evidence_runs": _single_runs(comparison),
        **{key: column(itemgetter(key)) for key in _FIGURES},
    }


def _single_runs(comparison: Comparison) -> NDArray[np.float64]:
    """Log evidence of every run ``(C, 2, R)``, of the results as they are and of their shares."""
    each = [row["log_evidence_per_run"] for row in comparison.rows]
    runs = np.full((len(each), 2, max(1, *map(len, each))), np.nan)
    for place, (values, row) in enumerate(zip(each, comparison.rows, strict=True)):
        for part, kept in enumerate((row["num_runs"], row["equal"]["num_runs"])):
            known = np.array(values[:kept], dtype=np.float64)  # None becomes NaN
            runs[place, part, : len(known)] = known
    return runs


def plot_comparison(
    comparison: Comparison, *, score: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Evidence, a score against network rows, and effective sample size of several results.

    Filled marks are the runs as they are, open ones the share that the common budget pays for.
    Evidences stand in one panel for each target letter, because those of different laws cannot be
    compared: dots are single runs, thin lines go from the lowest to the highest, marks are the log
    of their mean, and broad lines its interval at nominal 95 %, missing where runs disagree. A
    result without evidence has no mark. Bars of the score are one standard error.

    :param score: name of the score; by default the first that all have besides the potential.
    :param ax: where to draw; the panels become its ``child_axes``, those of evidence first.
    :raises ValueError: if not every contender has the score.
    """
    data = plot_comparison_data(comparison, score=score)
    known = np.isfinite(data["log_evidence"]).any(-1)
    letters = sorted(set(data["target"][known].tolist()))
    count = max(1, len(letters)) + 2
    ax = new_axes(ax, (4.0 * count, 4.2))
    boxes = [(k / count, 0.0, 0.8 / count, 1.0) for k in range(count)]
    *evidences, against, size = panels(ax, *boxes)
    for panel, letter in zip(evidences, letters, strict=False):
        places = np.flatnonzero(known & (data["target"] == letter)).tolist()
        _by_contender(panel, data, "log_evidence", f"log evidence (nats), target {letter}", places)
        _single(panel, data, places)
    if not letters:
        _by_contender(evidences[0], data, "log_evidence", "log evidence (nats)", [])
        evidences[0].set_yticks([])
        say(evidences[0], "no evidence: every run is dead,\nor no result declares a law")
    _against_cost(against, data)
    everyone = list(range(len(data["label"])))
    _by_contender(size, data, "ess", "effective sample size", everyone)
    return ax


def _by_contender(ax: "Axes", data: PlotData, key: str, title: str, places: list[int]) -> None:
    """Mark a figure of some contenders, one beside the other."""
    for at, place in enumerate(places):
        for part, shift in enumerate(_SHIFTS):
            _mark(ax, at + shift, data[key][place, part], np.nan, place, part)
    names = [as_text(str(data["label"][place])) for place in places]
    ax.set_xticks(range(len(places)), names, rotation=30, ha="right")
    ax.set(xlim=(-0.6, max(len(places), 1) - 0.4), title=title)


def _single(ax: "Axes", data: PlotData, places: list[int]) -> None:
    """Draw single runs, and what they are sure of together."""
    for at, place in enumerate(places):
        for part, shift in enumerate(_SHIFTS):
            low, high = finite(data["log_evidence_range"][place, part])
            if high > low:
                ax.vlines(at + shift, low, high, color=_colour(place), lw=0.8, alpha=0.6)
            low, high = finite(data["log_evidence_interval"][place, part])
            if high > low:
                ax.vlines(at + shift, low, high, color=_colour(place), lw=5, alpha=0.25)
            runs = finite(data["log_evidence_runs"][place, part])
            ax.scatter(np.full(len(runs), at + shift), runs, s=8, color=_colour(place), alpha=0.6)


def _against_cost(ax: "Axes", data: PlotData) -> None:
    for place, label in enumerate(data["label"]):
        for part in (0, 1):
            value, error = data["score"][place, part], data["score_se"][place, part]
            _mark(ax, data["evaluations"][place, part], value, error, place, part)
        legend_line(ax, str(label), marker=_marker(place), ls="", color=_colour(place))
    legend_line(ax, "equal evaluations", marker="o", ls="", color=GREY, mfc="white")
    title = as_text(str(data["name"]).replace("_", " ").strip())
    ax.set(xlabel="network rows", title=title)
    ax.set_xlim(0, 1.08 * max(1.0, data["evaluations"].max()))
    columns = 1 + len(data["label"]) // 6
    where: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
    ax.legend(**where, ncols=columns, frameon=False, fontsize="small")


def _mark(ax: "Axes", x: float, y: float, error: float, place: int, part: int) -> None:
    style: dict[str, Any] = {"color": _colour(place), "ms": 6, "capsize": 3}
    face = _colour(place) if part == 0 else "white"
    bar = error if np.isfinite(error) else None
    if np.isfinite(y):
        ax.errorbar(
            x, finite(np.array(y)), yerr=bar, mfc=face, ls="", marker=_marker(place), **style
        )


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _marker(place: int) -> str:
    return _MARKERS[place // len(COLOURS) % len(_MARKERS)]
