"""Plots of a particle posterior: the run, its weights, its family tree and its tokens.

Every function draws into ``ax`` (a new figure by default) and returns it; two that need a second
panel put both inside ``ax`` as ``ax.child_axes``. The numbers alone come from the function of the
same name with ``_data``. Matplotlib is imported when a plot is drawn, from the extra ``plot``;
without it there is an ``ImportError``.
Colours are those of Okabe and Ito (2008), which stay apart for colour-blind readers.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.diagnostics._plot_data import (
    PlotData,
    mark_lineages,
    plot_ancestry_data,
    plot_ess_data,
    plot_evidence_data,
    plot_token_entropy_data,
    plot_weights_data,
)
from ppl_diffusion.diagnostics.claims import disagreement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_diffusion.smc import ParticlePosterior

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY, PALE = "#E69F00", "#56B4E9", "#000000", "#707070", "#D9D9D9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)

_ROOT_COLOURS = COLOURS[:-1]  # black is for totals
_MAX_FAINT_EDGES = 50_000
_MAX_LINEAGES = 1_000


def plot_ess(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Effective sample size over ``N`` at each reverse step, one line per run.

    Dots mark the steps where a run was resampled, the dashed line the threshold that asks for it.
    """
    ax = new_axes(ax)
    data = plot_ess_data(posterior)
    for fraction, resampled in zip(data["ess_fraction"], data["resampled"], strict=True):
        ax.plot(data["step"], fraction, color=BLUE, alpha=_alpha(posterior), lw=1.2)
        ax.plot(data["step"][resampled], fraction[resampled], "o", color=VERMILLION, ms=3.5)
    legend_line(ax, "one run", color=BLUE)
    if data["resampled"].any():
        legend_line(ax, "resampled", color=VERMILLION, marker="o", ls="", ms=3.5)
    if np.isfinite(data["threshold"]):
        ax.axhline(float(data["threshold"]), color=GREY, ls="--", lw=1, label="threshold")
    ax.set(xlabel="reverse step", ylabel="ESS / particles", ylim=(-0.02, 1.05))
    _legend_above(ax)
    return ax


def plot_evidence(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Running log evidence of each run, their unbiased pooling, and two errors of one run.

    The band is one standard deviation of a single run as seen across runs, the bar at the end
    the same quantity as seen in the family tree. They should agree; a wider band says that the
    tree has collapsed and its estimate is too sure. A dead run's line stops where it died. The
    grey band runs from the lowest to the highest run; where they disagree a line says that no
    deviation is an error of their mean.
    """
    ax = new_axes(ax)
    data = plot_evidence_data(posterior)
    step, pooled, spread = data["step"], _finite(data["pooled"]), data["across_run_sd"]
    _range_of_runs(ax, data)
    for run in _finite(data["log_evidence"]):
        ax.plot(step, run, color=BLUE, alpha=_alpha(posterior), lw=0.9)
    legend_line(ax, "one run", color=BLUE, lw=0.9)
    ax.plot(step, pooled, color=BLACK, lw=1.8, label="log of the mean over runs")
    if np.isfinite(spread).any():
        style: dict[str, Any] = {"color": SKY, "alpha": 0.35, "lw": 0}
        ax.fill_between(step, pooled - spread, pooled + spread, label="±1 sd across runs", **style)
    _genealogical_bar(ax, data)
    ax.set(xlabel="reverse step", ylabel="log evidence (nats)")
    _legend_above(ax)
    return ax


def _range_of_runs(ax: "Axes", data: PlotData) -> None:
    runs = data["log_evidence"]
    if len(runs) < 2:
        return
    living = np.isfinite(runs)
    low = _finite(np.where(living, runs, np.inf).min(0))
    high = _finite(np.where(living, runs, -np.inf).max(0))
    style: dict[str, Any] = {"color": PALE, "alpha": 0.6, "lw": 0, "zorder": 0}
    ax.fill_between(data["step"], low, high, label="lowest to highest run", **style)
    if disagreement(runs[:, -1]) is not None:
        apart = high[-1] - low[-1]
        said = f"runs disagree by {apart:.1f} nats: the error of their mean is not known"
        ax.text(0.02, 0.02, said, transform=ax.transAxes, color=VERMILLION, fontsize="small")


def _genealogical_bar(ax: "Axes", data: PlotData) -> None:
    sd = float(data["genealogical_sd"])
    if np.isfinite(sd) and np.isfinite(data["pooled"][-1]):
        # beside the last step, so that band and bar can be compared
        at = data["step"][-1] + 0.03 * len(data["step"])
        style: dict[str, Any] = {"color": VERMILLION, "capsize": 4, "ms": 4, "lw": 1.6, "ls": ""}
        end = data["pooled"][-1]
        ax.errorbar(at, end, yerr=sd, label="±1 genealogical sd", marker="o", **style)
    else:
        legend_line(ax, "genealogical sd: degenerate", color=VERMILLION, ls="")


def plot_weights(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Histogram of the weights (left) and the weight held by the heaviest particles (right).

    A weight of ``1 / N`` stands at 0 of the histogram; weights of zero are counted in its title.
    The right panel has one line per run; the dotted curve is that of equal weights.
    """
    ax = new_axes(ax, (9.0, 3.6))
    left, right = panels(ax, (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 0.4, 1.0))
    data = plot_weights_data(posterior)
    left.hist(data["log10_scaled"], bins=30, color=BLUE)
    left.axvline(0.0, color=GREY, ls="--", lw=1)
    left.set(xlabel="log10 (N × weight)", ylabel="particles, all runs")
    total = posterior.num_runs * posterior.num_particles
    left.set_title(f"{data['num_zero']} of {total} weights zero", fontsize="medium")
    for cumulative in data["cumulative"]:
        right.plot(data["top"], cumulative, color=BLUE, alpha=_alpha(posterior), lw=1.2)
    right.plot(data["top"], data["top"] / len(data["top"]), color=GREY, ls=":", lw=1.2)
    right.set(xscale="log", xlabel="heaviest particles", ylabel="total weight", ylim=(0, 1.03))
    right.set_title("dotted: equal weights", fontsize="medium")
    return ax


def plot_ancestry(
    posterior: "ParticlePosterior", *, run: int = 0, ax: "Axes | None" = None
) -> "Axes":
    """Family tree of one run, coloured by the root (Eve) that a lineage goes back to.

    The six roots that hold most final weight have a colour, other surviving lineages are dark
    grey, lineages that died out pale. Of more than 1,000 particles 1,000 lineages are drawn, and
    the pale ones are left out above 50,000 edges. Below: how many roots are left, which bounds
    the number of independent samples of the early steps.

    :raises IndexError: if there is no such run.
    """
    ax = new_axes(ax, (7.0, 5.0))
    tree, count = panels(ax, (0.0, 0.32, 1.0, 0.68), (0.0, 0.0, 1.0, 0.26))
    data = plot_ancestry_data(posterior, run=run)
    _draw_tree(tree, data)
    title = f"run {run}" if data["weight"].any() else f"run {run} (dead)"
    tree.set(ylabel="particle, by descent", title=title, xlim=(0, posterior.num_steps))
    tree.tick_params(labelbottom=False)
    steps = np.arange(posterior.num_steps + 1)
    count.step(steps, data["num_roots"], where="mid", color=BLACK, lw=1.4)
    count.set(xlabel="reverse step", ylabel="roots left", xlim=tree.get_xlim())
    count.set_yscale("log", base=2)
    count.yaxis.set_major_formatter("{x:g}")
    return ax


def _draw_tree(ax: "Axes", data: PlotData) -> None:
    from matplotlib.collections import LineCollection

    segments, colours = _tree_segments(data)
    for kind, width in ((PALE, 0.5), (GREY, 0.7)):
        ax.add_collection(LineCollection(list(segments[colours == kind]), colors=kind, lw=width))
    for root, colour in _coloured_roots(data).items():
        ax.add_collection(LineCollection(list(segments[colours == colour]), colors=colour, lw=1.0))
        legend_line(ax, f"Eve {root}: {data['weight'][root]:.0%}", color=colour)
    ax.set_ylim(-1, data["root"].shape[1])
    if _coloured_roots(data):
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _tree_segments(data: PlotData) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Edges ``(E, 2, 2)`` from parent to child as (step, particle), and a colour for each."""
    parents, rank, drawn = data["parents"], data["rank"], _drawn(data)
    faint = drawn.size <= _MAX_FAINT_EDGES
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
    heaviest = np.argsort(-data["weight"], kind="stable")[: len(_ROOT_COLOURS)]
    held = [int(root) for root in heaviest if data["weight"][root] > 0]
    return dict(zip(held, _ROOT_COLOURS, strict=False))


def plot_token_entropy(posterior: "ParticlePosterior", *, ax: "Axes | None" = None) -> "Axes":
    """Entropy of the tokens at each position, in bits, under the weights of all runs.

    With a stored path: a map of position against reverse step, from noise (top) to data (bottom).
    It shows where and when the particles commit themselves; a position that is certain long
    before the end was fixed by few ancestors.

    :raises ParticleCollapse: if every run is dead.
    """
    ax = new_axes(ax, (7.5, 3.8))
    data = plot_token_entropy_data(posterior)
    if "entropy_steps" in data:
        image = ax.imshow(data["entropy_steps"], aspect="auto", cmap="cividis", vmin=0.0)
        ax.figure.colorbar(image, ax=ax, label="entropy (bits)")
        ax.set(ylabel="reverse step")
    else:
        ax.step(data["position"], data["entropy"], where="mid", color=BLUE)
        ax.set(ylabel="entropy of x0 (bits)", ylim=(0, None))
    plates = posterior.x0.shape[2:-1]
    ax.set(xlabel="position, plates side by side" if plates else "position")
    length = posterior.x0.shape[-1]
    for edge in range(length, len(data["position"]), length):
        ax.axvline(edge - 0.5, color=BLACK, lw=0.8)
    return ax


# ----------------------------------------------------------------------------------------------
# drawing


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


def _alpha(posterior: "ParticlePosterior") -> float:
    return max(0.15, min(0.8, 4 / posterior.num_runs))


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)


def legend_line(ax: "Axes", label: str, **style: Any) -> None:
    """Name in the legend what has many lines, or none of its own."""
    ax.plot([], [], label=label, **style)


def _legend_above(ax: "Axes") -> None:
    columns = 3 if len(ax.get_legend_handles_labels()[1]) == 3 else 2
    where: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    ax.legend(**where, ncols=columns, frameon=False, fontsize="small")
