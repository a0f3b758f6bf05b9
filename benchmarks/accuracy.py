"""Accuracy per network evaluation on problems with known answers.

For every method and number of particles: how far the law of one weighted draw per run is from the
ideal posterior (total variation; over whole sequences on B0, mean over positions on B1), the error
of the log-evidence against the declared target of the finite chain and against the ideal one, the
mean log-potential, and the cost of one run: network rows, sequences the potential was asked about,
time. Best-of-N keeps the best of N draws of the chain and has no evidence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._problems import (
    Problem,
    declared_log_z,
    sequence_code,
    total_variation,
)
from benchmarks._report import Row, run, table
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, PersistentFill, run_smc

MAX_ELEMENTS = 2_000_000  # of the largest array of a batch of runs: about what a cache holds
COST_RUNS = 8  # rows are shared between runs that move side by side, so costs need runs alone
FLOOR_REPEATS = 20


@dataclass(frozen=True)
class Method:
    """How particles are steered.

    :param name: how tables call it.
    :param twist: twist of :class:`FeynmanKac`.
    :param ess_threshold: of :func:`run_smc`; 0 never resamples.
    :param best: keep the particle of largest potential instead of weighing.
    """

    name: str
    twist: Any = None
    ess_threshold: float = 0.5
    best: bool = False

    @property
    def num_fills(self) -> int:
        """Completions per particle and step."""
        return getattr(self.twist, "num_fills", 1)


METHODS = (
    Method("best-of-n", ess_threshold=0.0, best=True),
    Method("importance", ess_threshold=0.0),
    Method("bootstrap"),
    Method("argmax", "argmax"),
    Method("persistent-4", PersistentFill(4)),
    Method("persistent-16", PersistentFill(16)),
)


@dataclass(frozen=True)
class Plan:
    """What is run on one problem.

    :param problem: name of the problem.
    :param num_steps: steps ``T`` of the chain; steps without a reveal cost no network row.
    :param num_particles: the sizes ``N``.
    :param num_runs: independent runs per method and size.
    """

    problem: str
    num_steps: int
    num_particles: tuple[int, ...]
    num_runs: int


FULL = (Plan("B0", 64, (8, 32), 10_000), Plan("B1", 128, (16, 64), 300))
QUICK = (Plan("B0", 64, (8, 32), 2_000), Plan("B1", 128, (16,), 300))


@dataclass(frozen=True)
class Reference:
    """The exact answers a plan is held against.

    :param plan: the plan.
    """

    plan: Plan

    @cached_property
    def problem(self) -> Problem:
        """The problem."""
        return Problem.load(self.plan.problem)

    @cached_property
    def declared(self) -> float:
        """Log normalising constant of the finite chain's own target."""
        return declared_log_z(self.problem, self.plan.num_steps)

    @cached_property
    def mean_potential(self) -> float:
        """Mean log-potential under the ideal posterior: ``d log Z / d scale`` at scale 1."""
        h = 1e-4
        up, down = (self.problem.scaled(1 + s).posterior.log_z for s in (h, -h))
        return (up - down) / (2 * h)

    def distance(self, draws: Tensor) -> float:
        """Return the total variation between an empirical law and the ideal posterior.

        :param draws: int64 ``(n, L)``.
        """
        exact, size = self.problem.posterior, self.problem.vocab_size
        if exact.table is not None:
            counts = torch.bincount(sequence_code(draws, size), minlength=len(exact.table))
            return float(total_variation(counts / len(draws), exact.table))
        hits = torch.nn.functional.one_hot(draws, size).to(torch.float64)
        return float(total_variation(hits.mean(0), exact.marginals).mean())

    @cached_property
    def floor(self) -> float:
        """Mean distance of as many exact draws as there are runs."""
        generator = torch.Generator().manual_seed(1)
        draw = self.problem.posterior.draw
        distances = [
            self.distance(draw(self.plan.num_runs, generator)) for _ in range(FLOOR_REPEATS)
        ]
        return sum(distances) / FLOOR_REPEATS


@dataclass(frozen=True)
class Outcome:
    """What a method returned over all runs.

    :param draws: one draw per run, int64 ``(R, L)``.
    :param log_evidence: ``(R,)``.
    :param mean_potential: estimate of each run, ``(R,)``.
    :param seconds: time per run.
    :param evaluations: network rows of one run.
    :param potential_calls: sequences one run asked the potential about.
    """

    draws: Tensor
    log_evidence: Tensor
    mean_potential: Tensor
    seconds: float
    evaluations: float
    potential_calls: float


def run_method(
    problem: Problem, method: Method, num_steps: int, size: int, runs: int, seed: int = 0
) -> Outcome:
    """Run a method many times.

    :param problem: the problem.
    :param method: the method.
    :param num_steps: steps ``T`` of the chain.
    :param size: particles ``N``.
    :param runs: independent runs ``R``.
    :param seed: seed of all of them.
    """
    model = FeynmanKac(problem.chain(num_steps), problem.log_potential, twist=method.twist)
    generator = torch.Generator().manual_seed(seed)
    cost = [_smc(model, method, size, 1, generator) for _ in range(min(COST_RUNS, runs))]
    elements = size * method.num_fills * problem.length * problem.vocab_size
    batch = max(1, min(runs, MAX_ELEMENTS // elements))
    started = time.perf_counter()
    posts = [
        _smc(model, method, size, min(batch, runs - done), generator)
        for done in range(0, runs, batch)
    ]
    seconds = (time.perf_counter() - started) / runs
    drawn = [_draw(post, method, generator) for post in posts]
    return Outcome(
        draws=torch.cat([draws for draws, _ in drawn]),
        log_evidence=torch.cat([post.log_evidence for post in posts]),
        mean_potential=torch.cat([potential for _, potential in drawn]),
        seconds=seconds,
        evaluations=sum(post.num_evaluations for post in cost) / len(cost),
        potential_calls=sum(post.num_potential_calls for post in cost) / len(cost),
    )


def _smc(
    model: FeynmanKac, method: Method, size: int, runs: int, generator: torch.Generator
) -> ParticlePosterior:
    return run_smc(
        model,
        size,
        runs,
        ess_threshold=method.ess_threshold,
        generator=generator,
        store_path=False,
    )


def _draw(
    post: ParticlePosterior, method: Method, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return one draw per run, and each run's estimate of the mean log-potential."""
    if method.best:
        best = post.log_potential.argmax(-1, keepdim=True)
        draws = post.x0.take_along_dim(best[..., None], 1)[:, 0]
        return draws, post.log_potential.gather(1, best)[:, 0]
    draws = post.resample(1, generator=generator, pooled=False)["x0"][:, 0]
    return draws, (post.weights * post.log_potential).sum(-1)


def summarise(reference: Reference, method: Method, size: int, outcome: Outcome) -> Row:
    """Return the row of a method.

    :param reference: the exact answers.
    :param method: the method.
    :param size: particles ``N``.
    :param outcome: what it returned.
    """
    plan, tv = reference.plan, reference.distance(outcome.draws)
    coordinates = {
        "problem": plan.problem,
        "method": method.name,
        "num_particles": size,
        "num_steps": plan.num_steps,
        "tv": tv,
        "tv_floor": reference.floor,
        "mean_potential": float(outcome.mean_potential.mean()),
        "evaluations": outcome.evaluations,
        "rows_requested": size * plan.num_steps,
        "potential_calls": outcome.potential_calls,
        "seconds_per_run": outcome.seconds,
    }
    evidence = {} if method.best else _evidence_errors(reference, outcome.log_evidence)
    runs = len(outcome.draws)
    return Row("accuracy", tv, "total variation", runs, coordinates={**coordinates, **evidence})


def _evidence_errors(reference: Reference, log_evidence: Tensor) -> dict[str, float]:
    squares = (log_evidence - reference.declared) ** 2
    rmse = float(squares.mean().sqrt())
    ideal = (log_evidence - reference.problem.log_z) ** 2
    return {
        "rmse_log_z": rmse,
        "rmse_log_z_se": float(squares.std()) / (2 * rmse * len(squares) ** 0.5),
        "rmse_log_z_ideal": float(ideal.mean().sqrt()),
        "bias_log_z": float(log_evidence.mean()) - reference.declared,
    }


def floor_row(reference: Reference) -> Row:
    """Return the row of exact draws, the smallest distance that can be seen.

    :param reference: the exact answers.
    """
    plan, floor = reference.plan, reference.floor
    coordinates = {
        "problem": plan.problem,
        "method": "exact draws",
        "tv": floor,
        "log_z": reference.problem.log_z,
        "log_z_declared": reference.declared,
        "mean_potential": reference.mean_potential,
    }
    return Row("accuracy", floor, "total variation", plan.num_runs, coordinates=coordinates)


def measure_plan(plan: Plan) -> Iterator[Row]:
    """Run every method on one problem.

    :param plan: the plan.
    """
    reference = Reference(plan)
    yield floor_row(reference)
    for size in plan.num_particles:
        for seed, method in enumerate(METHODS):
            outcome = run_method(
                reference.problem, method, plan.num_steps, size, plan.num_runs, seed
            )
            yield summarise(reference, method, size, outcome)


def measure(quick: bool, console: Console) -> list[Row]:
    """Compare twists on problems with known answers.

    :param quick: fewer runs.
    :param console: where the tables go.
    """
    rows: list[Row] = []
    for plan in QUICK if quick else FULL:
        found = list(measure_plan(plan))
        _print(plan, found, console)
        rows += found
    return rows


COLUMNS = ("N", "TV", "RMSE log Z", "ideal", "bias", "mean r", "rows", "calls", "ms/run")


def _print(plan: Plan, rows: list[Row], console: Console) -> None:
    exact, *methods = rows
    c = exact.coordinates
    title = (
        f"{plan.problem}: log Z {c['log_z']:.3f} ideal, {c['log_z_declared']:.3f} declared by "
        f"T={plan.num_steps} steps; {plan.num_runs:,} runs"
    )
    caption = (
        "RMSE: against the declared log Z, then the ideal one. rows, calls: network rows and "
        "potential calls of one run.\nA potential of x0 alone leaves the bootstrap no weights to "
        "resample by: it is importance sampling with another seed."
    )
    made = table(title, ["", *COLUMNS], caption)
    made.add_row("exact draws", "", f"{c['tv']:.3f}", *[""] * 3, f"{c['mean_potential']:.2f}")
    for row in methods:
        made.add_row(*_cells(row))
    console.print(made)


def _cells(row: Row) -> Iterator[str]:
    c = row.coordinates
    yield c["method"]
    yield str(c["num_particles"])
    yield f"{c['tv']:.3f}"
    if "rmse_log_z" in c:
        yield f"{c['rmse_log_z']:.2f} ±{c['rmse_log_z_se']:.2f}"
        yield f"{c['rmse_log_z_ideal']:.2f}"
        yield f"{c['bias_log_z']:+.2f}"
    else:
        yield from ("-", "-", "-")
    yield f"{c['mean_potential']:.2f}"
    yield f"{c['evaluations']:.0f}"
    yield f"{c['potential_calls']:.0f}"
    yield f"{1e3 * c['seconds_per_run']:.1f}"


if __name__ == "__main__":
    run(measure)
