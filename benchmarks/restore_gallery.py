"""The gallery of the README: test images of a set, measured, and restored in several ways.

A row is an operator and an image. Columns are the truth, what was measured, anchored posterior
sampling as published and as it is best here (one restoration each), and the mean and the standard
deviation of each pixel under APS with exact weights. All share one prior and one codec.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks._report import JsonFile, Quick, Row, console, table, write
from ppl_diffusion.imaging.metrics import psnr
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.restoration.figure import show, show_sd
from ppl_diffusion.restoration.images import decoded
from ppl_diffusion.restoration.question import Job, Question
from ppl_diffusion.restoration.run import Result, restore
from ppl_diffusion.restoration.target import build_target

if TYPE_CHECKING:
    from torch import Tensor

OPERATORS = ("sr4", "gblur", "mblur", "rinp", "box", "hdr", "nlblur", "phase")
QUICK = ("sr4", "rinp")
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "APS, published": ("aps", {"preset": "published"}),
    "APS, best": ("aps", {}),
    "APS-SMC, mean": ("aps-smc", {}),
}
HIGH = 0.3
"""Standard deviation of pixels in [-1, 1] that the brightest colour of every panel is."""
_SIDE = 0.95
"""Inches of a panel."""


@dataclass(frozen=True)
class Line:
    """One row of the gallery.

    :param operator: name of the operator.
    :param results: by the name of the column.
    """

    operator: str
    results: Mapping[str, Result]

    def image(self, column: str) -> Tensor:
        """Return what a column shows: the mean of weighted draws, else the first restoration."""
        result = self.results[column]
        if column.endswith("mean"):
            return result.images.mean
        # Not the best of several: a method that restores once is shown as what it does once.
        return decoded(result.target, result.posterior.x0[0, :1])[0]


def restored(
    name: str, operators: Sequence[str], *, noise: float, seed: int, particles: int
) -> Iterator[Line]:
    """Restore one test image for each operator, by every method.

    :param name: of the prior, and of the set of images.
    :param operators: one row each.
    :param noise: standard deviation of the noise.
    :param seed: of images, operators, noise and methods.
    :param particles: of the method with weights; the others restore once.
    """
    for row, operator in enumerate(operators):
        question = Question(f"{name}:{seed + row}", operator, noise)
        results = {}
        for column, (method, options) in METHODS.items():
            numbers = {"num_particles": particles, "num_runs": 1} if column.endswith("mean") else {}
            numbers = numbers or {"num_particles": 2, "num_runs": 1}
            search = Search(method=method, seed=seed + row, options=options, **numbers)
            results[column] = restore(build_target(Job(name, question, search)))
        yield Line(operator, results)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the gallery."""
    from matplotlib.figure import Figure

    columns = ["truth", "measured", *METHODS, "APS-SMC, s.d."]
    size = (_SIDE * len(columns) + 0.7, _SIDE * len(lines) + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    axes = figure.subplots(len(lines), len(columns), squeeze=False)
    for line, row in zip(lines, axes, strict=True):
        target = next(iter(line.results.values())).target
        measurement = target.measurement
        panels = [target.truth, measurement.operator.picture(measurement.y)]
        panels += [line.image(column) for column in METHODS]
        for ax, image in zip(row, panels, strict=False):
            show(ax, image)
        drawn = show_sd(row[-1], line.results["APS-SMC, mean"].images.sd, high=HIGH)
        row[0].set_ylabel(line.operator, fontsize=7)
    for ax, column in zip(axes[0], columns, strict=True):
        ax.set_title(column, fontsize=7)
    bar = figure.colorbar(drawn, ax=axes[:, -1], fraction=0.08, pad=0.04, aspect=40)
    bar.ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=110)


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """Return the PSNR of every restoration."""
    found = []
    for line in lines:
        for column, result in line.results.items():
            image, target = line.image(column), result.target
            residual = float(target.measurement.residual(image))
            where = {"task": line.operator, "method": column, "residual": residual}
            found.append(Row("psnr", float(psnr(image, target.truth)), "dB", 1, None, where))
    return found


def main(
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("restore.png"),
    quick: Quick = False,
    json_file: JsonFile = None,
    prior: Annotated[str, typer.Option(help="Prior, and set of its test images.")] = "digits",
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise.")] = 0.05,
    particles: Annotated[int, typer.Option(help="Particles of APS-SMC.")] = 64,
    seed: Annotated[int, typer.Option(help="Number of the first image, and seed.")] = 0,
) -> None:
    """Restore and draw; the quick form has two rows and few particles."""
    operators, number = (QUICK, 8) if quick else (OPERATORS, particles)
    lines = list(restored(prior, operators, noise=noise, seed=seed, particles=number))
    rows = rows_of(lines)
    made = table("PSNR (dB) of one image each", ["operator", *METHODS])
    for line in lines:
        own = [f"{r.value:.1f}" for r in rows if r.coordinates["task"] == line.operator]
        made.add_row(line.operator, *own)
    console().print(made)
    draw(lines, out)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
