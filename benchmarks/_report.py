"""What all benchmarks share: rows, tables, and the command line ``[--quick] [--json FILE]``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured number.

    :param name: what was measured.
    :param value: the number.
    :param unit: its unit.
    :param n: number of repeats behind it.
    :param goal: the largest acceptable value, where there is one.
    :param coordinates: where it was measured (problem, method, number of particles, ...).
    """

    name: str
    value: float
    unit: str
    n: int
    goal: float | None = None
    coordinates: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool | None:
        """Whether the goal is met, None where there is none."""
        return None if self.goal is None else self.value <= self.goal

    def flat(self) -> dict[str, Any]:
        """Return the row as a flat JSON object; numbers that are not finite become null."""
        head = {"name": self.name, "value": self.value, "unit": self.unit, "n": self.n}
        goal = {} if self.goal is None else {"goal": self.goal, "ok": self.ok}
        return {key: _finite(value) for key, value in {**head, **goal, **self.coordinates}.items()}


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written after minutes of measuring."""
    if path is not None and not path.resolve().parent.is_dir():
        folder = path.resolve().parent
        raise typer.BadParameter(f"the folder {folder} does not exist; make it first.")
    return path


Quick = Annotated[bool, typer.Option(help="Finish within five minutes.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=in_a_folder, help="Write the rows to this file."),
]
Measure = Callable[[bool, Console], Iterable[Row]]


def run(measure: Measure) -> None:
    """Run a benchmark from the command line.

    :param measure: ``(quick, console) -> rows``; prints its own tables.
    """

    def command(quick: Quick = False, json_file: JsonFile = None) -> None:
        write(list(measure(quick, console())), json_file)

    command.__doc__ = (measure.__doc__ or "").partition("\n")[0]
    typer.run(command)


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Write rows as a JSON list of flat objects.

    :param rows: the rows.
    :param path: the file, None for none.
    """
    if path is None:
        return
    text = json.dumps([row.flat() for row in rows], indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    """Return an empty table, its first column to the left and the others to the right.

    :param title: line above.
    :param columns: headers.
    :param caption: line below.
    """
    made = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=True)
    return made


def verdict(row: Row) -> str:
    """Return a cell that says whether a goal is met.

    :param row: a row.
    """
    if row.goal is None:
        return ""
    return f"<= {row.goal:g}: {'[green]met[/]' if row.ok else '[red]missed[/]'}"


def console(width: int = 120) -> Console:
    """Return where tables go.

    :param width: columns of the widest table.
    """
    # Without a terminal rich assumes 80 columns and would cut the tables.
    return Console(width=None if sys.stdout.isatty() else width)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
