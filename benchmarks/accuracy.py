"""Accuracy per network evaluation on problems with known answers.

For every method and budget: how far the law of one weighted draw of a run is from the target (total
variation, over whole sequences where they are few, else mean over positions), the error of the
log-evidence against the declared target of the finite chain and against the ideal one, the gap
between bounds of ``log Z`` from both sides, the mean log-potential and log-prior, and the cost of
one run: network rows, sequences the potential was asked about, time. Methods that search have no
evidence; methods whose weights are right for nothing are marked.

The law of one draw is the mean over runs of their weighted populations. Its noise is measured by
the runs themselves: half the distance between what even and odd runs found.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._accuracy_plans import Plan, full_plans, quick_plans
from benchmarks._accuracy_tables import LEGEND, show
from benchmarks._cases import Case, tv_of
from benchmarks._methods import Method
from benchmarks._report import Row, run
from benchmarks._two_sided import two_sided
from ppl_diffusion.smc import EvidenceBounds, ParticlePosterior

MAX_ELEMENTS = 2_000_000  # of the largest array of a batch of runs: about what a cache holds
COST_RUNS = 8  # rows are shared between runs that move side by side, so costs need runs alone
SEEDS = 10_000  # apart: one per batch of runs, in this order, so that no two share any


@dataclass(frozen=True)
class Outcome:
    """What a method returned over all runs.

    :param laws: histograms of even and of odd runs, each run of mass one.
    :param log_evidence: ``(R,)``.
    :param mean_potential: estimate of each run, ``(R,)``.
    :param mean_log_p: estimate of each run, ``(R,)``.
    :param seconds: time per run.
    :param evaluations: network rows of one run.
    :param potential_calls: sequences one run asked the potential about.
    :param exact: whether the weights are exact for the declared target.
    :param bounds: of ``log Z``, from both sides, where there are any.
    """

    laws: tuple[Tensor, Tensor]
    log_evidence: Tensor
    mean_potential: Tensor
    mean_log_p: Tensor
    seconds: float
    evaluations: float
    potential_calls: float
    exact: bool
    bounds: EvidenceBounds | None


def run_method(plan: Plan, case: Case, method: Method, size: int, seed: int = 0) -> Outcome:
    """Run a method many times.

    :param plan: the plan, for the number of runs.
    :param case: its case.
    :param method: the method.
    :param size: the budget ``N``.
    :param seed: seed of all runs.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "twist='sample'")  # what is to be shown
        return _run_method(plan, case, method, size, seed)


def _run_method(plan: Plan, case: Case, method: Method, size: int, seed: int) -> Outcome:
    seeds = iter(range(seed * SEEDS, (seed + 1) * SEEDS))
    runs = plan.runs_of(method)
    alone = method.build(case, size, 1)
    cost = [alone.run(seed=next(seeds)) for _ in range(min(COST_RUNS, runs))]
    batches, started = _batches(case, method, size, runs), time.perf_counter()
    posts = [method.build(case, size, batch).run(seed=next(seeds)) for batch in batches]
    seconds = (time.perf_counter() - started) / runs
    generator = torch.Generator().manual_seed(next(seeds))
    return Outcome(
        laws=_laws(case, posts),
        log_evidence=torch.cat([post.log_evidence for post in posts]),
        mean_potential=_mean(posts, case.log_potential),
        mean_log_p=_mean(posts, case.log_prior),
        seconds=seconds,
        evaluations=sum(post.num_evaluations for post in cost) / len(cost),
        potential_calls=sum(post.num_potential_calls for post in cost) / len(cost),
        exact=posts[0].exact,
        bounds=_bounds(plan, case, method, size, generator),
    )


def _batches(case: Case, method: Method, size: int, runs: int) -> list[int]:
    states = case.chain.length * case.chain.kernel.process.num_states
    batch = max(1, min(runs, MAX_ELEMENTS // (size * method.width * states)))
    return [min(batch, runs - done) for done in range(0, runs, batch)]


def _laws(case: Case, posts: Sequence[ParticlePosterior]) -> tuple[Tensor, Tensor]:
    def half(first: int) -> Tensor:
        pairs = [(post.x0[first::2], post.weights[first::2]) for post in posts]
        found = [case.histogram(x.flatten(0, 1), w.flatten()) for x, w in pairs]
        return torch.stack(found).sum(0)

    return half(0), half(1)


def _mean(
    posts: Sequence[ParticlePosterior], function: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if function is None:
        return torch.full((1,), torch.nan)
    return torch.cat([(post.weights * function(post.x0)).sum(-1) for post in posts])


def _bounds(
    plan: Plan, case: Case, method: Method, size: int, generator: torch.Generator
) -> EvidenceBounds | None:
    if not method.evidence:
        return None
    batches = _batches(case, method, size, min(plan.num_bounds, plan.runs_of(method)))
    found = [two_sided(method.build(case, size, n), case, n, generator) for n in batches]
    parts = [bounds for bounds in found if bounds is not None]
    if not parts:
        return None
    return EvidenceBounds(*(torch.cat([getattr(b, s) for b in parts]) for s in ("lower", "upper")))


# --- rows ----------------------------------------------------------------------------------------


def floor_row(case: Case, num_runs: int) -> Row:
    """Return the row of exact draws, the smallest distance that can be seen.

    :param case: the case.
    :param num_runs: number of draws.
    """
    floor, (mean_potential, mean_log_p) = case.floor(num_runs), case.means
    coordinates = {
        **_place(case),
        "method": "exact draws",
        "tv": floor,
        "tv_floor": floor,
        "log_z": case.ideal.log_z,
        "log_z_declared": case.log_z_declared,
        "mean_potential": mean_potential,
        "mean_log_p": mean_log_p,
        "exact": True,
    }
    return Row("accuracy", floor, "total variation", num_runs, coordinates=coordinates)


def _place(case: Case) -> dict[str, Any]:
    return {
        "problem": case.problem,
        "setting": case.setting,
        "kernel": case.kernel,
        "num_steps": case.num_steps,
        "tv_of": case.resolution,
        "tv_to": "ideal" if case.declared is None else "declared",
    }


def summarise(case: Case, method: Method, size: int, outcome: Outcome) -> Row:
    """Return the row of a method.

    :param case: the case.
    :param method: the method.
    :param size: the budget ``N``.
    :param outcome: what it returned.
    """
    even, odd = outcome.laws
    tv = case.distance(even + odd)
    coordinates = {
        **_place(case),
        "method": method.name,
        "num_particles": size,
        "tv": tv,
        "tv_floor": tv_of(even, odd) / 2,
        "tv_ideal": case.distance(even + odd, case.ideal),
        "mean_potential": float(outcome.mean_potential.mean()),
        "mean_log_p": float(outcome.mean_log_p.mean()),
        "evaluations": outcome.evaluations,
        "rows_requested": size * case.num_steps,
        "potential_calls": outcome.potential_calls,
        "seconds_per_run": outcome.seconds,
        "exact": outcome.exact,
    }
    if method.evidence:
        coordinates |= _evidence_errors(case, outcome.log_evidence)
    if outcome.bounds is not None:
        gap = {"gap_log_z": outcome.bounds.gap, "gap_log_z_se": outcome.bounds.gap_error}
        coordinates |= gap
    runs = len(outcome.log_evidence)
    return Row("accuracy", tv, "total variation", runs, coordinates=coordinates)


def _evidence_errors(case: Case, log_evidence: Tensor) -> dict[str, float]:
    squares = (log_evidence - case.log_z_declared) ** 2
    rmse = float(squares.mean().sqrt())
    ideal = (log_evidence - case.ideal.log_z) ** 2
    return {
        "rmse_log_z": rmse,
        "rmse_log_z_se": float(squares.std()) / (2 * max(rmse, 1e-12) * len(squares) ** 0.5),
        "rmse_log_z_ideal": float(ideal.mean().sqrt()),
        "bias_log_z": float(log_evidence.mean()) - case.log_z_declared,
    }


def goal_rows(plan: Plan, row: Row) -> Iterator[Row]:
    """Return a row for every goal of a measured one, with the coordinates of that.

    :param plan: the plan, for the goals.
    :param row: the measured row.
    """
    at = row.coordinates
    for (what, method, size), goal in plan.goals.items():
        if (method, size) == (at["method"], at["num_particles"]):
            unit = row.unit if what == "tv" else "nats"
            yield replace(row, name=what, value=at[what], unit=unit, goal=goal)


def measure_plan(plan: Plan) -> Iterator[Row]:
    """Run every method on one case.

    :param plan: the plan.
    """
    case = plan.case()
    yield floor_row(case, plan.num_runs)
    for size in plan.num_particles:
        for seed, method in enumerate(plan.methods):
            row = summarise(case, method, size, run_method(plan, case, method, size, seed))
            yield row
            yield from goal_rows(plan, row)


def measure(quick: bool, console: Console) -> list[Row]:
    """Compare methods on problems with known answers.

    :param quick: fewer cases and runs.
    :param console: where the tables go.
    """
    rows: list[Row] = []
    for plan in quick_plans() if quick else full_plans():
        found = list(measure_plan(plan))
        show(found, console)
        rows += found
    console.print(LEGEND, highlight=False)
    return rows


if __name__ == "__main__":
    run(measure)
