"""What it costs to start: importing the methods, and asking the command line.

Processor seconds of fresh processes, by turns, the smallest of several: what else runs on the
machine only adds. ``import_over_torch_pyro`` compares ``import ppl_diffusion.inference`` with
``import torch, pyro``; ``start_over_python`` compares commands with ``python -c pass``, by the
wall clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from benchmarks._report import Row, run, table, verdict

GOAL = 1.2
BASE, METHODS = "import torch, pyro", "import ppl_diffusion.inference"
NOTHING = "pass"
_RUN = "from ppl_diffusion.cli import main; main()"
COMMANDS: Mapping[str, Sequence[str]] = {
    "ppl-diffusion --help": (_RUN, "--help"),
    "ppl-diffusion models": (_RUN, "models"),
    "ppl-diffusion design --help": (_RUN, "design", "--help"),
}


def spent(words: Sequence[str]) -> tuple[float, float]:
    """Return processor and wall seconds of a fresh process.

    :param words: code and arguments.
    """
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", *words], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, os.times()
    children = (after.children_user, after.children_system)
    return sum(children) - before.children_user - before.children_system, wall


def measure(quick: bool, console: Console) -> list[Row]:
    """Measure what it costs to start.

    :param quick: fewer repeats.
    :param console: where the table goes.
    """
    repeats = 5 if quick else 15
    jobs = {NOTHING: (NOTHING,), BASE: (BASE,), METHODS: (METHODS,), **COMMANDS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, words in jobs.items():
            found[name].append(spent(words))
    cpu = {name: min(cpu for cpu, _ in times) for name, times in found.items()}
    wall = {name: min(wall for _, wall in times) for name, times in found.items()}
    rows = [Row("import_over_torch_pyro", cpu[METHODS] / cpu[BASE], "ratio", repeats, GOAL)]
    rows += [
        Row("start_over_python", wall[name] / wall[NOTHING], "ratio", repeats, None, {"job": name})
        for name in COMMANDS
    ]
    rows += [Row("start_cpu", cpu[name], "s", repeats, None, {"job": name}) for name in jobs]
    rows += [Row("start_wall", wall[name], "s", repeats, None, {"job": name}) for name in jobs]
    made = table("Starting", ["job", "processor s", "wall s", "over python -c pass", "goal"])
    for name in jobs:
        said = f"{rows[0].value:.2f} of {BASE}: {verdict(rows[0])}" if name == METHODS else ""
        over = f"{wall[name] / wall[NOTHING]:.1f}"
        made.add_row(name, f"{cpu[name]:.2f}", f"{wall[name]:.2f}", over, said)
    console.print(made)
    return rows


if __name__ == "__main__":
    run(measure)
