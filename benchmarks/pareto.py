"""What guided promoters trade for expression, at equal cost.

Every method is asked for yeast promoters of high expression. The reward is what
``ppl-diffusion design`` uses: the design oracle, capped at the top of the assay, over a
temperature. Reported are the expression by a judge fitted on other families of sequences, a lower
bound on the log-probability under the prior, and how diverse the designs are: means over
independent runs, each judged by draws in proportion to its weights. Methods are compared where
they spend the same number of network rows, and again where they ask for the same number of
rewards; there they use the options that save rewards.

What the numbers are not. Designer and judge are of one kind and fitted on one assay, so they share
errors, and a search may gain by them. A lower bound is not the log-probability; and a sequence far
above what the prior's own samples have is not more natural than they are but likelier, as
repetitive sequences are: see the entropy of its letters. ``exact`` says what weights tend to with
ever more particles, not that so few suffice: at low temperatures hardly any method has converged
here. Errors are those of a mean over runs and know nothing of that bias. Nothing but committed
files is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks._pareto_measure import (
    BOUND_SAMPLES,
    NUM_DESIGNS,
    Outcome,
    fit_size,
    non_dominated,
    run_setting,
    summarise,
)
from benchmarks._pareto_methods import Lab, Plan, Setting
from benchmarks._pareto_plot import plot
from benchmarks._report import JsonFile, Quick, Row, console, table, write

FULL = (Plan("evaluations", 1600, 4), Plan("calls", 1000, 4))
QUICK = (
    Plan("evaluations", 1000, 2, temperatures=(0.4,), strengths=(4,)),
    Plan("calls", 700, 2, temperatures=(0.4,), strengths=(4,)),
)
DEFAULT_PLOT = Path("runs/pareto.png")
FIRST_GUESS = 8


def measure_setting(lab: Lab, plan: Plan, setting: Setting, start: int = FIRST_GUESS) -> Row:
    """Find the number of particles that meets the budget, and run the setting with it.

    :param lab: prior and oracles.
    :param plan: the budget.
    :param setting: the setting.
    :param start: first guess of the number of particles.
    """
    known: dict[int, Outcome] = {}

    def cost(size: int) -> float:
        known[size] = run_setting(lab, setting, size, seed=0)
        return known[size].spent(plan.kind)

    if plan.kind == "calls" and not setting.asks:
        size = plan.budget  # as many as the best of them are chosen from
    else:
        size = fit_size(cost, plan.budget, start=start, unit=setting.unit)
    first = known.get(size) or run_setting(lab, setting, size, seed=0)
    others = [run_setting(lab, setting, size, seed) for seed in range(1, plan.num_runs)]
    return _row(plan, setting, size, [first, *others])


def _row(plan: Plan, setting: Setting, size: int, outcomes: Sequence[Outcome]) -> Row:
    found = summarise(outcomes)
    coordinates = {
        "budget_kind": plan.kind,
        "budget": plan.budget,
        "method": setting.method,
        "setting": setting.label,
        "temperature": setting.temperature if setting.tempered else None,
        "num_particles": size,
        **found,
    }
    return Row("pareto", found["judged"], "expression", len(outcomes), None, coordinates)


def measure_plan(lab: Lab, plan: Plan, console: Console) -> Iterator[Row]:
    """Run everything at one budget.

    :param lab: prior and oracles.
    :param plan: the budget.
    :param console: where progress goes.
    """
    sizes: dict[str, int] = {}
    for setting in plan.settings():
        row = measure_setting(lab, plan, setting, sizes.get(setting.method, FIRST_GUESS))
        c = row.coordinates
        sizes[setting.method] = c["num_particles"]
        console.print(
            f"{plan.kind}: {setting.method} {setting.label}: judged {row.value:.2f}, bound "
            f"{c['bound']:.1f}, {c['evaluations']:.0f} rows, {c['potential_calls']:.0f} calls",
            highlight=False,
        )
        yield row


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Say of each row whether another one of its budget beats it.

    :param rows: of one or several budgets.
    :returns: the rows with ``on_front`` (expression and bound) and ``on_front_with_diversity``
        (and Hamming distance); errors are not taken into account.
    """
    return [replace(row, coordinates={**row.coordinates, **_front(row, rows)}) for row in rows]


def _front(row: Row, rows: Sequence[Row]) -> dict[str, bool]:
    kind = row.coordinates["budget_kind"]
    rivals = [other for other in rows if other.coordinates["budget_kind"] == kind]
    index = next(i for i, other in enumerate(rivals) if other is row)
    names = {
        "on_front": ("judged", "bound"),
        "on_front_with_diversity": ("judged", "bound", "hamming"),
    }
    return {
        name: non_dominated([[r.coordinates[key] for key in keys] for r in rivals])[index]
        for name, keys in names.items()
    }


COLUMNS = (
    *("method", "setting", "N", "rows", "calls", "judged", "bound", "distinct", "Hamming"),
    *("entropy", "Eves", "ESS", "reward", "exact", "front"),
)


def print_plan(rows: Sequence[Row], console: Console) -> None:
    """Print the table of one budget.

    :param rows: from :func:`mark_front`.
    :param console: where the table goes.
    """
    first = rows[0].coordinates
    made = table(
        f"Promoters at about {first['budget']:,} {first['budget_kind']} per run; "
        f"{rows[0].n} runs a line",
        COLUMNS,
        f"Means ± standard errors over runs of {NUM_DESIGNS} weighted draws each, among which "
        "distinct (a share) and Eves are counted.\n"
        "judged: expression by the judge; reward: by the design oracle, capped; bound: nats under "
        f"the prior, {BOUND_SAMPLES} rows a sequence;\n"
        "entropy: of a design's letters, nats. "
        "front: * no setting has higher expression and bound; + none has these and a higher "
        "Hamming distance.",
    )
    for row in rows:
        made.add_row(*_cells(row.coordinates))
    console.print(made)


def _cells(c: Mapping[str, Any]) -> Iterator[str]:
    yield from (c["method"], c["setting"], str(c["num_particles"]))
    yield from (f"{c['evaluations']:.0f}", f"{c['potential_calls']:.0f}")
    yield f"{c['judged']:.2f} ± {c['judged_se']:.2f}"
    yield f"{c['bound']:.1f} ± {c['bound_se']:.1f}"
    yield from (f"{c['distinct']:.2f}", f"{c['hamming']:.1f}", f"{c['entropy']:.2f}")
    yield from (
        f"{c['eves']:.1f}",
        f"{c['ess']:.1f}",
        f"{c['reward']:.2f}",
        "yes" if c["exact"] else "no",
    )
    yield "*" if c["on_front"] else "+" if c["on_front_with_diversity"] else ""


def measure(
    plans: Sequence[Plan], console: Console, save: Callable[[Sequence[Row]], None]
) -> list[Row]:
    """Run all budgets and print their tables.

    :param plans: the budgets.
    :param console: where tables and progress go.
    :param save: called with all rows so far, after each of them.
    """
    lab, rows = Lab.load(), list[Row]()
    for plan in plans:
        for row in measure_plan(lab, plan, console):
            rows.append(row)
            save(mark_front(rows))
        marked = [r for r in mark_front(rows) if r.coordinates["budget_kind"] == plan.kind]
        print_plan(marked, console)
    return mark_front(rows)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path, typer.Option("--plot", help="Draw the comparison into this image.")
    ] = DEFAULT_PLOT,
) -> None:
    """Compare guided methods by expression, naturalness and diversity of promoters."""
    screen = console(190)
    wall, processor = time.perf_counter(), time.process_time()

    # The file is written as rows come: a run of hours may be cut off.
    rows = measure(QUICK if quick else FULL, screen, lambda found: write(found, json_file))
    plot([row.coordinates for row in rows], plot_file)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    screen.print(
        f"The plot is in {plot_file}. This took {wall / 60:.1f} minutes, "
        f"and {processor / 60:.1f} minutes of processor time.",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
