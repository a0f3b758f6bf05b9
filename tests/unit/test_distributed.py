"""Two processes that share rows give the bytes of one, and none of them waits for ever."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gloo_run
import pytest
import torch


@pytest.fixture(scope="module")
def alone():
    return json.loads(json.dumps(gloo_run.runs()))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(gloo_run.process, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("target", ["chain", "program", "gibbs"])
def test_two_processes_give_the_bytes_of_one(target, alone, found):
    """Every tensor of the result to the bit, its costs and its settings."""
    assert {"x0", "log_evidence"} <= alone[target]["digests"].keys()
    for rank in found:
        assert rank[target] == alone[target]


def test_each_sees_about_half_of_the_rows(alone, found):
    seen = [rank["rows"] for rank in found]
    assert sum(seen) == alone["rows"]
    assert max(seen) <= 0.6 * alone["rows"]


def test_processes_without_a_seed_take_one_of_the_first(found):
    first, second = (rank["seeded by the first"] for rank in found)
    assert first == second
    assert isinstance(first["settings"]["seed"], int)


def test_answers_to_the_wrong_rows_are_seen(alone, found):
    """The mutant: both processes answer the first half."""
    mutant = found[0]["mutant"]["digests"]
    assert mutant["log_evidence"] != alone["chain"]["digests"]["log_evidence"]


def test_one_that_fails_ends_both(found):
    first, second = (rank["failed"] for rank in found)
    assert "PotentialError" in second
    assert "no license for the simulator" in second
    assert first.startswith("RuntimeError: process 1 of the group failed on its part of the rows")
    assert "no license for the simulator" in first


def test_processes_that_do_different_things_are_noticed(found):
    for rank in found:
        assert "different seeds, [0, 1]; give all of them one" in rank["seeds"]
        assert "the same program, arguments, options and seed" in rank["sizes"]


def test_one_that_has_ended_ends_the_other(found):
    assert "has ended or does not answer" in found[0]["left alone"]


@pytest.mark.slow
def test_the_script_of_the_page_runs(tmp_path):
    """As it stands, started as the page says; both processes print the same evidence."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "several_devices.md"
    block = re.search(
        r"^```\{code-block\} python\n:caption:.*?\n\n(.*?)^```",
        page.read_text("utf-8"),
        re.M | re.S,
    )
    script = tmp_path / "design.py"
    script.write_text(block.group(1), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*start, script], capture_output=True, text=True, check=True)
    first, second = done.stdout.split()
    assert first == second
