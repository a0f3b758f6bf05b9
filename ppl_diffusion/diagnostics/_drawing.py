"""What the plots share: axes, panels, colours, and the names of runs.

Colours are those of Okabe and Ito (2008), which stay apart for colour-blind readers.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_diffusion.smc import Draws, ParticlePosterior

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY, PALE = "#E69F00", "#56B4E9", "#000000", "#707070", "#D9D9D9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
RUN_COLOURS = COLOURS[:-1]
"""Black is for totals."""
DEAD = "every run is dead: no particle has weight"
_RUN_LINES = ("-", "--", "-.", ":")
MAX_NAMES = 24
"""Runs that look different, and that a legend names."""
_LARGEST = 1e30
"""Beyond it Matplotlib's own arithmetic overflows."""


def new_axes(ax: "Axes | None", size: tuple[float, float] = (6.4, 3.8)) -> "Axes":
    """Return ``ax``, or the axes of a new figure if it is None."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plots need Matplotlib, which is not installed: pip install 'ppl-diffusion[plot]'"
        ) from error
    return plt.subplots(figsize=size, layout="constrained")[1]


def panels(ax: "Axes", *bounds: tuple[float, float, float, float]) -> list["Axes"]:
    """Put panels into ``ax``, each at left, bottom, width and height in shares of it."""
    ax.set_axis_off()
    return [ax.inset_axes(box) for box in bounds]


def run_style(run: int) -> dict[str, Any]:
    """Return colour and line of a run: 24 of them look different."""
    lines = run // len(RUN_COLOURS) % len(_RUN_LINES)
    return {"color": RUN_COLOURS[run % len(RUN_COLOURS)], "ls": _RUN_LINES[lines]}


def run_names(posterior: "ParticlePosterior") -> list[str]:
    """Return what legends call the runs."""
    return [f"run {run}{' (dead)' * (not a)}" for run, a in enumerate(posterior.alive.tolist())]


def name_runs(ax: "Axes", names: list[str], **style: Any) -> None:
    """Put runs into the legend, the first :data:`MAX_NAMES` of them."""
    for run, name in enumerate(names[:MAX_NAMES]):
        legend_line(ax, name, **run_style(run), **style)
    if len(names) > MAX_NAMES:
        legend_line(ax, f"and {len(names) - MAX_NAMES} more", ls="", color=GREY)


def legend_line(ax: "Axes", label: str, **style: Any) -> None:
    """Name in the legend what has many lines, or none of its own."""
    ax.plot([], [], label=as_text(label), **style)


def legend_beside(ax: "Axes") -> None:
    columns = 1 + len(ax.get_legend_handles_labels()[1]) // 15
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    ax.legend(**where, ncols=columns, frameon=False, fontsize="small")


def as_text(label: str) -> str:
    """Return a label that Matplotlib shows as it is: no formula, and never left out."""
    plain = label.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def say(ax: "Axes", text: str) -> None:
    """Write into the middle of a panel why there is nothing in it."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", wrap=True)


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers that can be drawn, NaN in place of others."""
    return np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), np.nan)


def warn_above(ax: "Axes", posterior: "Draws") -> None:
    """Name above a plot what the result is warned about."""
    kinds = dict.fromkeys(verdict.kind for verdict in posterior.warnings)
    if kinds:
        said = f"see posterior.warnings: {', '.join(kinds)}"
        ax.set_title(said, loc="left", color=VERMILLION, fontsize="small", pad=14)
