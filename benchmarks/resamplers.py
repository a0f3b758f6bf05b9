"""What a resampling step costs, beside the `particles` package and a plain inverse of the CDF.

From log-weights to ancestors, random numbers included, in one thread. ``resampler_over_particles``
is our processor time over that of the scheme of the same name in `particles` (Chopin and
Papaspiliopoulos), whose loops are compiled by numba; compiling is not counted. Ours moves several
runs at once, `particles` one after another; its systematic scheme takes particles as they stand,
ours in random order. The baseline draws ``N`` independent ancestors with NumPy: sums of the
weights, and a binary search.

`particles` is no requirement: where it is not installed, its rows are missing and the table says
so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks._report import Row, run, table, verdict
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc import RESAMPLERS

GOALS = {"systematic": 3.0}
GOAL_PARTICLES = 4096
"""Of fewer particles the price is that of some thirty calls of NumPy, whatever their number."""
OURS, THEIRS, PLAIN = "ours", "particles", "plain numpy"


@dataclass(frozen=True)
class Population:
    """Sizes of what is resampled.

    :param num_particles: particles ``N`` per run.
    :param num_runs: runs ``R``.
    """

    num_particles: int
    num_runs: int = 1

    def log_weights(self) -> torch.Tensor:
        """Return log-weights of unit variance, ``(R, N)``."""
        shape = (self.num_runs, self.num_particles)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, dtype=torch.float64, generator=generator)


def find_particles() -> Any | None:
    """Return the module of resampling schemes of `particles`, None where it is not installed."""
    try:
        return import_module("particles.resampling")
    except ImportError:
        return None


def contenders(name: str, population: Population, particles: Any | None) -> dict[str, Callable]:
    """Return what is timed, by name; each call resamples all runs of the population.

    :param name: the scheme.
    :param population: the sizes.
    :param particles: from :func:`find_particles`.
    """
    scheme, log_w = RESAMPLERS[name], population.log_weights()
    needed = (population.num_runs, scheme.num_uniforms(population.num_particles))
    generator, rng, rows = torch.Generator().manual_seed(1), np.random.default_rng(1), log_w.numpy()

    def theirs() -> None:
        for row in rows:
            particles.resampling(name, particles.exp_and_normalise(row))

    def plain() -> None:
        for row in rows:
            sums = np.exp(row - row.max()).cumsum()
            np.searchsorted(sums, sums[-1] * rng.random(len(row)), side="right")

    made = {OURS: lambda: scheme(uniforms(needed, generator=generator), log_w), PLAIN: plain}
    return made if particles is None else {**made, THEIRS: theirs}


def seconds(calls: dict[str, Callable], repeats: int, loops: int) -> dict[str, list[float]]:
    """Return the processor seconds of a call, by turns, after a warm-up that compiles.

    :param calls: from :func:`contenders`.
    :param repeats: numbers for each.
    :param loops: calls behind a number.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.process_time()
            for _ in range(loops if turn else 2):
                call()
            found[name].append((time.process_time() - started) / loops)
    return {name: values[1:] for name, values in found.items()}


def measure_resamplers(quick: bool, console: Console) -> list[Row]:
    """Measure what a resampling step costs.

    :param quick: fewer repeats.
    :param console: where the table goes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `particles` and NumPy
    particles = find_particles()
    try:
        rows = [
            row
            for population in (
                Population(64),
                Population(64, num_runs=4),
                Population(1024),
                Population(4096),
            )
            for name in RESAMPLERS
            for row in measure_one(name, population, particles, 7 if quick else 25)
        ]
    finally:
        torch.set_num_threads(threads)
    _print(rows, particles is not None, console)
    return rows


def measure_one(name: str, population: Population, particles: Any | None, n: int) -> list[Row]:
    """Measure one scheme.

    :param name: the scheme.
    :param population: the sizes.
    :param particles: from :func:`find_particles`.
    :param n: repeats.
    """
    found = seconds(contenders(name, population, particles), n, loops=30)
    where = {
        "resampler": name,
        "num_particles": population.num_particles,
        "num_runs": population.num_runs,
    }
    single = {key: statistics.median(values) for key, values in found.items()}
    rows = [
        Row("resampling_time", 1e6 * single[key], "us", n, None, {**where, "method": key})
        for key in single
    ]
    rows.append(Row("resampler_over_plain", single[OURS] / single[PLAIN], "ratio", n, None, where))
    if THEIRS in single:
        whole = population == Population(GOAL_PARTICLES)
        goal = GOALS.get(name) if whole else None
        ratio = single[OURS] / single[THEIRS]
        rows.append(Row("resampler_over_particles", ratio, "ratio", n, goal, where))
    return rows


def _print(rows: list[Row], compared: bool, console: Console) -> None:
    made = table(
        "Resampling step: microseconds of processor time, from log-weights to ancestors",
        ["runs x particles", "scheme", OURS, THEIRS, PLAIN, "over particles", "goal"],
        "" if compared else "particles is not installed: its columns are empty (pip install it)",
    )
    places = dict.fromkeys(
        (
            row.coordinates["num_runs"],
            row.coordinates["num_particles"],
            row.coordinates["resampler"],
        )
        for row in rows
    )
    for runs, size, name in places:
        here = [
            row
            for row in rows
            if (row.coordinates["num_runs"], row.coordinates["num_particles"]) == (runs, size)
            and row.coordinates["resampler"] == name
        ]
        times = {
            row.coordinates["method"]: row.value for row in here if "method" in row.coordinates
        }
        ratio = next((row for row in here if row.name == "resampler_over_particles"), None)
        made.add_row(
            f"{runs} x {size:,}",
            name,
            *(f"{times[key]:.0f}" if key in times else "" for key in (OURS, THEIRS, PLAIN)),
            "" if ratio is None else f"{ratio.value:.2f}",
            "" if ratio is None else verdict(ratio),
        )
    console.print(made)


if __name__ == "__main__":
    run(measure_resamplers)
