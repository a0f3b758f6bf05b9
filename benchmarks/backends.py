"""The same problems on torch, op by op, and in JAX, compiled; and filters by other libraries.

``jax_over_torch`` is the time of a run of :class:`ppl_diffusion.numpyro.SMC` over that of
:class:`ppl_diffusion.inference.SMC`: same chain, potential, look-ahead and number of particles, for
a network that costs nothing (the exact denoiser of the problem B0), for a small transformer, and
for a shipped prior. ``evidence_error`` is the root mean square error of the log-evidence of both,
against the exact value where that is known, and otherwise against the evidence of all runs pooled;
``error_over_torch`` is the ratio. The torch engine asks the network about each distinct row once,
which compiled code with its fixed shapes cannot: the more particles share a state, the less there
is to gain.

``time_per_step``: the bootstrap filter of a hidden Markov model of 8 states and 8 symbols, by a
jitted scan that was written for it alone, by ``run_particles`` with ``ssp`` (and with
``systematic``, whose particles are shuffled first), by ``smc_scan`` over a NumPyro program, by the
torch engine, by Pyro's ``SMCFilter``, and by ``particles`` and ``blackjax`` where they are
installed, here or in the environment of a Python that ``--rivals`` names. ``time_over_scan`` and
``time_over_rival`` are ratios; the error is that against the forward algorithm.

All times are process times of one call, the median of rounds by turns; compiling is left out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import typer
from rich.console import Console

import ppl_diffusion
import ppl_diffusion.numpyro as ppn
from benchmarks import _jax_filters
from benchmarks._filters import HMM, by_pyro, by_smc_loop, pyro_evidence
from benchmarks._problems import Problem, declared_log_z
from benchmarks._report import JsonFile, Quick, Row, console, table, verdict, write
from benchmarks._worker import Worker
from benchmarks.samplers import backbone
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel

SCRIPT = Path(__file__).with_name("_rival_filters.py")
NUM_PARTICLES = (16, 256, 4096)
FILTER_STEPS = 100
SMALL_GOAL, SCAN_GOAL = 1 / 3, 1.5
TORCH, PYRO = "torch engine", "Pyro"
OURS = (_jax_filters.ENGINE, _jax_filters.PROGRAM)
WITH_GOAL = (PYRO, "particles")


# --- Chains --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A chain and a potential in both libraries.

    :param name: how tables call it.
    :param chain: the chain, in torch.
    :param log_g: ``x0 -> log G`` in torch, ``jax_log_g`` the same in JAX.
    :param log_z: the exact log-evidence, or None.
    :param small: whether the network is small, so that the goal applies.
    """

    name: str
    chain: ReverseChain
    log_g: Callable[[Any], Any]
    jax_log_g: Callable[[Any], Any]
    log_z: float | None
    small: bool = True


def cases() -> Iterator[Case]:
    """Make the cases, one after the other."""
    problem, steps = Problem.load("B0"), 8
    pair = jnp.asarray(problem.pair.numpy())

    def jax_log_g(x0: Any) -> Any:
        pairs = pair[x0[..., :-1], x0[..., 1:]].sum(-1)
        return pairs + problem.ends * (x0[..., 0] == x0[..., -1])

    log_z = declared_log_z(problem, steps)
    yield Case("B0, exact denoiser", problem.chain(steps), problem.log_potential, jax_log_g, log_z)
    network = backbone(4, 16, dim=32, depth=2)
    small = ReverseChain(InterpolatingKernel(Absorbing(4), network, num_steps=steps), 16)
    yield Case(
        "small transformer", small, partial(half_of, token=0), partial(half_of, token=0), None
    )
    shipped = ppl_diffusion.models.load("yeast-promoter").chain(num_steps=steps)
    half = partial(half_of, token=1)
    yield Case("yeast-promoter", shipped, half, half, None, small=False)


def half_of(x0: Any, token: int) -> Any:
    """Return half a nat for each of a token, ``(*batch,)``, in the library of ``x0``."""
    return 0.5 * (x0 == token).sum(-1)


Run = Callable[[int], np.ndarray]
"""``seed -> log-evidence of runs (R,)``."""


def both(case: Case, num_particles: int, num_runs: int = 1) -> dict[str, Run]:
    """Return the run of each library."""
    settings: dict[str, Any] = {"num_particles": num_particles, "num_runs": num_runs}
    ours = SMC(case.chain, case.log_g, twist="defensive", **settings)
    twin = ppn.SMC(ppn.from_torch(case.chain), case.jax_log_g, **settings)
    return {
        "torch": lambda seed: ours.run(seed=seed).log_evidence.numpy(),
        "JAX": lambda seed: twin.run(jax.random.key(seed)).log_evidence.numpy(),
    }


def measure_chain(case: Case, quick: bool) -> Iterator[Row]:
    """Time both libraries by turns, and compare their evidence.

    :param quick: fewer repeats, and less of what only waits for the network.
    """
    sizes = NUM_PARTICLES if case.small or not quick else NUM_PARTICLES[:1]
    for size in sizes:
        where: dict[str, Any] = {"case": case.name, "num_particles": size}
        rounds = (3 if quick else 9) if case.small else 1 if size > 256 else 3
        times = by_turns(both(case, size), rounds)
        torch_time, jax_time = (median(times[name]) for name in ("torch", "JAX"))
        found = {"torch_seconds": torch_time, "jax_seconds": jax_time}
        goal = SMALL_GOAL if case.small else None
        ratio = jax_time / torch_time
        yield Row("jax_over_torch", ratio, "ratio", rounds, goal, {**where, **found})
    yield from measure_errors(case, NUM_PARTICLES[0], 20 if quick else 200)


def measure_errors(case: Case, size: int, num_runs: int) -> Iterator[Row]:
    """Compare the evidence of independent runs of both libraries.

    :param size: particles of each.
    :param num_runs: runs behind an error.
    """
    where: dict[str, Any] = {"case": case.name, "num_particles": size}
    found = {name: run(0) for name, run in both(case, size, num_runs).items()}
    pooled = np.logaddexp.reduce(np.concatenate(list(found.values()))) - np.log(2 * num_runs)
    log_z = float(pooled) if case.log_z is None else case.log_z
    error = {name: float(np.sqrt(np.mean((x - log_z) ** 2))) for name, x in found.items()}
    told = {**where, "reference": "pooled runs" if case.log_z is None else "exact"}
    for name, value in error.items():
        yield Row("evidence_error", value, "nats", num_runs, None, {**told, "method": name})
    ratio = error["JAX"] / error["torch"]
    yield Row("error_over_torch", ratio, "ratio", num_runs, None, told)


def by_turns(runs: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Return process times, in seconds, after one run that is not counted.

    :param runs: what is timed, by seed.
    :param rounds: timed rounds.
    """
    for run in runs.values():
        run(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run(seed)
            times[name].append(time.process_time() - started)
    return times


# --- Filters -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Timed:
    """A filter, and how it is asked for its time.

    :param run: ``(particles, seed) -> (seconds, log evidence)``.
    :param evidence: another way to the evidence, where what is timed keeps none.
    """

    run: Callable[[int, int], tuple[float, float]]
    evidence: Callable[[int, int], float] | None = None

    @classmethod
    def here(cls, one: Callable[[int, int], float], **options: Any) -> Timed:
        """Return a filter of this process."""

        def run(size: int, seed: int) -> tuple[float, float]:
            started = time.process_time()
            evidence = one(size, seed)
            return time.process_time() - started, evidence

        return cls(run, **options)

    @classmethod
    def there(cls, worker: Worker, library: str) -> Timed:
        """Return a filter of another process."""

        def run(size: int, seed: int) -> tuple[float, float]:
            answer = worker.ask(library=library, num_particles=size, seed=seed)
            return answer["seconds"], answer["evidence"]

        return cls(run)


def rivals(model: HMM, pythons: list[str], stack: ExitStack) -> dict[str, Timed]:
    """Start a process of each Python, and return the filters of the libraries that it has.

    :param pythons: interpreters; one that has none of them is passed over.
    :param stack: what closes the processes.
    """
    found: dict[str, Timed] = {}
    tables = {name: table.tolist() for name, table in model.tables.items()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for python in pythons:
        worker = stack.enter_context(Worker([python, "-P", str(SCRIPT)], environment))
        for library in worker.ask(tables=tables)["libraries"]:
            found.setdefault(library, Timed.there(worker, library))
    return found


def measure_filters(pythons: list[str], rounds: int, num_seeds: int) -> Iterator[Row]:
    """Time the filters by turns, and compare their evidence.

    :param pythons: interpreters of rivals.
    :param rounds: timed rounds.
    :param num_seeds: runs behind an error.
    """
    model = HMM.random(FILTER_STEPS)
    ours = {name: Timed.here(one) for name, one in _jax_filters.filters(model).items()}
    ours[TORCH] = Timed.here(partial(by_smc_loop, model))
    ours[PYRO] = Timed.here(partial(by_pyro, model), evidence=partial(pyro_evidence, model))
    with ExitStack() as stack:
        found = ours | rivals(model, pythons, stack)
        for size in NUM_PARTICLES:
            seconds = _filter_times(found, size, rounds)
            yield from _filter_ratios(seconds, size, rounds)
            for name, one in found.items():
                where = {"method": name, "num_particles": size, "num_steps": FILTER_STEPS}
                error = _filter_error(one, model.log_evidence, size, num_seeds)
                yield Row("evidence_error", error, "nats", num_seeds, None, where)


def _filter_times(found: Mapping[str, Timed], size: int, rounds: int) -> dict[str, float]:
    for one in found.values():
        one.run(size, 0)  # compiles what is compiled
    times: dict[str, list[float]] = {name: [] for name in found}
    for seed in range(rounds):
        for name, one in found.items():
            times[name].append(one.run(size, seed)[0])
    return {name: median(spent) for name, spent in times.items()}


def _filter_ratios(seconds: Mapping[str, float], size: int, rounds: int) -> Iterator[Row]:
    shared = {"num_particles": size, "num_steps": FILTER_STEPS}
    for name, spent in seconds.items():
        where = {"method": name, **shared}
        yield Row("time_per_step", 1e6 * spent / FILTER_STEPS, "us", rounds, None, where)
    for name in (*OURS, _jax_filters.SHUFFLED):
        ratio = seconds[name] / seconds[_jax_filters.BY_HAND]
        goal = SCAN_GOAL if name == _jax_filters.ENGINE else None
        yield Row("time_over_scan", ratio, "ratio", rounds, goal, {"method": name, **shared})
    known = (_jax_filters.BY_HAND, _jax_filters.SHUFFLED, *OURS)
    for rival in (name for name in seconds if name not in known):
        for name in OURS:
            where = {"method": name, "rival": rival, **shared}
            goal = 1.0 if rival in WITH_GOAL else None
            ratio = seconds[name] / seconds[rival]
            yield Row("time_over_rival", ratio, "ratio", rounds, goal, where)


def _filter_error(one: Timed, exact: float, size: int, num_seeds: int) -> float:
    """Return the root mean square error of the log-evidence, in nats."""
    ask = one.evidence or (lambda size, seed: one.run(size, seed)[1])
    estimates = np.array([ask(size, seed) for seed in range(num_seeds)])
    return float(np.sqrt(np.mean((estimates - exact) ** 2)))


# --- Tables --------------------------------------------------------------------------------------


def _print_chains(rows: list[Row], terminal: Console) -> None:
    made = table(
        "A run of SMC with the defensive look-ahead, 8 steps",
        ["", "particles", "torch", "JAX", "JAX over torch", "goal"],
        "process time of a run, median; compiling is left out",
    )
    for row in (row for row in rows if row.name == "jax_over_torch"):
        c = row.coordinates
        made.add_row(
            c["case"],
            f"{c['num_particles']:,}",
            *(f"{1e3 * c[name]:.1f} ms" for name in ("torch_seconds", "jax_seconds")),
            f"{row.value:.2f}",
            verdict(row),
        )
    terminal.print(made)
    made = table(
        "Error of the log-evidence, nats (root mean square)",
        ["", "particles", "runs", "torch", "JAX", "ratio", "against"],
    )
    for row in (row for row in rows if row.name == "error_over_torch"):
        c = row.coordinates
        own = {
            r.coordinates["method"]: r.value
            for r in rows
            if r.name == "evidence_error" and r.coordinates.get("case") == c["case"]
        }
        cells = f"{own['torch']:.3f}", f"{own['JAX']:.3f}", f"{row.value:.2f}", c["reference"]
        made.add_row(c["case"], f"{c['num_particles']:,}", str(row.n), *cells)
    terminal.print(made)


def _print_filters(rows: list[Row], terminal: Console) -> None:
    title = f"Bootstrap filter of a hidden Markov model, T = {FILTER_STEPS}"
    sizes = [f"N = {size:,}" for size in NUM_PARTICLES]
    for what, name, digits in (
        ("us per step", "time_per_step", 1),
        ("error of the log-evidence, nats (root mean square)", "evidence_error", 3),
    ):
        made = table(f"{title}: {what}", ["", *sizes])
        own = [row for row in rows if row.name == name]
        for method in dict.fromkeys(row.coordinates["method"] for row in own):
            values = [row.value for row in own if row.coordinates["method"] == method]
            made.add_row(method, *(f"{value:.{digits}f}" for value in values))
        terminal.print(made)
    made = table("Ours over theirs, time", ["", *sizes, "goal"])
    ratios = [row for row in rows if row.name in ("time_over_scan", "time_over_rival")]
    for pair in dict.fromkeys(_pair(row) for row in ratios):
        own = [row for row in ratios if _pair(row) == pair]
        worst = max(own, key=lambda row: row.value)
        made.add_row(" over ".join(pair), *(f"{row.value:.2f}" for row in own), verdict(worst))
    terminal.print(made)
    methods = {row.coordinates["method"] for row in rows if row.name == "time_per_step"}
    for library in ("particles", "blackjax"):
        if library not in methods:
            terminal.print(
                f"{library} is left out: it is not installed here. Install it in an environment of "
                "its own, and name that one's Python: --rivals PATH."
            )


def _pair(row: Row) -> tuple[str, str]:
    return row.coordinates["method"], row.coordinates.get("rival", _jax_filters.BY_HAND)


# --- The command ---------------------------------------------------------------------------------


def measure(quick: bool, pythons: list[str], terminal: Console) -> list[Row]:
    """Measure chains and filters.

    :param quick: fewer repeats.
    :param pythons: interpreters that have ``particles`` or ``blackjax``.
    :param terminal: where the tables go.
    """
    torch.set_num_threads(1)
    filter_rows = list(measure_filters(pythons, 5 if quick else 25, 20 if quick else 100))
    _print_filters(filter_rows, terminal)
    chain_rows = [row for case in cases() for row in measure_chain(case, quick)]
    _print_chains(chain_rows, terminal)
    return [*filter_rows, *chain_rows]


Rivals = Annotated[
    list[str] | None,
    typer.Option(help="Python of an environment with particles or blackjax; may be repeated."),
]


def main(rivals: Rivals = None, quick: Quick = False, json_file: JsonFile = None) -> None:
    """Compare torch, op by op, with JAX, compiled, and both with other people's filters."""
    pythons = [sys.executable, *(rivals or [])]
    write(measure(quick, pythons, console()), json_file)


if __name__ == "__main__":
    typer.run(main)
