"""Before and after in one run: this working tree against an earlier commit of the repository.

The commit is laid out in a temporary folder, and both trees answer the same requests by turns, each
in a process of its own with one thread (:mod:`benchmarks._against_cases`); what is compared is
process time, the median of the repeats. ``time_over_before`` is after over before;
``memory_over_before`` compares what a run adds to the peak of a fresh process. Estimates of
the evidence with the same seed stand beside each other: they are the same number where the
same draws were promised, and otherwise one draw each of the same estimator.

``engine_over_chain`` is the run above a trivial network over ``chain.sample`` alone, in the same
tree. ``time_over_t64`` is a run with more steps over that with 64, of a chain of 64 positions;
``time_per_round_over_t64``, which has the goal, divides both by the number of steps in which a
particle reveals something: 40.6 of 64 and 62.1 of 1,024 on average. Cases that stand in for others
in the quick form have no goal.
``import_over_torch_pyro`` is the process time of ``import ppl_diffusion.inference`` over that of
``import torch, pyro``; ``start_up`` is that of a command, and says whether it imported torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks._report import JsonFile, Quick, Row, console, table, verdict, write
from benchmarks._worker import Worker

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("_against_cases.py")
BEFORE = "4700c97"


@dataclass(frozen=True)
class Case:
    """What is run on both trees.

    :param goal: largest acceptable time, as a share of the time before.
    :param memory_goal: the same of the memory; None does not measure it.
    :param quick: the case that stands in for it in the quick form, or None to leave it out.
    :param rounds: timed rounds, and ``quick_rounds`` those of the quick form.
    """

    name: str
    goal: float | None = None
    memory_goal: float | None = None
    quick: str | None = ""
    rounds: int = 5
    quick_rounds: int = 3

    def named(self, quick: bool) -> str | None:
        """Return the name of the case that is run, None for none."""
        return self.name if not quick or self.quick == "" else self.quick


CASES = (
    Case("forward, 180 rows", 0.72, rounds=9, quick_rounds=5),
    Case("bare module, 180 rows", rounds=9, quick_rounds=5),
    Case("steered run", 0.62, quick="steered run, quick", rounds=3, quick_rounds=1),
    Case("V=20,000", 0.12, 0.15, rounds=3, quick_rounds=1),
    Case("V=4, N=4,096", 0.6, quick="V=4, N=4,096, quick"),
    Case("V=256, N=4,096", 0.25, rounds=5, quick_rounds=1),
    Case("ssp"),
    Case("systematic"),
    Case("killing"),
    Case("chain.sample"),
    Case("engine, no twist"),
    Case("engine, argmax"),
    Case("engine, persistent"),
    Case("engine, sample"),
    Case("engine, argmax, T=256"),
    Case("engine, argmax, T=1,024", quick_rounds=1),
)
ENGINE_GOAL, FLAT_GOAL, IMPORT_GOAL = 3.0, 1.2, 1.2

IMPORTS = {"torch, pyro": "import torch, pyro", "inference": "import ppl_diffusion.inference"}
COMMANDS = {"models": ["models"], "--help": ["--help"]}


class NoHistory(Exception):
    """There is nothing to compare with."""


def check_out(commit: str, folder: Path) -> Path:
    """Lay out the sources of a commit and return their tree.

    :param commit: any name that git knows.
    :param folder: an empty folder.
    :raises NoHistory: if there is no such commit here.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        archive = subprocess.run(
            [*git, "archive", commit, "ppl_diffusion", "models", "inference"],
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"").decode().strip() or str(error)
        raise NoHistory(
            f"{commit} cannot be compared with: this is no clone that holds it ({told}); clone the "
            "repository with its history, or name another --commit."
        ) from error
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    for name in ("models", "inference"):
        (folder / "ppl_diffusion" / name).symlink_to(folder / name)
    return folder


def link_here(folder: Path) -> Path:
    """Lay out the working tree by links and return the tree.

    :param folder: an empty folder.
    """
    package = folder / "ppl_diffusion"
    package.mkdir()
    for path in (ROOT / "ppl_diffusion").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("models", "inference"):
        (package / name).symlink_to(ROOT / name)
    return folder


def worker(tree: Path) -> Worker:
    """Return a process that runs cases of one tree.

    :param tree: the folder in which ``ppl_diffusion`` lies.
    """
    return Worker([sys.executable, "-P", str(SCRIPT)], environment(tree))


def environment(tree: Path) -> dict[str, str]:
    """Return the environment in which a tree comes before everything else, with one thread."""
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


Answers = dict[str, list[dict[str, Any]]]


def ask_in_turn(workers: dict[str, Worker], case: str, rounds: int) -> Answers:
    """Return what both trees say of a case, a round each by turns.

    :param workers: a process for ``"before"`` and ``"after"``.
    :param rounds: number of rounds.
    """
    found: Answers = {name: [] for name in workers}
    for seed in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.ask(case=case, seed=seed))
    return found


def seconds(answers: Answers, name: str) -> float:
    """Return the median time of a tree, in seconds."""
    return median(answer["seconds"] for answer in answers[name])


def timed(case: Case, name: str, answers: Answers) -> Row:
    """Return the row of a case; its goal is one of the full size.

    :param name: the case that was run.
    :param answers: what both trees said.
    """
    before, after = seconds(answers, "before"), seconds(answers, "after")
    where: dict[str, Any] = {"case": name, "before": before, "after": after}
    where |= {f"evidence_{tree}": answers[tree][0]["evidence"] for tree in answers}
    rounds = len(answers["before"])
    goal = case.goal if name == case.name else None
    return Row("time_over_before", after / before, "ratio", rounds, goal, where)


def memory(case: Case, trees: dict[str, Path]) -> Row:
    """Measure what one run of a case adds to the peak of a fresh process.

    :param trees: the tree of ``"before"`` and ``"after"``.
    """
    found = {}
    for name, tree in trees.items():
        with worker(tree) as one:
            found[name] = one.ask(case=case.name, seed=0, memory=True)["memory"]
    ratio = found["after"] / found["before"]
    return Row(
        "memory_over_before", ratio, "ratio", 1, case.memory_goal, {"case": case.name, **found}
    )


def derived(answers: dict[str, Answers]) -> Iterator[Row]:
    """Return what follows from several cases of one tree, before and after.

    :param answers: answers by case.
    """
    for tree in ("before", "after"):
        took = {name: seconds(found, tree) for name, found in answers.items()}
        for twist in ("no twist", "argmax", "persistent", "sample"):
            ratio = took[f"engine, {twist}"] / took["chain.sample"]
            goal = ENGINE_GOAL if tree == "after" else None
            where = {"tree": tree, "method": f"smc, {twist}"}
            yield Row("engine_over_chain", ratio, "ratio", 1, goal, where)
        for steps in (256, 1024):
            ratio = took[f"engine, argmax, T={steps:,}"] / took["engine, argmax"]
            goal = FLAT_GOAL if tree == "after" else None
            where = {"tree": tree, "num_steps": steps}
            yield Row("time_over_t64", ratio, "ratio", 1, None, where)
            per_round = ratio * expected_rounds(64, 64) / expected_rounds(steps, 64)
            yield Row("time_per_round_over_t64", per_round, "ratio", 1, goal, where)


def expected_rounds(num_steps: int, length: int) -> float:
    """Return how many steps of a masked chain reveal something, on average.

    :param num_steps: steps of its grid, each of which reveals a position with the same chance.
    :param length: positions.
    """
    return float(num_steps * (1 - (1 - 1 / num_steps) ** length))


def process_seconds(code: str, tree: Path) -> tuple[float, str]:
    """Return the process time of a fresh interpreter, in seconds, and what it printed last.

    :param code: what it runs.
    :param tree: the tree that it imports.
    """
    tail = "\nimport sys, time; print('\\n', time.process_time(), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + tail],
        env=environment(tree),
        capture_output=True,
        check=True,
        text=True,
    )
    spent, has_torch = done.stdout.split()[-2:]
    return float(spent), has_torch


def _command(arguments: list[str]) -> str:
    return (
        f"import sys; sys.argv = ['ppl-diffusion', *{arguments!r}]\n"
        "from ppl_diffusion.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )


def start_up(trees: dict[str, Path], rounds: int) -> Iterator[Row]:
    """Measure imports and commands that compute nothing.

    :param trees: the tree of ``"before"`` and ``"after"``.
    :param rounds: fresh processes of each, by turns.
    """
    code = IMPORTS | {name: _command(arguments) for name, arguments in COMMANDS.items()}
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for _ in range(rounds + 1):
        for name, tree in trees.items():
            for what, text in code.items():
                found.setdefault((name, what), []).append(process_seconds(text, tree))
    # The first round fills the caches of the disk and of compiled modules.
    took = {key: median(spent for spent, _ in runs[1:]) for key, runs in found.items()}
    for name in trees:
        goal = IMPORT_GOAL if name == "after" else None
        ratio = took[name, "inference"] / took[name, "torch, pyro"]
        where = {"tree": name, "seconds": took[name, "inference"]}
        yield Row("import_over_torch_pyro", ratio, "ratio", rounds, goal, where)
        for what in COMMANDS:
            has_torch = found[name, what][-1][1] == "True"
            told = {"tree": name, "command": what, "imports_torch": has_torch}
            yield Row("start_up", took[name, what], "s", rounds, None, told)


def compare(commit: str, quick: bool, terminal: Console) -> list[Row]:
    """Run every case on both trees.

    :param commit: what is compared with.
    :param quick: smaller cases, fewer rounds.
    :param terminal: where the tables go.
    :raises NoHistory: if there is nothing to compare with.
    """
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as here:
        trees = {"before": check_out(commit, Path(there)), "after": link_here(Path(here))}
        rows, answers = [], {}
        with ExitStack() as stack:
            workers = {name: stack.enter_context(worker(tree)) for name, tree in trees.items()}
            for case in CASES:
                name = case.named(quick)
                if name is None:
                    continue
                found = ask_in_turn(workers, name, case.quick_rounds if quick else case.rounds)
                answers[case.name] = found
                rows.append(timed(case, name, found))
        rows += [memory(case, trees) for case in CASES if case.memory_goal is not None]
        rows += [*derived(answers), *start_up(trees, 2 if quick else 5)]
    _print(rows, commit, terminal)
    return rows


def _print(rows: list[Row], commit: str, terminal: Console) -> None:
    made = table(
        f"This tree against {commit}, process time, one thread",
        ["", "before", "after", "ratio", "goal", "log-evidence before", "after"],
    )
    for row in rows:
        c = row.coordinates
        if "case" not in c:
            continue
        is_time = row.name == "time_over_before"
        unit = "s" if is_time else "GB"
        evidence = [c.get(f"evidence_{tree}") for tree in ("before", "after")]
        made.add_row(
            c["case"] if is_time else f"{c['case']}, memory",
            *(f"{c[tree]:.3f} {unit}" for tree in ("before", "after")),
            f"{row.value:.2f}",
            verdict(row),
            *("" if value is None else f"{value:.6f}" for value in evidence),
        )
    terminal.print(made)
    made = table("Within each tree", ["", "before", "after", "goal"])
    for before, after in _pairs(rows):
        c = before.coordinates
        what = " ".join(str(c[key]) for key in ("method", "num_steps", "command") if key in c)
        name = f"{before.name} {'T=' if 'num_steps' in c else ''}{what}".strip()
        made.add_row(name, *map(_told, (before, after)), verdict(after))
    terminal.print(made)


def _pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    own = [row for row in rows if "tree" in row.coordinates]
    half = {tree: [r for r in own if r.coordinates["tree"] == tree] for tree in ("before", "after")}
    return list(zip(half["before"], half["after"], strict=True))


def _told(row: Row) -> str:
    number = f"{row.value:.2f}" + (" s" if row.unit == "s" else "")
    return number + (", torch" if row.coordinates.get("imports_torch") else "")


Commit = Annotated[str, typer.Option(help="What to compare with.")]


def main(commit: Commit = BEFORE, quick: Quick = False, json_file: JsonFile = None) -> None:
    """Compare this tree with an earlier commit."""
    terminal = console()
    try:
        rows = compare(commit, quick, terminal)
    except NoHistory as error:
        terminal.print(str(error), markup=False)
        rows = []
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
