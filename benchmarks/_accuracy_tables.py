"""How the accuracy benchmark prints the rows of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console

from benchmarks._report import Row, table, verdict

LEGEND = (
    "* weights exact for no declared law. floor: noise of TV in that row (for exact draws, of as "
    "many as runs).\nRMSE, bias: of log Z against the declared target; ideal: against that of the "
    "exact chain. gap: mean upper minus mean lower bound of log Z.\nE r, log P: mean log-potential "
    "and log-prior. rows, calls, ms: network rows, potential calls and milliseconds of one run.\n"
    "N: sequences moved per step, be they particles, children or candidates.\n"
    "argmax, sample, persistent: Feynman-Kac steering by differences of that look-ahead; max, sum: "
    "by its running maximum or sum.\npath: on masked chains particles reveal different numbers of "
    "positions, noise that lockstep avoids. rates: the published limit of many steps, wrong by as "
    "much as its steps are coarse."
)

MISSES = {
    "clamped-persistent-16": (
        "The goal lies at the edge of what this method gives, and sets of 300 runs fall on both "
        "sides of it; twice as many completions meet it at equal network rows."
    ),
}
"""Why a method may miss its goal."""


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the rows of one case.

    :param rows: those of :func:`measure_plan`.
    :param console: where to.
    """
    exact, *others = rows
    c, measured = exact.coordinates, [row for row in others if row.name == "accuracy"]
    title = (
        f"{c['problem']}, {c['setting']} ({c['kernel']}, {c['num_steps']} steps): log Z "
        f"{c['log_z']:.3f} ideal, {c['log_z_declared']:.3f} declared; {exact.n:,} runs, TV of "
        f"{c['tv_of']} to the {c['tv_to']} law"
    )
    columns = _columns(c)
    made = table(title, ["", *columns], _verdicts(others))
    made.box, made.padding = box.SIMPLE_HEAD, (0, 0)
    for row in [exact, *measured]:
        name = row.coordinates["method"] + ("" if row.coordinates["exact"] else " *")
        made.add_row(name, *(cell(row.coordinates) for cell in columns.values()))
    console.print(made)


def _columns(c: Mapping[str, Any]) -> dict[str, Callable[[Any], str]]:
    """Return how each column reads its cell; those that would be empty or double are left out."""
    apart = c["log_z"] != c["log_z_declared"]
    tilted = c["mean_potential"] is not None
    columns = {
        "N": _cell("num_particles", "{}"),
        "TV": _cell("tv", "{:.3f}"),
        "floor": _cell("tv_floor", "{:.3f}"),
        "TV ideal": _cell("tv_ideal", "{:.3f}") if apart and c["tv_to"] == "declared" else None,
        "RMSE log Z": _error_cell,
        "ideal": _cell("rmse_log_z_ideal", "{:.3f}") if apart else None,
        "bias": _cell("bias_log_z", "{:+.3f}"),
        "gap": _cell("gap_log_z", "{:.3f}"),
        "E r": _cell("mean_potential", "{:.2f}") if tilted else None,
        "log P": _cell("mean_log_p", "{:.2f}"),
        "rows": _cell("evaluations", "{:.0f}"),
        "calls": _cell("potential_calls", "{:.0f}") if tilted else None,
        "ms": _cell("seconds_per_run", "{:.2f}", 1e3),
    }
    return {name: cell for name, cell in columns.items() if cell is not None}


def _cell(key: str, form: str, unit: float = 1) -> Callable[[Mapping[str, Any]], str]:
    def read(c: Mapping[str, Any]) -> str:
        value = c.get(key)
        return "" if value is None or value != value else form.format(value * unit)

    return read


def _error_cell(c: Mapping[str, Any]) -> str:
    if "rmse_log_z" not in c:
        return ""
    return f"{c['rmse_log_z']:.3f}±{c['rmse_log_z_se']:.3f}"


def _verdicts(rows: Sequence[Row]) -> str:
    """Return a line for each goal."""
    lines = []
    for row in rows:
        if row.goal is not None:
            c = row.coordinates
            what = f"{c['method']}, N = {c['num_particles']}: {row.name} {row.value:.3f}"
            noise = c["tv_floor"] if row.name == "tv" else c["rmse_log_z_se"]
            lines.append(f"{what} ±{noise:.3f} {verdict(row)}")
            if not row.ok:
                lines.append(MISSES.get(c["method"], "More runs would tell a miss from noise."))
    return "\n".join(lines)
