"""Quality of names and molecules against network evaluations: masked, with a latent, learned noise.

The measure is the Jensen-Shannon divergence of the frequencies of short words, ends included, to
held-out sequences, in nats: lower is better. Words that contradict each other and samples that
repeat themselves both raise it; the entropy of letters stands beside it. The floor is what as many
real sequences score. All that is sampled with are networks of about as many parameters.

With ``--data`` there are bounds as well, in bits per token on test rows: each is that of the chain
with so many steps, none where the chain has none (a solver without noise). SEQ divides its
evaluations as ``LatentDiffusion.split_steps`` does: half go to the latent, but to codes no more
than one a slot. One evaluation leaves no room for a latent; there all methods are a masked step.
Learned noise has a prior for each number of steps, and with one step nothing to learn.

What a step leaves is the bound less the least that is known of the data, that of masked diffusion
with infinitely many steps, divided by the steps: total correlation of what is drawn at once, what
the chain forgets, and what a network did not learn, together; no bound tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks._few_step_methods import METHODS, Method, count_parameters
from benchmarks._kernel_distance import kernel_distance
from benchmarks._references import Reference, find_reference
from benchmarks._report import JsonFile, Quick, Row, console, table, write
from benchmarks._short_samples import HeldOutRows, describe, find_parser, read_rows
from ppl_diffusion import models
from ppl_diffusion.models.datasets import unpad
from ppl_diffusion.models.program import DiffusionProgram

DATASETS = ("names", "qm9")
EVALUATIONS = (1, 2, 4, 8, 10, 16, 32)
FEW = 10
"""Evaluations up to which a latent, or learned noise, is asked to win."""

_BATCH = 256


@dataclass(frozen=True)
class Plan:
    """How much is drawn.

    :param size: sequences a line, one of those that have a noise floor.
    :param bounded: test rows whose bound is estimated.
    :param datasets: data sets.
    """

    size: int
    bounded: int
    datasets: Sequence[str] = DATASETS


QUICK, FULL = Plan(1024, 128), Plan(1024, 1000)


@dataclass(frozen=True, eq=False)
class Case:
    """One data set and what its samples are held against.

    :param name: of the data set.
    :param reference: held-out statistics.
    :param rows: held-out rows, where there are data.
    """

    name: str
    reference: Reference
    rows: HeldOutRows | None = None


def measure(
    case: Case, name: str, method: Method, program: DiffusionProgram, evaluations: int, plan: Plan
) -> Row:
    """Draw sequences with so many evaluations and compare them with held-out ones.

    :param case: what they are held against.
    :param name: of the method.
    :param method: how the prior is sampled.
    :param program: the prior.
    :param evaluations: network evaluations, one a step.
    :param plan: how much is drawn.
    """
    chain, path = method.chain(program, evaluations)
    source = torch.Generator().manual_seed(evaluations)
    parts = [min(_BATCH, plan.size - k) for k in range(0, plan.size, _BATCH)]
    ids = torch.cat([chain.x0(chain.sample((rows,), generator=source)) for rows in parts])
    texts: list[str] = list(program.decode(ids))
    known = None if case.rows is None else case.rows.known()
    value, beside = describe(texts, case.reference, known)
    where = {
        "dataset": case.name,
        "prior": program.name,
        "method": name,
        "evaluations": chain.kernel.num_steps,
        "path": path,
        "parameters": count_parameters(program),
    }
    more = {**_with_data(case, ids), **_valid(case, texts)}
    bound = _bound(case, method, program, evaluations, plan)
    return Row("few_steps", value, "nats", plan.size, None, {**where, **bound, **beside, **more})


def _with_data(case: Case, ids: Tensor) -> dict[str, Any]:
    found = None if case.rows is None else kernel_distance(ids, case.rows.rows)
    return {"kernel_distance": found}


def _valid(case: Case, texts: Sequence[str]) -> dict[str, Any]:
    parser = find_parser() if case.name == "qm9" else None
    return {"valid": None if parser is None else mean(parser(unpad(text)) for text in texts)}


def _bound(
    case: Case, method: Method, program: DiffusionProgram, evaluations: int, plan: Plan
) -> dict[str, Any]:
    nothing = {"bound": None, "bound_se": None}
    if case.rows is None:
        return nothing
    test = case.rows.test
    count = min(plan.bounded, len(test))
    bits = method.bound(program, evaluations, _some(test, count))
    if bits is None:
        return nothing
    return {"bound": float(bits.mean()), "bound_se": float(bits.std()) / math.sqrt(count)}


def _some(rows: Tensor, count: int) -> Tensor:
    return rows[torch.arange(count) * len(rows) // count]


def say_what_is_left(
    case: Case, masked: DiffusionProgram, rows: Sequence[Row], plan: Plan
) -> list[Row]:
    """Add to rows what a step of their chains leaves, nats per sequence.

    :param case: the data set.
    :param masked: the prior whose bound with infinitely many steps is the least that is known.
    :param rows: from :func:`measure`.
    :param plan: how much is drawn.
    """
    if case.rows is None:
        return list(rows)
    test = _some(case.rows.test, min(plan.bounded, len(case.rows.test)))
    source = torch.Generator().manual_seed(0)
    least = float(masked.bound_terms(test, num_times=16, generator=source).mean())
    scale = test.shape[-1] * math.log(2.0)
    done = []
    for row in rows:
        c = row.coordinates
        bound = None if c["bound"] is None else c["bound"] * scale
        left = None if bound is None else (bound - least) / c["evaluations"]
        done.append(replace(row, coordinates={**c, "left_per_step": left}))
    return done


def compare(rows: Sequence[Row]) -> Iterator[Row]:
    """Say what each latent gains over masked diffusion with as many evaluations.

    :param rows: of one data set, from :func:`measure`.
    """
    plain = {r.coordinates["evaluations"]: r for r in rows if r.coordinates["method"] == "masked"}
    for row in rows:
        c = row.coordinates
        base = plain.get(c["evaluations"])
        if c["method"] == "masked" or base is None or c["evaluations"] == 1:
            continue
        same = {key: c[key] for key in ("dataset", "method", "evaluations")}
        error = math.hypot(c["se"], base.coordinates["se"])
        goal = 0.0 if c["evaluations"] <= FEW else None
        yield Row(
            "few_steps_over_masked", row.value - base.value, "nats", row.n, goal,
            {**same, "se": error},
        )  # fmt: skip


def print_case(rows: Sequence[Row], console: Console) -> None:
    """Print the table of one data set, and in how many lines a latent does better.

    :param rows: from :func:`measure` and :func:`compare`.
    :param console: where the table goes.
    """
    lines = [row for row in rows if row.name == "few_steps"]
    first = lines[0].coordinates
    made = table(
        f"{first['dataset']}: divergence of words to held-out sequences, nats (lower is better)",
        [
            "method",
            "evaluations",
            "path",
            "divergence",
            "entropy",
            "distinct",
            "valid",
            "bound",
            "left",
        ],
        f"floor {first['floor']:.4f} ± {first['floor_sd']:.4f}, held-out entropy "
        f"{first['entropy_held_out']:.4f}; {lines[0].n} sequences a line; bound: bits per token; "
        "left: nats a step",
    )
    for row in lines:
        c = row.coordinates
        quality = (f"{row.value:.4f} ± {c['se']:.4f}", f"{c['entropy']:.4f}")
        shares = (f"{c['distinct']:.3f}", _number(c["valid"]), _number(c["bound"]))
        left = _number(c.get("left_per_step"))
        made.add_row(c["method"], str(c["evaluations"]), c["path"], *quality, *shares, left)
    console.print(made)
    console.print(_sizes(lines), highlight=False)
    for row in rows:
        if row.goal is not None:
            console.print(f"  {sentence(row)}", highlight=False)


def _sizes(lines: Sequence[Row]) -> str:
    sizes = {row.coordinates["prior"]: row.coordinates["parameters"] for row in lines}
    return "Parameters at sampling: " + ", ".join(f"{k} {v:,}" for k, v in sizes.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def sentence(row: Row) -> str:
    """Put a comparison into words; what is within two standard errors is no difference.

    :param row: from :func:`compare`.
    """
    c = row.coordinates
    clear = abs(row.value) > 2 * c["se"]
    verdict = ("below" if row.value < 0 else "above") if clear else "level with"
    size = f"{row.value:+.4f} ± {c['se']:.4f} nats"
    return f"{c['method']} at {c['evaluations']} evaluations: {verdict} masked ({size})"


def load_priors(
    dataset: str, folder: Path | None, screen: Console
) -> Mapping[str, DiffusionProgram]:
    """Return the priors of a data set by method; what is missing is said and left out.

    :param dataset: name of the data set.
    :param folder: where trained priors lie in folders of their names, None for the shipped ones.
    :param screen: where messages go.
    """
    found: dict[str, DiffusionProgram] = {}
    for method, how in METHODS.items():
        try:
            found[method] = models.load(_place(how.prior_name(dataset), folder))
        except (ValueError, FileNotFoundError) as error:
            screen.print(f"[yellow]{method} on {dataset} is left out:[/] {error}")
    return found


def _place(name: str, folder: Path | None) -> str | Path:
    """Return where a prior lies: a run of training keeps it in a folder inside its own."""
    if folder is None:
        return name
    inner = folder / name / "prior"
    return inner if inner.is_dir() else folder / name


def measure_dataset(
    case: Case, priors: Mapping[str, DiffusionProgram], plan: Plan, screen: Console
) -> list[Row]:
    """Measure every method at every number of evaluations.

    :param case: the data set.
    :param priors: by method, from :func:`load_priors`.
    :param plan: how much is drawn.
    :param screen: where the table goes.
    """
    seen = None if case.rows is None else case.rows.train
    rows = [
        measure(case, name, METHODS[name], ready, evaluations, plan)
        for name, program in priors.items()
        for evaluations in EVALUATIONS
        if METHODS[name].takes(evaluations)
        for ready in [METHODS[name].ready(program, evaluations, seen)]
    ]
    rows = say_what_is_left(case, priors["masked"], rows, plan) if "masked" in priors else rows
    rows += list(compare(rows))
    print_case(rows, screen)
    return rows


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    data: Annotated[
        Path | None, typer.Option(help="Data folder, for bounds and the kernel distance.")
    ] = None,
    priors: Annotated[
        Path | None, typer.Option(help="Folder of trained priors, instead of the shipped ones.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only these data sets.")] = None,
) -> None:
    """Compare latents with masked diffusion at few network evaluations."""
    screen, plan, rows = console(), QUICK if quick else FULL, list[Row]()
    if unknown := set(dataset or ()) - set(DATASETS):
        raise typer.BadParameter(f"{min(unknown)!r} is none of {', '.join(DATASETS)}.")
    for name in dataset or plan.datasets:
        found = load_priors(name, priors, screen)
        if not found:
            continue
        program = next(iter(found.values()))
        reference = find_reference(program.vocabulary, program.length)
        case = Case(name, reference, None if data is None else read_rows(name, data))
        rows += measure_dataset(case, found, plan, screen)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
