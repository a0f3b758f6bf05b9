"""What paths forget, exactly: two bits that agree in nine pairs of ten, and a code beside them.

Every line is an enumeration with the best possible network, so that what is left is the path's own
error: total variation of the generated pairs from the data, and the bound above the entropy. With
``--plot`` the table is drawn, beside the lines of ``benchmarks.few_steps`` where its JSON is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks._report import JsonFile, Quick, Row, console, table, write
from ppl_diffusion.kernels import Path as Levels
from ppl_diffusion.testing.latent_laws import LatentLaw
from ppl_diffusion.testing.latent_toys import LatentProblem, corr_bits

EVALUATIONS = (1, 2, 4, 8)
BITS = corr_bits(0.05)
USELESS = BITS.encoded(lambda x: (x[:, :1] == x[:, 1:]).long(), 2)
"""A code that says whether the bits agree: it knows much of them, and helps to draw neither."""

METHODS: Mapping[str, tuple[LatentProblem, Callable[[int], Levels | None]]] = {
    "masked": (BITS, Levels.masked),
    "joint": (BITS, Levels.joint),
    "ordered": (BITS, lambda n: None if n < 2 else Levels.ordered(n // 2)),
    "seq": (BITS, lambda n: None if n < 2 else Levels.sequential(1, n - 1)),
    "seq, useless code": (USELESS, lambda n: None if n < 2 else Levels.sequential(1, n - 1)),
}


def enumerate_paths() -> list[Row]:
    """Return total variation and bound of every method at every number of evaluations."""
    rows = []
    for name, (problem, make) in METHODS.items():
        for evaluations in EVALUATIONS:
            path = make(evaluations)
            if path is None:
                continue
            denoiser = problem.denoiser(unseen="uniform")
            law = LatentLaw.of(problem, path, denoiser)
            gap = law.nelbo - problem.entropy
            where = {"method": name, "evaluations": evaluations, "bound_gap": gap}
            rows.append(Row("total_variation", law.total_variation, "", 1, None, where))
    return rows


def show(rows: Sequence[Row], screen: Console) -> None:
    """Print the table.

    :param rows: from :func:`enumerate_paths`.
    :param screen: where it goes.
    """
    made = table(
        "Two bits that agree in 9 of 10 pairs, best possible networks",
        ["method", "evaluations", "total variation", "bound - H(X), nats"],
    )
    for row in rows:
        c = row.coordinates
        shown = (f"{row.value:.4f}", f"{c['bound_gap']:.4f}")
        made.add_row(c["method"], str(c["evaluations"]), *shown)
    screen.print(made)


def draw(rows: Sequence[Row], real: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw total variation, and quality on real data where there is any, against evaluations.

    :param rows: from :func:`enumerate_paths`.
    :param real: rows of ``benchmarks.few_steps``, or none.
    :param path: the picture.
    """
    from matplotlib.figure import Figure

    lines = [r for r in real if r["name"] == "few_steps" and r["dataset"] == "names"]
    figure = Figure(figsize=(10.0 if lines else 5.5, 4.0), layout="constrained")
    axes = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    exact = [{**r.coordinates, "value": r.value} for r in rows]
    _lines(axes[0], exact, "two bits, exact", "total variation from the data")
    if lines:
        _lines(axes[1], lines, "first names, trained networks", "divergence of words, nats")
        axes[1].axhline(lines[0]["floor"], color="grey", linestyle=":", label="real names")
        axes[1].legend()
    figure.savefig(path, dpi=110)


def _lines(axes: Any, points: Sequence[Mapping[str, Any]], title: str, unit: str) -> None:
    for name in dict.fromkeys(p["method"] for p in points):
        own = [(p["evaluations"], p["value"]) for p in points if p["method"] == name]
        axes.plot(*zip(*own, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel="network evaluations", ylabel=unit, xscale="log")
    ticks = sorted({p["evaluations"] for p in points})
    axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    axes.minorticks_off()
    axes.legend()


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table into this file.")] = None,
    few_steps: Annotated[
        Path | None, typer.Option(help="JSON of benchmarks.few_steps, drawn beside it.")
    ] = None,
) -> None:
    """Enumerate what paths forget; the quick form is the whole."""
    rows = enumerate_paths()
    show(rows, console())
    if plot is not None:
        real = [] if few_steps is None else json.loads(few_steps.read_text(encoding="utf-8"))
        draw(rows, real, plot)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
