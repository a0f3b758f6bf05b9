"""Plots of a particle posterior: the run, its weights, its family tree and its tokens.

Every function draws into ``ax`` (a new figure by default) and returns it; those that need several
panels put them inside ``ax`` as ``ax.child_axes``. The numbers alone come from the function of the
same name with ``_data``. Matplotlib is imported when a plot is drawn, from the extra ``plot``;
without it there is an ``ImportError``. Every run has one colour and one name in all of them.
"""

from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics._drawing import (
    BLACK,
    DEAD,
    GREY,
    PALE,
    RUN_COLOURS,
    VERMILLION,
    finite,
    legend_beside,
    legend_line,
    name_runs,
    new_axes,
    panels,
    run_names,
    run_style,
    say,
    warn_above,
)
from ppl_diffusion.diagnostics._plot_data import (
    PlotData,
    mark_lineages,
    plot_ancestry_data,
    plot_ess_data,
    plot_evidence_data,
    plot_weights_data,
)
from ppl_diffusion.diagnostics._token_plot import plot_token_entropy as plot_token_entropy
from ppl_diffusion.smc.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_diffusion.smc import ParticlePosterior

_MAX_FAINT_EDGES = 50_000
_MAX_LINEAGES = 1_000
_MAX_TREES = 16
_KHAT_LIMIT = 0.7
_LOWEST = -12.0
"""Weights below ``10^-12 / N`` stand in the lowest bin: they are zero to every average."""


def plot_ess(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Effective sample size over ``N`` at each reverse step, one line per run.

    Dots mark the steps where a run was resampled, the dashed line the threshold that asks for it.
    """
    data = plot_ess_data(posterior)
    ax = new_axes(ax)
    for run, (fraction, dots) in enumerate(
        zip(data["ess_fraction"], data["resampled"], strict=True)
    ):
        ax.plot(data["step"], finite(fraction), lw=1.2, **_line(posterior, run))
        ax.plot(data["step"][dots], finite(fraction[dots]), **_dots(run, ms=3.5))
    name_runs(ax, run_names(posterior))
    if data["resampled"].any():
        legend_line(ax, "resampled", color=BLACK, marker="o", ls="", ms=3.5)
    if np.isfinite(data["threshold"]):
        ax.axhline(float(data["threshold"]), color=GREY, ls="--", lw=1, label="threshold")
    ax.set(xlabel="reverse step", ylabel="ESS / particles", ylim=(-0.02, 1.05))
    legend_beside(ax)
    warn_above(ax, posterior)
    return ax


def plot_evidence(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Running log evidence of each run and of all together; a point is where a run ends.

    The black line is the log of the mean evidence (unbiased before the logarithm), in which a dead
    run, whose line stops where it died, counts as zero. Beside its end stands the interval of all
    runs together, at nominal 95 %; where they disagree there is none, and a line says so.
    """
    data = plot_evidence_data(posterior)
    ax = new_axes(ax)
    step, runs = data["step"], finite(data["log_evidence"])
    for run, values in enumerate(runs):
        ax.plot(step, values, lw=0.9, **_line(posterior, run))
    for run, values in enumerate(runs):
        ax.plot(step[-1:], values[-1:], **_dots(run, ms=5))
    name_runs(ax, run_names(posterior), lw=0.9)
    ax.plot(step, finite(data["pooled"]), color=BLACK, lw=1.8, label="log of the mean")
    _draw_interval(ax, data)
    _say_about_runs(ax, posterior, data)
    ax.set(xlabel="reverse step", ylabel="log evidence (nats)")
    legend_beside(ax)
    warn_above(ax, posterior)
    return ax


def _draw_interval(ax: "Axes", data: PlotData) -> None:
    low, high = finite(data["interval"])
    if high > low:
        at = data["step"][-1] + 0.03 * len(data["step"])
        ax.vlines(at, low, high, color=BLACK, lw=4, alpha=0.4, label="95 %, nominal")


def _say_about_runs(ax: "Axes", posterior: "ParticlePosterior", data: PlotData) -> None:
    found = Evidence.of(data["log_evidence"][:, -1])
    if not bool(posterior.alive.any()):
        say(ax, DEAD)
    elif not np.isfinite(data["log_evidence"]).any():
        say(ax, "no evidence is estimated")
    elif found.ends is not None and found.interval is None:
        apart = found.ends[1] - found.ends[0]
        nats = f"{apart:.1f}" if apart < 1e6 else f"{apart:.0e}"
        said = f"runs disagree by {nats} nats: the error of their mean is not known"
        ax.text(0.02, 0.02, said, transform=ax.transAxes, color=VERMILLION, fontsize="small")


def plot_weights(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Histogram of the weights (left) and the weight held by the heaviest particles (right).

    A weight of ``1 / N`` stands at 0 of the histogram, runs upon each other; weights of zero are
    counted in its title. The right panel has one line per run; the dotted curve is that of equal
    weights. The k-hat of all particles together stands above it, those of the runs in the legend.
    """
    data = plot_weights_data(posterior)
    ax = new_axes(ax, (9.0, 3.6))
    left, right = panels(ax, (0.0, 0.0, 0.4, 1.0), (0.55, 0.0, 0.4, 1.0))
    _histogram(left, data, posterior.num_runs)
    total = posterior.num_runs * posterior.num_particles
    left.set_title(f"{data['num_zero']} of {total} weights zero", fontsize="medium")
    for run, cumulative in enumerate(data["cumulative"]):
        right.plot(data["top"], cumulative, lw=1.2, **_line(posterior, run, data["top"]))
    right.plot(data["top"], data["top"] / len(data["top"]), color=GREY, ls=":", lw=1.2)
    right.set(xscale="log", xlabel="heaviest particles", ylabel="total weight", ylim=(0, 1.03))
    right.minorticks_off()
    names = zip(run_names(posterior), data["khat"], strict=True)
    name_runs(right, [f"{name}: {_khat(shape)}" for name, shape in names])
    legend_line(right, "equal weights", color=GREY, ls=":")
    pooled = float(data["khat_pooled"])
    colour = VERMILLION if pooled > _KHAT_LIMIT else BLACK
    said = f"all: {_khat(pooled)} (limit {_KHAT_LIMIT})"
    right.set_title(said, fontsize="medium", color=colour)
    legend_beside(right)
    warn_above(ax, posterior)
    return ax


def _khat(shape: float) -> str:
    return f"k-hat {shape:.2f}" if np.isfinite(shape) else "no k-hat"


def _histogram(ax: "Axes", data: PlotData, num_runs: int) -> None:
    values = np.maximum(data["log10_scaled"], _LOWEST)
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    # Weights that are equal up to rounding have no range to divide.
    wide = (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)
    edges, below = np.linspace(*wide, 31), np.zeros(30)
    for run in range(num_runs):
        counts = below + np.histogram(values[data["run"] == run], bins=edges)[0]
        ax.stairs(counts, edges, baseline=below, fill=True, color=run_style(run)["color"])
        below = counts
    if not len(values):
        say(ax, DEAD)
    ax.axvline(0.0, color=GREY, ls="--", lw=1)
    ax.set(xlabel="log10 (N × weight)", ylabel="particles, all runs")


def plot_ancestry(
    posterior: "ParticlePosterior", *, run: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Family trees, coloured by the root (Eve) that a lineage goes back to.

    In each tree the six roots that hold most final weight have a colour, other surviving lineages
    are dark grey, lineages that died out pale. Of more than 1,000 particles 1,000 lineages are
    drawn, and the pale ones are left out above 50,000 edges. Below: how many roots are left in each
    run, which bounds the number of independent samples of the early steps.

    :param run: draw the tree of this run only; those of all, up to 16, if None.
    :raises IndexError: if there is no such run.
    """
    runs = list(range(posterior.num_runs)) if run is None else [run]
    shown = runs[:_MAX_TREES]
    each = {number: plot_ancestry_data(posterior, run=number) for number in runs}
    ax = new_axes(ax, (7.0, 5.0) if len(runs) == 1 else (9.0, 6.5))
    *trees, count = panels(ax, *_grid(len(shown)), (0.0, 0.0, 1.0, 0.2))
    names = run_names(posterior)
    for tree, number in zip(trees, shown, strict=True):
        _draw_tree(tree, each[number], _MAX_FAINT_EDGES // len(shown))
        roots = each[number]["num_roots"][-1]
        tree.set_title(f"{names[number]}: {roots} roots", fontsize="medium")
        tree.title.set_color(run_style(number)["color"] if len(runs) > 1 else BLACK)
        tree.set(xlim=(0, posterior.num_steps))
        tree.tick_params(labelbottom=False)
        if len(runs) > 1:
            tree.set(xticks=[], yticks=[])  # the counts below have the same steps
    if len(runs) == 1:
        trees[0].set_ylabel("particle, by descent")
        _name_roots(trees[0], each[runs[0]])
    _draw_counts(count, each)
    if len(runs) > len(shown):
        legend_line(count, f"{len(runs) - len(shown)} more runs: run=", ls="", color=GREY)
    if len(runs) > 1:
        name_runs(count, names)
        legend_beside(count)
    warn_above(ax, posterior)
    return ax


def _grid(size: int) -> list[tuple[float, float, float, float]]:
    """Places of trees in the upper part, row by row."""
    columns = ceil(sqrt(size))
    rows = ceil(size / columns)
    wide, high = 1 / columns, 0.72 / rows
    return [
        (k % columns * wide, 0.28 + (rows - 1 - k // columns) * high, 0.94 * wide, 0.8 * high)
        for k in range(size)
    ]


def _draw_counts(ax: "Axes", each: dict[int, PlotData]) -> None:
    for run, data in each.items():
        steps = np.arange(len(data["num_roots"]))
        style = run_style(run) if len(each) > 1 else {"color": BLACK}
        ax.step(steps, data["num_roots"], where="mid", lw=1.4, **style)
        ax.set(xlabel="reverse step", ylabel="roots left", xlim=(0, steps[-1]))
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}")


def _draw_tree(ax: "Axes", data: PlotData, max_faint: int) -> None:
    from matplotlib.collections import LineCollection

    segments, colours = _tree_segments(data, max_faint)
    for kind, width in ((PALE, 0.5), (GREY, 0.7)):
        ax.add_collection(LineCollection(list(segments[colours == kind]), colors=kind, lw=width))
    for colour in _coloured_roots(data).values():
        ax.add_collection(LineCollection(list(segments[colours == colour]), colors=colour, lw=1.0))
    ax.set_ylim(-1, data["root"].shape[1])


def _name_roots(ax: "Axes", data: PlotData) -> None:
    for root, colour in _coloured_roots(data).items():
        legend_line(ax, f"Eve {root}: {data['weight'][root]:.0%}", color=colour)
    if _coloured_roots(data):
        legend_beside(ax)


def _tree_segments(data: PlotData, max_faint: int) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Edges ``(E, 2, 2)`` from parent to child as (step, particle), and a colour for each."""
    parents, rank, drawn = data["parents"], data["rank"], _drawn(data)
    faint = drawn.size <= max_faint
    step, child = np.nonzero(drawn | faint)
    start = np.stack([step, rank[step, parents[step, child]]], axis=-1)
    end = np.stack([step + 1, rank[step + 1, child]], axis=-1)
    palette = np.full(parents.shape[1], GREY)
    for root, colour in _coloured_roots(data).items():
        palette[root] = colour
    colours = np.where(drawn[step, child], palette[data["root"][step + 1, child]], PALE)
    return np.stack([start, end], axis=1).astype(np.float64), colours


def _drawn(data: PlotData) -> NDArray[np.bool_]:
    """Whether the edge into each particle is on a lineage that is drawn, ``(T, N)``."""
    particles = data["parents"].shape[1]
    if particles <= _MAX_LINEAGES:
        return data["survives"][1:]
    chosen = np.linspace(0, particles - 1, _MAX_LINEAGES).astype(np.int64)
    return mark_lineages(data["parents"], np.argsort(data["rank"][-1])[chosen])[1:]


def _coloured_roots(data: PlotData) -> dict[int, str]:
    heaviest = np.argsort(-data["weight"], kind="stable")[: len(RUN_COLOURS)]
    held = [int(root) for root in heaviest if data["weight"][root] > 0]
    return dict(zip(held, RUN_COLOURS, strict=False))


def _line(
    posterior: "ParticlePosterior", run: int, points: NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Style of a run's line; one point alone has no line and needs a mark."""
    alone = (posterior.num_steps if points is None else len(points)) < 2
    return {**run_style(run), **({"marker": "_"} if alone else {})}


def _dots(run: int, *, ms: float) -> dict[str, Any]:
    return {"color": run_style(run)["color"], "marker": "o", "ls": "", "ms": ms}
