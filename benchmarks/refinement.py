"""What moves of finished sequences do for a given budget: B1, clamped look-ahead, with and without.

Three ways to spend equal network rows: all on particles; half of them on half as many particles and
the rest on moves whose orders are paid for, right for any denoiser; and the same with orders dealt
for nothing, which is right here, where the denoiser is exact. ``tv`` is the distance of the law of
one weighted draw to the target, ``unique`` and ``nearest`` are those of
:func:`ppl_diffusion.diagnostics.collapse` in sets of 16 per run, averaged over runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from benchmarks._cases import Case, ordered_case
from benchmarks._report import Row, run, table
from ppl_diffusion.diagnostics import collapse
from ppl_diffusion.inference import SMC, Method, Refinement, TwistedSampler
from ppl_diffusion.smc import OrderRefresh, ParticlePosterior, SiteGibbs

BUDGET, SET, COST_RUNS = 32, 16, 4
GUIDE = TwistedSampler(twist="argmax")
FREE = (OrderRefresh(paid=False), SiteGibbs())


def ways() -> dict[str, tuple[Method, int]]:
    """Return methods by name, each with its number of particles."""
    return {
        "clamped": (GUIDE, BUDGET),
        "clamped + refinement": (Refinement(GUIDE, num_chains=4), BUDGET // 2),
        "clamped + refinement, orders unpaid": (
            Refinement(GUIDE, moves=FREE, num_chains=1),
            BUDGET // 2,
        ),
    }


def sampled(case: Case, method: Method, size: int, runs: int, seed: int) -> ParticlePosterior:
    """Return a result of a method on a case."""
    program = SMC(case.target, case.log_potential, method=method, num_particles=size, num_runs=runs)
    return program.run(seed=seed)


def measure_ways(case: Case, runs: int) -> Iterator[Row]:
    """Yield the figures of every way.

    :param case: the problem.
    :param runs: independent runs of each.
    """
    for name, (method, size) in ways().items():
        cost = [sampled(case, method, size, 1, seed) for seed in range(COST_RUNS)]
        post = sampled(case, method, size, runs, COST_RUNS)
        law = case.histogram(post.x0.flatten(0, 1), post.weights.flatten())
        known = collapse(post, SET)
        coordinates = {
            "method": name,
            "num_particles": size,
            "tv": case.distance(law),
            "tv_floor": case.floor(runs),
            **{what: _mean(known[what]) for what in ("unique", "nearest", "ancestors")},
            "evaluations": sum(p.num_evaluations for p in cost) / COST_RUNS,
            "potential_calls": sum(p.num_potential_calls for p in cost) / COST_RUNS,
            "exact": post.exact,
        }
        yield Row("refinement", coordinates["tv"], "total variation", runs, coordinates=coordinates)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def measure(quick: bool, console: Console) -> list[Row]:
    """Compare the ways.

    :param quick: fewer runs.
    :param console: where the table goes.
    """
    case = ordered_case("B1")
    rows = list(measure_ways(case, 40 if quick else 200))
    columns = {"method": "method", "num_particles": "N", "tv": "TV", "tv_floor": "floor"}
    columns |= {"unique": "unique", "nearest": "nearest", "ancestors": "roots"}
    columns |= {"evaluations": "rows", "potential_calls": "calls"}
    made = table("B1: equal network rows, with and without moves", list(columns.values()))
    for row in rows:
        cells = (row.coordinates[column] for column in columns)
        made.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells))
    console.print(made)
    return rows


if __name__ == "__main__":
    run(measure)
