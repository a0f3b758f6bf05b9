"""Look-ahead fills against the plain form: float64 tables of every site, normalised everywhere.

A whole :func:`~ppl_diffusion.smc.run_smc` with a network that costs next to nothing, so that what
is left is what the engine does with predictions. Both forms draw the same numbers and must return
the same sequences and evidence. Each run has a process of its own, one thread, and the forms take
turns; times are processor times, the least of the repeats.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._report import Row, run, table, verdict
from benchmarks.memory import peak_gb
from ppl_diffusion.denoisers.prediction import DensePrediction, Prediction
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.kernels.completions import Completions, TableCompletions
from ppl_diffusion.smc import FeynmanKac, run_smc

FORMS = ("plain", "lazy")


@dataclass(frozen=True)
class Case:
    """What is run.

    :param vocab_size: clean tokens ``V``.
    :param num_particles: particles ``N``.
    :param length: positions ``L``.
    :param num_steps: reverse steps ``T``.
    :param width: width of the hidden states of a network with a head; None for a table.
    :param twist: name of the twist.
    :param time_goal: largest ratio of times.
    :param memory_goal: largest ratio of peaks of memory above a process that does nothing.
    """

    vocab_size: int
    num_particles: int
    length: int
    num_steps: int
    width: int | None = None
    twist: str = "argmax"
    time_goal: float | None = None
    memory_goal: float | None = None

    @property
    def name(self) -> str:
        """The case in words."""
        kind = "table" if self.width is None else "head"
        return f"V={self.vocab_size:,}, {kind}, N={self.num_particles}, {self.twist}"


CASES = (
    Case(20_000, 64, 64, 8, width=16, time_goal=0.12, memory_goal=0.15),
    Case(4, 4096, 64, 64, time_goal=0.6),
    Case(256, 512, 64, 64, time_goal=0.25),
    Case(4, 4096, 64, 64, twist="persistent"),
    Case(4, 4096, 64, 64, twist="defensive"),
)
QUICK = (
    Case(20_000, 16, 32, 8, width=16),
    Case(4, 1024, 64, 64),
    Case(256, 64, 64, 64),
    Case(4, 1024, 64, 64, twist="persistent"),
    Case(4, 1024, 64, 64, twist="defensive"),
)
"""Smaller ones, without the goals of the full size."""


class LookUp:
    """A network of two look-ups: a row per position and state, and what the row before says."""

    kind, time_free = "cavity", True

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vocab_size = case.vocab_size
        columns = case.vocab_size if case.width is None else case.width
        states = case.vocab_size + 1
        rows = torch.randn(states, columns, generator=generator)
        self.rows = rows.log_softmax(-1) if case.width is None else rows
        self.weight = torch.randn(columns, case.vocab_size, generator=generator)
        if case.width is not None:
            self.hidden_size, self.hidden, self.head = case.width, self._look, self._head

    def _look(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        return self.rows[tokens.roll(1, -1)]

    def _head(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight).log_softmax(-1)

    def __call__(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return log-probabilities ``(*batch, L, V)``."""
        found = self._look(tokens, t)
        return self._head(found) if hasattr(self, "head") else found


class OnGrid(InterpolatingKernel):
    """The chain on its time grid, where every step has a look-ahead."""

    def on_events(self, free: int) -> None:
        """Never go from reveal to reveal."""


class Plain(OnGrid):
    """The straightforward form: tables of all sites, in float64, normalised everywhere."""

    def predict(self, carry: dict[str, Any], k: int) -> Prediction:
        """Return the table of all sites."""
        return DensePrediction(self.cavity_log_probs(carry, k))

    def completions(self, carry: dict[str, Any], k: int) -> Completions:
        """Return completions by the table of all sites."""
        return TableCompletions(self.posterior_mean(carry, k))


def usage(case: Case, form: str) -> tuple[float, float, str]:
    """Run one case.

    :param form: one of :data:`FORMS`.
    :returns: seconds of the processor, peak GB above what importing takes, and a digest of the
        sequences and of the evidence.
    """
    torch.set_num_threads(1)
    kind = Plain if form == "plain" else OnGrid
    kernel = kind(Absorbing(case.vocab_size), LookUp(case), num_steps=case.num_steps)
    chain = ReverseChain(kernel, case.length)
    model = FeynmanKac(chain, _potential, twist=case.twist)  # type: ignore[arg-type]
    before, started = peak_gb(), time.process_time()
    generator = torch.Generator().manual_seed(0)
    post = run_smc(model, case.num_particles, generator=generator, store_path=False)
    seconds = time.process_time() - started
    found = post.x0.numpy().tobytes() + post.log_evidence.numpy().tobytes()
    return seconds, peak_gb() - before, hashlib.sha256(found).hexdigest()


def _potential(x0: Tensor) -> Tensor:
    return (x0 % 4 == 0).sum(-1) * 0.1


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process.

    :param arguments: what it is called with.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def compare(case: Case, repeats: int) -> list[Row]:
    """Measure both forms in turns.

    :param repeats: runs of each.
    :raises RuntimeError: if they return other sequences or another evidence.
    """
    found: dict[str, list[tuple[float, float, str]]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            found[form].append(alone(usage, case, form))
    if len({digest for runs in found.values() for *_, digest in runs}) > 1:
        raise RuntimeError(f"the forms disagree at {case.name}.")
    (t0, m0), (t1, m1) = (
        (min(r[0] for r in found[form]), min(r[1] for r in found[form])) for form in FORMS
    )
    where = {"case": case.name, "length": case.length, "num_steps": case.num_steps}
    times = {"plain_seconds": t0, "seconds": t1}
    peaks = {"plain_gb": m0, "gb": m1}
    return [
        Row("fill_time", t1 / t0, "of plain", repeats, case.time_goal, {**where, **times}),
        Row("fill_memory", m1 / m0, "of plain", repeats, case.memory_goal, {**where, **peaks}),
    ]


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure whole runs with and without tables of all sites.

    :param quick: smaller cases, and one repeat instead of five.
    :param console: where a line of each case goes as it ends, and the table of all.
    """
    rows: list[Row] = []
    for case in QUICK if quick else CASES:
        found = compare(case, 1 if quick else 5)
        told = ", ".join(f"{row.name} {row.value:.3f} {row.unit}" for row in found)
        console.print(f"{case.name}: {told}")
        rows += found
    made = table(
        "Runs with a cheap network, beside float64 tables of every site",
        ["", "measure", "plain", "lazy", "ratio", "goal"],
    )
    for row in rows:
        c, timed = row.coordinates, row.name == "fill_time"
        name = "time" if timed else "memory"
        before, after = (
            (f"{c['plain_seconds']:.2f} s", f"{c['seconds']:.2f} s")
            if timed
            else (f"{c['plain_gb']:.3f} GB", f"{c['gb']:.3f} GB")
        )
        made.add_row(c["case"], name, before, after, f"{row.value:.3f}", verdict(row))
    console.print(made)
    return rows


if __name__ == "__main__":
    run(measure)
