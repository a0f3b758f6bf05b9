"""The plot of the Pareto benchmark: one column per budget, naturalness above, diversity below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MARKERS = "osD^v<>PXphd*"
Line = Mapping[str, Any]


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw and save the plot.

    :param lines: coordinates of the rows, in the order of the table: the prior comes first in each
        budget, and a dotted line shows where it is.
    :param path: the image; its folder is made if it is absent.
    """
    budgets = list(dict.fromkeys(line["budget_kind"] for line in lines))
    figure = Figure(figsize=(6.2 * len(budgets), 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(budgets), squeeze=False, sharex=True, sharey="row")
    for column, kind in enumerate(budgets):
        chosen = [line for line in lines if line["budget_kind"] == kind]
        _panel(panels[0, column], chosen, "bound")
        _panel(panels[1, column], chosen, "hamming")
        _staircase(panels[0, column], chosen)
        for row, height in enumerate(("bound", "hamming")):
            panels[row, column].axhline(chosen[0][height], color="grey", ls=":", lw=1, zorder=0)
        panels[0, column].set_title(f"about {chosen[0]['budget']:,} {_WORDS[kind]} per run")
        panels[1, column].set_xlabel("expression by the judge (units of the assay)")
        # The last options differ between budgets, and so do the names of methods.
        panels[1, column].legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize="small"
        )
    panels[0, 0].set_ylabel("lower bound on the prior's log-probability (nats)")
    panels[1, 0].set_ylabel("mean Hamming distance between designs (positions)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


_WORDS = {"evaluations": "network rows", "calls": "reward calls"}


def _panel(axes: Axes, lines: Sequence[Line], height: str) -> None:
    methods = list(dict.fromkeys(line["method"] for line in lines))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for index, method in enumerate(methods):
        chosen = [line for line in lines if line["method"] == method]
        axes.errorbar(
            [line["judged"] for line in chosen],
            [line[height] for line in chosen],
            xerr=[_error(line["judged_se"]) for line in chosen],
            yerr=[_error(line[f"{height}_se"]) for line in chosen],
            color=colours[index % len(colours)],
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor=None if chosen[0]["exact"] else "white",
            ms=6,
            lw=0.9,
            elinewidth=0.7,
            label=method if chosen[0]["exact"] else f"{method} (not exact)",
        )
    axes.grid(alpha=0.25)


def _error(value: float) -> float:
    return value if value == value else 0.0  # one run knows no error


def _staircase(axes: Axes, lines: Sequence[Line]) -> None:
    """Shade what the front of expression and bound dominates."""
    front = sorted((line["judged"], line["bound"]) for line in lines if line["on_front"])
    axes.step(*zip(*front, strict=True), where="pre", color="black", lw=6, alpha=0.12, zorder=0)
