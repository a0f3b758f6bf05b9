"""The tables of the PBM benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks._report import Row, table

COLUMNS = ("n", "sites", "bins", "RMSE log Z", "Z^/Z", "gap", "mean r", "log P", "rows", "calls")


def problem_table(rows: Sequence[Row]) -> Table:
    """Return the table of one problem.

    :param rows: from :func:`~benchmarks.pbm.measure_problem`.
    """
    exact, *methods = rows
    c = exact.coordinates
    title = f"{c['words']}; log Z {c['log_z']:.3f}; {exact.n:,} runs"
    made = table(title, ["", *COLUMNS, "ms/run"], _caption(c))
    means = (f"{c['mean_potential']:.2f}", f"{c['mean_log_p']:.2f}")
    made.add_row("exact draws", "", f"{c['tv']:.3f}", f"{c['tv_bins']:.3f}", *[""] * 3, *means)
    size = None
    for row in methods:
        if size not in (None, row.coordinates["size"]):
            made.add_section()
        size = row.coordinates["size"]
        made.add_row(*_cells(row.coordinates))
    return made


def _cells(c: Mapping[str, Any]) -> Iterator[str]:
    yield c["method"] if c["exact"] else f"{c['method']} *"
    yield str(c["size"])
    yield f"{c['tv']:.3f}"
    yield f"{c['tv_bins']:.3f}"
    yield f"{c['rmse_log_z']:.2f} ±{c['rmse_log_z_se']:.2f}" if c["exact"] else "-"
    yield f"{c['z_ratio']:.2f} ±{c['z_ratio_se']:.2f}" if c["exact"] else "-"
    yield f"{c['two_sided_gap']:.2f}" if "two_sided_gap" in c else "-"
    yield f"{c['mean_potential']:.2f}"
    yield f"{c['mean_log_p']:.2f}"
    yield f"{c['evaluations']:.0f}"
    yield f"{c['potential_calls']:.0f}"
    yield f"{1e3 * c['seconds_per_run']:.1f}"


def _caption(c: Mapping[str, Any]) -> str:
    if c["importance_ess"] is None:
        return "Only correctors take a power of the prior."
    return (
        f"Draws of the prior have an effective sample size of {100 * c['importance_ess']:.2g} %. "
        "With half of the positions revealed, the argmax fill and 16 persistent fills are off the "
        f"exact value by {c['twist_error_argmax']:.1f} and {c['twist_error_persistent']:.1f} nats "
        "(standard deviation)."
    )


def grid_table(rows: Sequence[Row], factors: tuple[str, str]) -> Table:
    """Return the table of the trade-off.

    :param rows: from :func:`~benchmarks.pbm.measure_grid`.
    :param factors: the factor to be bound, and its paralog.
    """
    first = rows[0].coordinates
    made = table(
        f"{first['problem']}: {first['method']}, n = {first['num_particles']}, {rows[0].n:,} runs",
        ["weight", "ESS %", "log Z", "RMSE log Z", *(f"E_{f}" for f in factors), "common"],
    )
    for row in rows:
        made.add_row(*_grid_cells(row.coordinates, factors))
    return made


def _grid_cells(c: Mapping[str, Any], factors: Sequence[str]) -> Iterator[str]:
    yield f"{c['weight']:g}"
    yield f"{100 * c['importance_ess']:.2g}"
    yield f"{c['log_z']:.3f}"
    yield f"{c['rmse_log_z']:.2f} ±{c['rmse_log_z_se']:.2f}"
    for name in factors:
        yield f"{c[f'{name}_mean']:.3f} ±{c[f'{name}_se']:.3f} ({c[f'{name}_exact']:.3f})"
    yield "" if c["common_numbers_share"] is None else f"{c['common_numbers_share']:.2f}"
