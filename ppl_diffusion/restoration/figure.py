"""The figure of a restoration: truth, measurement, what came of it, and how sure one can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_diffusion.imaging.metrics import unit
from ppl_diffusion.smc.verdict import Level

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ppl_diffusion.restoration.run import Result

UNSEEN = "#b9cfe4"
"""Pixels that were not measured."""
_COLOURS = "magma"
_JUDGED = ("restored", "mean")
_DOUBTS: Mapping[Level, str] = {"broken": "not to be trusted", "weak": "to be doubted"}
_ALARM = "firebrick"
_PANEL = 1.7
"""Inches."""


def restoration_figure(result: Result) -> Figure:
    """Draw a result: a row of what is known and found, a row of samples, a caption.

    Above them stands which rules found it broken or weak, if any did.
    """
    from matplotlib.figure import Figure

    panels = _panels(result)
    columns = max(len(panels) + 1, 5)
    figure = Figure(figsize=(_PANEL * columns, 1.95 * _PANEL), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    top, bottom = parts
    axes = top.subplots(1, len(panels) + 1)
    for ax, (title, image) in zip(axes, panels, strict=False):
        show(ax, image, title)
    drawn = show_sd(axes[-1], result.images.sd, "s.d. of pixels in [-1, 1]")
    top.colorbar(drawn, ax=axes[-1], fraction=0.046, pad=0.03).ax.tick_params(labelsize=6)
    row = bottom.subplots(1, len(result.samples))
    for ax, sample in zip(row, result.samples, strict=True):
        show(ax, sample)
    row[0].set_title(_of_the_posterior(result, "draws"), fontsize=8, loc="left")
    bottom.supxlabel(_caption(result), fontsize=7)
    doubts = _doubts(result)
    if doubts:
        figure.suptitle(doubts, fontsize=8, color=_ALARM)
    return figure


def show(ax: Axes, image: Tensor, title: str = "") -> None:
    """Draw an image without axes; what is NaN was not measured."""
    pixels = _pixels(image)
    unseen = np.asarray(np.isnan(pixels).any(-1, keepdims=True))
    canvas = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
    if unseen.any():
        from matplotlib.colors import to_rgb

        canvas = np.where(unseen, to_rgb(UNSEEN), canvas)
    ax.imshow(canvas, interpolation="nearest", vmin=0, vmax=1)
    _bare(ax, title)


def show_sd(ax: Axes, sd: Tensor, title: str = "", *, high: float | None = None) -> Any:
    """Draw standard deviations, of all channels together.

    :param sd: ``(C, H, W)`` of images in [-1, 1].
    :param high: what the brightest colour stands for, the largest of them if None.
    """
    together = sd.square().mean(0).sqrt().numpy()
    highest = max(float(together.max()), 1e-3) if high is None else high
    drawn = ax.imshow(together, cmap=_COLOURS, vmin=0, vmax=highest, interpolation="nearest")
    _bare(ax, title)
    return drawn


def _panels(result: Result) -> list[tuple[str, Tensor]]:
    measurement, truth = result.target.measurement, result.target.truth
    operator = measurement.operator
    seen = operator.picture(measurement.y.cpu())
    panels = [] if truth is None else [("truth", truth)]
    return [
        *panels,
        (f"measured ({operator.label}, noise {measurement.sigma:g})", seen),
        (f"restored\n({result.images.kind})", result.images.restored),
        (_of_the_posterior(result, "mean"), result.images.mean),
    ]


def _of_the_posterior(result: Result, what: str) -> str:
    """Say whose mean or draws are shown: those of a broken result are nobody's."""
    broken = any(verdict.level == "broken" for verdict in result.posterior.warnings)
    return f"posterior {what}" if result.posterior.exact and not broken else what


def _doubts(result: Result) -> str:
    """Return which rules found the result broken or weak, by their names."""
    found: dict[Level, dict[str, None]] = {level: {} for level in _DOUBTS}
    for verdict in result.posterior.warnings:
        if verdict.level in found:
            found[verdict.level][verdict.kind] = None
    return "; ".join(f"{_DOUBTS[at]}: {', '.join(kinds)}" for at, kinds in found.items() if kinds)


def _caption(result: Result) -> str:
    summary = result.summary
    figures = summary["metrics"]
    words = [summary["method"] + ("" if summary["exact"] else " (not exact)")]
    words += [f"residual of {n}: {_said(figures[n]['residual'], '.2f')}" for n in _JUDGED]
    words[-1] += " (1 if noise is all that is left)"
    if "psnr" in figures["mean"]:
        words += [f"PSNR of {n}: {_said(figures[n]['psnr'], '.1f', ' dB')}" for n in _JUDGED]
    return "; ".join(words)


def _said(value: float | None, form: str, unit: str = "") -> str:
    """Return a figure of a summary, which is None where it is not finite."""
    return "n/a" if value is None else f"{value:{form}}{unit}"


def _pixels(image: Tensor) -> NDArray[np.float64]:
    pixels: NDArray[np.float64] = unit(image.cpu().double()).permute(1, 2, 0).numpy()
    return pixels


def _bare(ax: Axes, title: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=8)
