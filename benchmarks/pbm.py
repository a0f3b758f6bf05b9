"""Accuracy on measured binding landscapes, where every posterior is known exactly.

The space of all 65,536 DNA words of length 8 has been measured for many transcription factors.
Three posteriors over it are sampled: words that bind one factor; words that bind a factor and not
its paralog; the first with the prior squared. A row says how far the law of one weighted draw per
run is from the exact posterior (total variation: mean over positions, and over 16 intervals of
``log G``), how wrong the log-evidence is, whether the evidence is unbiased, what the means are, and
what a run cost. The last tables go along the trade-off between the two factors with the same random
numbers at every weight. The data are not shipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks._pbm_methods import (
    FILLS,
    METHODS,
    Outcome,
    methods_of,
    run_method,
    twist_error,
    two_sided_gap,
)
from benchmarks._pbm_problem import DataError, Landscape, Problem, find_data
from benchmarks._pbm_tables import grid_table, problem_table
from benchmarks._report import JsonFile, Quick, Row, console, write
from ppl_diffusion.smc import ArgmaxFill

TEMPERATURE = 0.05  # E-score per nat
FACTOR, PARALOG_OF, PARALOG = "SIX6", "PAX6", "PAX3"
MAIN_WEIGHT = 0.5
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
GRID_METHODS, GRID_SIZE = ("importance", "clamped, persistent"), 32
FLOOR_REPEATS = 20

NOTES = """\
n: network rows asked for per step (particles, or children of all lineages); rows and calls are the
distinct ones of a run alone. sites, bins: total variation; the first row is the noise floor. Z^/Z:
mean of estimated over exact evidence. gap: two-sided bound of log Z with multinomial resampling.
mean r: nats of log G. *: no declared target, no evidence. ESS: of draws of the prior. E: estimated
± standard error (exact). common: spread of the difference of the first E to the row above, over
what it would be had the two rows not shared their random numbers.
persistent: 16 completions with noise that travels with the particle.
Where rows miss:
- argmax: the background is nearly uniform, so that one completion, much the same for every state,
  says little about log G. Its errors enter the weights: the evidence is worse than that of
  importance sampling, and so heavy-tailed that the mean Z^ of all runs hangs on a few of them.
- published svdd: nothing pays for the choice of a child, so that with more children the positions
  get farther from the posterior.
- weighted svdd: four lineages, however many children; what their guesses get wrong stays.
- best-of-n and beam: optimisers; no tilt of the prior has their law.
- tempering: n / 7 particles, as every stage masks and reveals each again; too few to begin with.
- persistent fills at PAX6 not PAX3: most of the posterior is in words that the prior hardly draws
  and completions rarely hit; the error falls as n grows, and is larger at larger weights.
- common random numbers help where particles do not depend on the weight (importance), and hardly
  where they are chosen and resampled by it and the weights are this far apart."""


@dataclass(frozen=True)
class Plan:
    """How much is run.

    :param sizes: the sizes ``n`` of the methods: about ``8 n`` network rows per run.
    :param num_runs: independent runs per method and size.
    """

    sizes: tuple[int, ...]
    num_runs: int


FULL, QUICK = Plan((8, 32, 128), 600), Plan((8, 32), 300)


def make_problems(landscape: Landscape) -> tuple[Problem, ...]:
    """Return the problems of the tables.

    :param landscape: the measured E-scores.
    """
    one = landscape.factor(FACTOR) / TEMPERATURE
    words = f"bind {FACTOR}: log G = E / {TEMPERATURE}"
    return (
        Problem(FACTOR, words, one, landscape.length),
        trade_off(landscape, MAIN_WEIGHT),
        Problem(f"{FACTOR}, P^2", f"{words}, under the prior squared", one, landscape.length, 2.0),
    )


def trade_off(landscape: Landscape, weight: float) -> Problem:
    """Return the problem to bind one factor and not its paralog.

    :param landscape: the measured E-scores.
    :param weight: how much the paralog counts.
    """
    wanted, unwanted = landscape.factor(PARALOG_OF), landscape.factor(PARALOG)
    name = f"{PARALOG_OF} not {PARALOG}"
    words = (
        f"bind {PARALOG_OF}, not {PARALOG}: "
        f"log G = (E_{PARALOG_OF} - {weight:g} E_{PARALOG}) / {TEMPERATURE}"
    )
    return Problem(name, words, (wanted - weight * unwanted) / TEMPERATURE, landscape.length)


@dataclass(frozen=True)
class Floor:
    """Mean distances of as many exact draws as there are runs.

    :param problem: the problem.
    :param num_runs: number of draws.
    """

    problem: Problem
    num_runs: int

    @cached_property
    def _samples(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [self.problem.draw(self.num_runs, generator) for _ in range(FLOOR_REPEATS)]

    @cached_property
    def marginal(self) -> float:
        """The mean over positions."""
        return sum(map(self.problem.marginal_distance, self._samples)) / FLOOR_REPEATS

    @cached_property
    def bins(self) -> float:
        """Over intervals of ``log G``."""
        return sum(map(self.problem.bin_distance, self._samples)) / FLOOR_REPEATS


def measure_problem(problem: Problem, plan: Plan) -> Iterator[Row]:
    """Run every method on one problem.

    :param problem: the problem.
    :param plan: how much is run.
    """
    floor = Floor(problem, plan.num_runs)
    yield _exact_row(problem, floor)
    for size in plan.sizes:
        for method in methods_of(problem):
            outcome = run_method(problem, method, size, plan.num_runs)
            gap = two_sided_gap(problem, method, size)
            yield summarise(problem, method.name, size, outcome, floor, gap)


def summarise(
    problem: Problem, method: str, size: int, outcome: Outcome, floor: Floor, gap: float | None
) -> Row:
    """Return the row of a method.

    :param problem: the problem.
    :param method: its name.
    :param size: its size ``n``.
    :param outcome: what it returned.
    :param floor: distances of exact draws.
    :param gap: two-sided bound of the evidence, nats, where there is one.
    """
    tv, runs = problem.marginal_distance(outcome.draws), len(outcome.draws)
    potential, potential_se = _estimate(outcome.means(problem.log_g))
    log_p, log_p_se = _estimate(outcome.means(problem.log_p))
    coordinates = {
        "problem": problem.name,
        "method": method,
        "size": size,
        "num_particles": outcome.weights.shape[1],
        "num_steps": problem.length,
        "kernel": "ordered, one reveal per step",
        "exact": outcome.exact,
        "tv": tv,
        "tv_floor": floor.marginal,
        "tv_bins": problem.bin_distance(outcome.draws),
        "tv_bins_floor": floor.bins,
        "mean_potential": potential,
        "mean_potential_se": potential_se,
        "mean_log_p": log_p,
        "mean_log_p_se": log_p_se,
        "evaluations": outcome.evaluations,
        "rows_requested": size * problem.length,
        "potential_calls": outcome.potential_calls,
        "seconds_per_run": outcome.seconds,
    }
    errors = evidence_errors(outcome.log_evidence - problem.log_z) if outcome.exact else {}
    bounds = {} if gap is None else {"two_sided_gap": gap}
    return Row("pbm", tv, "total variation", runs, coordinates={**coordinates, **errors, **bounds})


def evidence_errors(error: Tensor) -> dict[str, float]:
    """Return what is wrong with estimates of the evidence.

    :param error: estimated minus exact ``log Z``, ``(R,)``.
    :returns: root mean square with its standard error and the mean, in nats, and the mean of the
        estimated over the exact ``Z`` with its standard error.
    """
    rmse, squares = float((error**2).mean().sqrt()), error**2
    ratio, ratio_se = _estimate(error.exp())
    noise = float(squares.std()) / (2 * rmse * len(error) ** 0.5) if rmse else 0.0
    return {
        "rmse_log_z": rmse,
        "rmse_log_z_se": noise,
        "bias_log_z": float(error.mean()),
        "z_ratio": ratio,
        "z_ratio_se": ratio_se,
    }


def _estimate(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def _exact_row(problem: Problem, floor: Floor) -> Row:
    coordinates = {
        "problem": problem.name,
        "words": problem.words,
        "method": "exact draws",
        "tv": floor.marginal,
        "tv_bins": floor.bins,
        "log_z": problem.log_z,
        "mean_potential": problem.mean(problem.log_g),
        "mean_log_p": problem.mean(problem.log_p),
        "importance_ess": problem.importance_ess if problem.power == 1 else None,
        "twist_error_argmax": twist_error(problem, ArgmaxFill()) if problem.power == 1 else None,
        "twist_error_persistent": twist_error(problem, FILLS) if problem.power == 1 else None,
    }
    return Row("pbm", floor.marginal, "total variation", floor.num_runs, coordinates=coordinates)


def measure_grid(landscape: Landscape, name: str, plan: Plan) -> Iterator[Row]:
    """Go along the trade-off with common random numbers.

    :param landscape: the measured E-scores.
    :param name: the method.
    :param plan: how much is run.
    """
    method = next(m for m in METHODS if m.name == name)
    problems = [trade_off(landscape, weight) for weight in GRID]
    outcomes = [run_method(p, method, GRID_SIZE, plan.num_runs) for p in problems]
    means = [outcome.means(landscape.factor(PARALOG_OF)) for outcome in outcomes]
    shares = [None, *(_common_share(a, b) for a, b in pairwise(means))]
    for weight, problem, outcome, share in zip(GRID, problems, outcomes, shares, strict=True):
        own = {"method": name, "weight": weight, "common_numbers_share": share}
        yield _grid_row(landscape, problem, outcome, own)


def _common_share(first: Tensor, second: Tensor) -> float:
    """Return the spread of a difference of estimates over that of independent ones."""
    return float((second - first).std() / (first.var() + second.var()).sqrt())


def _grid_row(landscape: Landscape, problem: Problem, outcome: Outcome, own: dict[str, Any]) -> Row:
    errors = evidence_errors(outcome.log_evidence - problem.log_z)
    coordinates: dict[str, Any] = {
        "problem": problem.name,
        **own,
        "num_particles": GRID_SIZE,
        "importance_ess": problem.importance_ess,
        "log_z": problem.log_z,
        "evaluations": outcome.evaluations,
        "potential_calls": outcome.potential_calls,
        **errors,
    }
    for factor in (PARALOG_OF, PARALOG):
        scores = landscape.factor(factor)
        mean, error = _estimate(outcome.means(scores))
        found = {"mean": mean, "se": error, "exact": problem.mean(scores)}
        coordinates |= {f"{factor}_{what}": value for what, value in found.items()}
    rmse, runs = errors["rmse_log_z"], len(outcome.weights)
    return Row("pbm_trade_off", rmse, "nats", runs, coordinates=coordinates)


def measure(landscape: Landscape, plan: Plan, console: Console) -> list[Row]:
    """Run and print everything.

    :param landscape: the measured E-scores.
    :param plan: how much is run.
    :param console: where the tables go.
    """
    rows: list[Row] = []
    for problem in make_problems(landscape):
        found = list(measure_problem(problem, plan))
        console.print(problem_table(found))
        rows += found
    for name in GRID_METHODS:
        grid = list(measure_grid(landscape, name, plan))
        console.print(grid_table(grid, (PARALOG_OF, PARALOG)))
        rows += grid
    console.print(NOTES, highlight=False)
    return rows


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="PPL_DIFFUSION_DATA",
            help="The file pbm_8mer_escores.npz, or the data folder with dna/pbm_8mer_escores.npz.",
        ),
    ] = None,
) -> None:
    """Compare methods on measured binding landscapes whose posteriors are known exactly."""
    try:
        landscape = Landscape.load(find_data(data))
        make_problems(landscape)
    except DataError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None
    write(measure(landscape, QUICK if quick else FULL, console(140)), json_file)


if __name__ == "__main__":
    typer.run(main)
