"""The page "Your own data and reward", followed by a reader: its files, its commands, its words."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from ppl_diffusion.cli import run
from ppl_diffusion.designs import brief, reward_spec

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "own_data.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
    for line in block.splitlines()
]


def write_files():
    """Write what the page says to put into files, and the data it makes."""
    named = r"into\s`([\w.]+)`:\n\n```[^\n]*\n(.*?)```"
    found = re.findall(named, TEXT, re.S)
    assert [name for name, _ in found] == ["my_scores.py", "stem.py", "brief.toml"]
    for name, text in found:
        Path(name).write_text(text, encoding="utf-8")
    made = re.search(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(made[1], PAGE.name, "exec"), {})


def kill_on_the_way(words):
    """Begin a command, and kill it once it has written a checkpoint."""
    words = [word for word in words if word != "--resume"]
    command = [sys.executable, "-m", "ppl_diffusion.cli", *words, "--checkpoint-every", "0"]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    out = Path(words[words.index("--out") + 1])
    while not list(out.rglob("stage-*.pt")):
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert (out / "checkpoint").is_dir()


def same_but_for_seconds(one, other):
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in (name for name in names if name.name != "summary.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of a reader who has followed the page from its first command to its last."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, ""])
        for name in ("my_scores", "stem"):
            patch.delitem(sys.modules, name, raising=False)
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        write_files()
        for words in COMMANDS:
            if words[0] == "design" and "--resume" in words:
                kill_on_the_way(words)
            assert run(words) == 0, words
        assert run(["design", "runs/brief/brief.toml", "--out", "runs/again", "-q"]) == 0
    return folder


def designs(folder):
    return list(csv.DictReader((folder / "designs.csv").read_text().splitlines()))


def test_every_step_of_the_page_leaves_what_it_says(followed):
    wanted = {"first", "program", "weak", "brief", "night", "other", "spread", "again"}
    assert {path.name for path in (followed / "runs").iterdir()} == wanted
    assert (followed / "prior" / "card.md").is_file()
    listed = re.search(r"## What is in the folder\n(.*?)\n## ", TEXT, re.S)[1]
    for path in (followed / "runs" / "brief").iterdir():
        assert f"`{path.name}" in listed, path.name


def test_designs_hold_to_the_brief(followed):
    rows = designs(followed / "runs" / "brief")
    assert rows
    for row in rows:
        assert 9 <= len(row["sequence"]) <= 14
        assert row["sequence"].startswith("G")
        assert "AAAA" not in row["sequence"]
        assert 0.3 <= float(row["gc"]) <= 0.7
    assert {"stem", "strong", "bonds"} <= rows[0].keys()


def test_the_program_is_asked_what_the_function_says(followed):
    names = {}
    exec((followed / "my_scores.py").read_text(encoding="utf-8"), names)
    rows = designs(followed / "runs" / "program")
    assert rows
    assert [float(row["stem.py"]) for row in rows] == names["stem"]([r["sequence"] for r in rows])


@pytest.mark.parametrize("name", ["night", "again"])
def test_a_killed_run_and_a_repeated_one_are_the_bytes_of_the_first(name, followed):
    same_but_for_seconds(followed / "runs" / "brief", followed / "runs" / name)


def test_the_table_of_briefs_has_every_key():
    own = {f.name for f in fields(reward_spec.RewardSpec)} - {"source", "at", "options", "object"}
    keys = own | {*reward_spec.SOURCES, *reward_spec.OPTIONS, *brief._NUMBERS, *brief._WORDS}
    keys |= {key for table in brief._TABLES.values() for key in table}
    table = re.search(r"## Briefs\n(.*?)\nWith `s`", TEXT, re.S)[1]
    assert {key for key in keys if f"`{key}`" not in table} == set()
