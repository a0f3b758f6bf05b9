"""What tokens lose when they are drawn at once, and what a code beside them saves: exact tables.

Two noisy copies of a fair bit, a code beside them, and the paths along which both can be drawn. The
network is the Bayes-optimal one, so that all that is lost is lost by the path: distance of what is
generated from the data, and the path's bound above their entropy. One code is the bit itself;
another says whether the two agree, which is no help; a third says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as File

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks._report import Row, run, table
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_toys import LatentProblem, corr_bits

DELTA = 0.05
PLOT = File("build") / "latent_paths.png"
_WORDS = {"total_variation": "total variation", "excess": "bound - entropy (nats)"}


def codes() -> dict[str, LatentProblem]:
    """Return the two bits beside three codes."""
    bits = corr_bits(DELTA)
    return {
        "the bit": bits,
        "whether they agree": bits.encoded(lambda x: (x[:, :1] == x[:, 1:]).long(), 2),
        "nothing": bits.encoded(lambda x: torch.zeros_like(x[:, :1]), 2),
    }


def paths(evaluations: int) -> dict[str, Path]:
    """Return the paths of so many network evaluations.

    :param evaluations: an even number, or one, which leaves no turns to take.
    """
    both = {"masked": Path.masked(evaluations), "joint": Path.joint(evaluations)}
    if evaluations == 1:
        return both
    ordered = Path.ordered(evaluations)
    return {**both, "ordered": ordered, "seq": Path.sequential(1, evaluations - 1)}


def measure(quick: bool, console: Console) -> list[Row]:
    """Follow two bits and a code along paths, exactly, and draw what is lost.

    :param quick: up to 4 evaluations, not 16.
    :param console: where the table goes.
    """
    rows: list[Row] = []
    made = table(
        "Two bits that differ from a third with probability 0.05",
        ["code", "path", "evaluations", *_WORDS.values()],
    )
    for code, problem in codes().items():
        network = problem.denoiser(unseen="uniform")
        for evaluations in (1, 2, 4) if quick else (1, 2, 4, 8, 16):
            for name, path in paths(evaluations).items():
                law = LatentLaw.of(problem, path, network)
                where = {"problem": code, "method": name, "evaluations": evaluations}
                values = (law.total_variation, law.nelbo - problem.entropy)
                units = zip(_WORDS, ("", "nats"), values, strict=True)
                rows += [Row(what, value, unit, 1, None, where) for what, unit, value in units]
                made.add_row(
                    code,
                    name,
                    str(evaluations),
                    *(f"{abs(round(value, 4)):.4f}" for value in values),
                )
    console.print(made)
    plot(rows, PLOT)
    console.print(f"wrote {PLOT}")
    return rows


def plot(rows: list[Row], path: File) -> None:
    """Draw what is lost against evaluations, one column per code.

    :param path: the image; its folder is made if it is absent.
    """
    names = list(dict.fromkeys(row.coordinates["problem"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, problem in enumerate(names):
        for row, (what, words) in enumerate(_WORDS.items()):
            axes = panels[row, column]
            chosen = [r for r in rows if r.name == what and r.coordinates["problem"] == problem]
            for method, points in _lines(chosen).items():
                axes.plot(list(points), list(points.values()), "o-", label=method)
            axes.set_xscale("log", base=2)
            axes.set_ylabel(words if column == 0 else "")
        panels[0, column].set_title(f"code: {problem}")
        panels[1, column].set_xlabel("network evaluations")
    panels[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _lines(rows: list[Row]) -> Mapping[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        at, method = row.coordinates["evaluations"], row.coordinates["method"]
        lines.setdefault(method, {})[at] = row.value
    return lines


if __name__ == "__main__":
    run(measure)
