"""Quality of samples against the number of steps, for ancestral and Psi samplers.

Two measures that are reported together, as neither can be gamed without the other showing it: the
Jensen-Shannon divergence of the frequencies of short words to held-out sequences (repetitive, safe
samples score badly), and the entropy of the letters of a sequence beside that of held-out ones.
Words are 4 bases or 3 characters. The noise floor is the divergence that as many real sequences
have; it is common to all lines, so differences between lines mean more than their height. Errors
are standard errors, by leaving out one sequence at a time. Nothing but committed files is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks._references import Reference, find_reference, letter_entropy
from benchmarks._report import JsonFile, Quick, Row, console, table, write
from benchmarks._stopwatch import Stopwatch
from ppl_diffusion import models
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel, Kernel, first_hitting
from ppl_diffusion.kernels.psi import parse_psi
from ppl_diffusion.models.program import DiffusionProgram

PRIORS = ("yeast-promoter-uniform", "yeast-promoter", "tinyshakespeare-uniform")
FIRST_HITTING = "first-hitting"
_LARGE = 300_000  # parameters: such networks get fewer sequences
_BATCH = 32


@dataclass(frozen=True)
class Plan:
    """What is run for one prior.

    :param methods: Psi schedules by name, or ``"first-hitting"``.
    :param steps: numbers of steps.
    :param size: sequences per line.
    """

    methods: Sequence[str]
    steps: Sequence[int]
    size: int


def make_plan(program: DiffusionProgram, quick: bool) -> Plan:
    """Return what is run for a prior.

    :param program: the prior.
    :param quick: fewer steps, methods and sequences.
    """
    large = _num_parameters(program) > _LARGE
    methods = ["ancestral", "constant:0.95,t_on=0.5,t_off=0.1", "remdm-rescale:0.05"]
    if program.process.absorbing:
        methods = ["ancestral", "remdm-cap:0.01", FIRST_HITTING]
    if quick:
        uniform = not program.process.absorbing
        return Plan(methods[:2] if uniform else methods, (16, 64, 256), 24 if large else 96)
    if large:
        return Plan(methods, (16, 64, 256, 1024), 48)
    return Plan(methods, (16, 32, 64, 128, 256, 512, 1024), 96)


def _num_parameters(program: DiffusionProgram) -> int:
    network = program.denoiser
    return sum(p.numel() for p in network.parameters()) if isinstance(network, Transformer) else 0


def make_kernel(
    program: DiffusionProgram, method: str, num_steps: int, watch: Stopwatch
) -> tuple[Kernel, float]:
    """Return a kernel and how often it is expected to correct a token.

    :param program: the prior.
    :param method: see :class:`Plan`.
    :param num_steps: number of steps; first hitting takes one per position.
    :param watch: the network with its counters.
    """
    process = program.process
    if method == FIRST_HITTING:
        return first_hitting(process, watch, length=program.length), 0.0
    schedule = parse_psi(method, process.schedule, num_steps).within(process)
    kernel = InterpolatingKernel(process, watch, psi=schedule)
    return kernel, schedule.expected_corrections


def measure_method(
    program: DiffusionProgram,
    reference: Reference,
    method: str,
    num_steps: int,
    size: int,
) -> Row:
    """Draw sequences and compare them with held-out ones.

    :param program: the prior.
    :param reference: held-out statistics.
    :param method: see :class:`Plan`.
    :param num_steps: number of steps.
    :param size: number of sequences, one of those that have a noise floor.
    """
    watch = Stopwatch(program.denoiser)  # type: ignore[arg-type]
    kernel, corrections = make_kernel(program, method, num_steps, watch)
    chain = ReverseChain(kernel, program.length)
    generator = torch.Generator().manual_seed(kernel.num_steps)
    texts: list[str] = []
    while len(texts) < size:
        rows = min(_BATCH, size - len(texts))
        texts += program.decode(chain.x0(chain.sample((rows,), generator=generator)))
    divergence, error = reference.divergence(texts)
    entropies = [letter_entropy(text) for text in texts]
    coordinates = {
        "prior": program.name,
        "method": method,
        "num_steps": kernel.num_steps,
        "se": error,
        "floor": reference.floors[size][0],
        "entropy": mean(entropies),
        "entropy_se": stdev(entropies) / math.sqrt(size),
        "entropy_held_out": reference.entropy,
        "corrections": corrections,
        "network_calls": watch.calls,
        "evaluations": watch.rows / size,
        "sequences": size,
        "order": reference.order,
    }
    return Row("word_divergence", divergence, "nats", size, None, coordinates)


def measure_prior(
    program: DiffusionProgram, reference: Reference, plan: Plan, console: Console
) -> list[Row]:
    """Measure every method at every number of steps, and what follows from it.

    :param program: the prior.
    :param reference: held-out statistics.
    :param plan: what to run.
    :param console: where progress goes.
    """
    rows = []
    for method in plan.methods:
        for num_steps in plan.steps[-1:] if method == FIRST_HITTING else plan.steps:
            row = measure_method(program, reference, method, num_steps, plan.size)
            rows.append(row)
            console.print(f"{program.name}, {method}, {num_steps} steps: {row.value:.4f} nats")
    return rows + list(conclude(rows))


def conclude(rows: Sequence[Row]) -> Iterator[Row]:
    """Say what the last steps brought, and how each method ends beside ancestral sampling.

    :param rows: of one prior, from :func:`measure_method`.
    """
    curves = {row.coordinates["method"]: _curve(rows, row) for row in rows}
    base = curves["ancestral"][-1]
    for method, curve in curves.items():
        if len(curve) > 1:
            yield _difference("gain_of_last_steps", _before(curve), curve[-1])
        if method != "ancestral":
            yield _difference("gain_over_ancestral", base, curve[-1])


def _curve(rows: Sequence[Row], like: Row) -> list[Row]:
    return [row for row in rows if row.coordinates["method"] == like.coordinates["method"]]


def _before(curve: Sequence[Row]) -> Row:
    """Return the line with a quarter of the steps of the last, or the nearest to it."""
    target = curve[-1].coordinates["num_steps"] / 4
    return min(curve[:-1], key=lambda row: abs(row.coordinates["num_steps"] - target))


def _difference(name: str, start: Row, end: Row) -> Row:
    a, b = start.coordinates, end.coordinates
    coordinates = {
        "prior": b["prior"],
        "method": b["method"],
        "se": math.hypot(a["se"], b["se"]),
        "from_steps": a["num_steps"],
        "num_steps": b["num_steps"],
    }
    return Row(name, start.value - end.value, "nats", end.n, None, coordinates)


def sentence(row: Row) -> str:
    """Put a difference into words; what is within two standard errors is no difference.

    :param row: from :func:`conclude`.
    """
    c, clear = row.coordinates, abs(row.value) > 2 * row.coordinates["se"]
    size = f"{abs(row.value):.4f} ± {c['se']:.4f} nats"
    if row.name == "gain_of_last_steps":
        span = f"{c['method']}: from {c['from_steps']} to {c['num_steps']} steps the divergence"
        change = "falls: it keeps improving" if row.value > 0 else "grows: it gets worse"
        return f"{span} {change} ({size})" if clear else f"{span} has saturated ({size})"
    verdict = "ends below" if row.value > 0 else "ends above"
    verdict = verdict if clear else "ends level with"
    return f"{c['method']}: {verdict} ancestral sampling ({size})"


def print_prior(rows: Sequence[Row], console: Console) -> None:
    """Print the table of one prior and what follows from it.

    :param rows: from :func:`measure_prior`.
    :param console: where the table goes.
    """
    lines = [row for row in rows if row.name == "word_divergence"]
    first = lines[0].coordinates
    made = table(
        f"{first['prior']}: divergence of {first['order']}-letter words to held-out sequences",
        ["method", "steps", "divergence", "entropy", "corrections", "calls"],
        f"nats; floor {first['floor']:.4f}, held-out entropy {first['entropy_held_out']:.4f}; "
        f"{first['sequences']} sequences a line; calls: network calls per sequence",
    )
    for row in lines:
        c = row.coordinates
        cells = (f"{row.value:.4f} ± {c['se']:.4f}", f"{c['entropy']:.4f} ± {c['entropy_se']:.4f}")
        counts = (f"{c['corrections']:.2f}", f"{c['evaluations']:.0f}")
        made.add_row(c["method"], str(c["num_steps"]), *cells, *counts)
    console.print(made)
    for row in rows:
        if row.name != "word_divergence":
            console.print(f"  {sentence(row)}", highlight=False)


def load_prior(name: str, console: Console) -> DiffusionProgram | None:
    """Return a prior, or None with a message where it is not shipped.

    :param name: name or folder.
    :param console: where the message goes.
    """
    try:
        return models.load(name)
    except ValueError as error:
        console.print(f"[yellow]Left out:[/] {error}")
        return None


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    prior: Annotated[
        list[str] | None, typer.Option(help="Name or folder of a prior; may be repeated.")
    ] = None,
) -> None:
    """Compare samplers by the quality of what they draw from the shipped priors."""
    screen, rows = console(), list[Row]()
    for name in prior or PRIORS:
        program = load_prior(name, screen)
        if program is not None:
            reference = find_reference(program.vocabulary, program.length)
            rows += measure_prior(program, reference, make_plan(program, quick), screen)
            print_prior([row for row in rows if row.coordinates["prior"] == program.name], screen)
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
