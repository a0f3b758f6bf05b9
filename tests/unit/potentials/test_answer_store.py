"""Answers in a file: what is known there is not asked for again, whoever asked."""

import math
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import Reward
from ppl_diffusion.potentials.answer_store import AnswerStore, Cost
from ppl_diffusion.potentials.causes import Failure
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.testing.toys import toy_chain

ROWS = torch.tensor([[0, 2], [1, 2], [2, 2], [3, 3]])


class Recorder:
    """Counts what it is asked; fails on sequences that begin with 0 while ``broken``."""

    def __init__(self, broken=False):
        self.broken, self.asked = broken, []

    def __call__(self, x0):
        self.asked.extend(map(tuple, x0.tolist()))
        if self.broken and bool((x0[:, 0] == 0).any()):
            raise RuntimeError("no A, please")
        return x0.double().sum(-1) / 3


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.sqlite"


def entries(file):
    with closing(sqlite3.connect(file)) as opened:
        return opened.execute("SELECT * FROM answers ORDER BY key").fetchall()


class TestKnown:
    def test_another_run_asks_nobody(self, file):
        first, second = Recorder(), Recorder()
        found = Reward(first, cache=file)(ROWS)
        with watch_failures() as watched:
            reward = Reward(second, cache=str(file))
            assert torch.equal(reward(ROWS), found)
            assert torch.equal(reward(ROWS), found)
        assert len(first.asked) == 4
        assert second.asked == []
        told = watched.settings()["rewards"]["Recorder"]
        assert (told["asked"], told["cached"]) == (0, 8)
        assert (told["cached_memory"], told["cached_disk"]) == (4, 4)

    def test_values_are_kept_to_the_bit(self, file):
        values = [1 / 3, -1e-300, 5e-324, 1.7e308, -math.inf, 0.0]
        store = AnswerStore(file, "f")
        store.keep({bytes([i]): value for i, value in enumerate(values)})
        store.close()
        found = AnswerStore(file, "f").find([bytes([i]) for i in range(6)])
        assert [found[bytes([i])] for i in range(6)] == values

    def test_names_and_versions_are_told_apart(self, file):
        Reward(Recorder(), cache=file)(ROWS)
        for options in ({"name": "other"}, {"version": "2"}):
            record = Recorder()
            Reward(record, cache=file, **options)(ROWS)
            assert len(record.asked) == 4
        again = Recorder()
        Reward(again, cache=file, version="2")(ROWS)
        assert not again.asked

    def test_failures_are_known_too(self, file):
        broken = Recorder(broken=True)
        assert Reward(broken, cache=file, on_error="reject")(ROWS)[0] == -math.inf
        mended = Recorder()
        reward = Reward(mended, cache=file, on_error="reject")
        assert reward(ROWS)[0] == -math.inf
        assert mended.asked == []
        assert reward.failures == {"raised RuntimeError": 1}
        with pytest.raises(PotentialError) as caught:
            Reward(mended, cache=file)(ROWS)
        assert str(caught.value) == (
            "Recorder failed on the sequence [0, 2] (RuntimeError: no A, please, known from "
            f"{file}: retry_failed=True asks again); mend the function, or pass "
            'on_error="reject" to give such sequences probability zero.'
        )
        assert Reward(mended, cache=file, retry_failed=True)(ROWS)[0] == 2 / 3
        assert mended.asked == [(0, 2)]
        assert Reward(Recorder(broken=True), cache=file)(ROWS)[0] == 2 / 3

    def test_a_row_says_what_it_cost(self, file):
        Reward(Recorder(broken=True), cache=file, on_error="reject", batch_size=1, retries=2)(ROWS)
        rows = entries(file)
        assert len(rows) == 4
        (name, version, _, value, cause, message, seconds, host, attempts, when), *_ = rows
        assert (name, version, value, cause) == ("Recorder", "", None, "raised RuntimeError")
        assert message == "RuntimeError: no A, please"
        assert 0 <= seconds < 10
        assert host
        assert attempts == 3
        assert when > 1.7e9
        assert {row[8] for row in rows[1:]} == {1}

    def test_a_failure_never_replaces_a_value(self, file):
        store = AnswerStore(file, "f")
        store.keep({b"k": Failure("died", "gone")})
        store.keep({b"k": 1.0}, Cost(0.5, 2))
        store.keep({b"k": Failure("died", "gone")})
        store.keep({b"k": 2.0})
        assert store.find([b"k"]) == {b"k": 1.0}
        assert entries(file)[0][8] == 3

    def test_thousands_of_keys_are_found(self, file):
        store = AnswerStore(file, "f")
        keys = [str(i).encode() for i in range(1201)]
        store.keep(dict.fromkeys(keys, 1.0))
        assert len(store.find([*keys, b"none"])) == 1201


@pytest.mark.parametrize("policy", ["raise", "reject"])
def test_a_run_is_the_same_with_and_without(file, policy):
    chain = toy_chain("uniform", length=3, num_steps=4)
    found = []
    for options in ({}, {"cache": file}, {"cache": file}):
        reward = Reward(lambda x0: (x0 == 1).sum(-1) / 3, 0.2, on_error=policy, **options)
        found.append(SMC(chain, reward, num_particles=32).run(seed=0))
    for other in found[1:]:
        assert torch.equal(found[0].x0, other.x0)
        assert torch.equal(found[0].log_evidence, other.log_evidence)
    asked = [posterior.settings["rewards"]["<lambda>"]["asked"] for posterior in found]
    assert asked[0] == asked[1] > 0 == asked[2]


TWO = """
    import sys, torch
    from ppl_diffusion.potentials import Reward

    def total(x0):
        return x0.double().sum(-1) / 7

    reward = Reward(total, cache=sys.argv[1], batch_size=1)
    rows = torch.arange(300)[:, None].expand(-1, 3)
    for part in rows.split(20):
        found = reward(part)
        assert torch.equal(found, part.double().sum(-1) / 7)
    print(reward.num_calls)
"""


def test_two_runs_share_a_file(file):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [run.communicate(timeout=120) for run in runs]
    assert [error for _, error in told] == ["", ""]
    assert len(entries(file)) == 300
    assert all(int(out) <= 300 for out, _ in told)


class TestRefused:
    @pytest.mark.parametrize("content", [b"not a database at all " * 50, b"\x00" * 8192])
    def test_a_file_that_is_no_database(self, file, content):
        file.write_bytes(content)
        with pytest.raises(PotentialError) as caught:
            Reward(Recorder(), cache=file)
        assert str(caught.value) == (
            f"the cache file {file} is damaged (file is not a database); delete or rename it, and "
            "answers are asked for again."
        )
        assert file.read_bytes() == content

    def test_a_damaged_database(self, file):
        store = AnswerStore(file, "f")
        store.keep({str(i).encode() * 9: float(i) for i in range(2000)})
        store._file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store.close()
        content = bytearray(file.read_bytes())
        content[4096 : 4096 * 8] = b"\xa5" * (4096 * 7)
        file.write_bytes(content)
        with pytest.raises(PotentialError, match=r"answers\.sqlite is damaged \(.*\); delete or"):
            Reward(Recorder(), cache=file)

    def test_a_database_of_something_else(self, file):
        with closing(sqlite3.connect(file)) as other:
            other.execute("CREATE TABLE mine (x)")
        with pytest.raises(PotentialError, match="is a database of something else; give another"):
            Reward(Recorder(), cache=file)

    def test_another_format(self, file):
        AnswerStore(file, "f").close()
        with closing(sqlite3.connect(file)) as opened:
            opened.execute("PRAGMA user_version = 7")
        with pytest.raises(PotentialError, match="has format 7, and this release reads 1"):
            AnswerStore(file, "f")

    def test_a_folder_that_is_not_there(self, tmp_path):
        file = tmp_path / "none" / "a.sqlite"
        with pytest.raises(PotentialError) as caught:
            Reward(Recorder(), cache=file)
        assert str(caught.value) == (
            f"the cache file {file} cannot be used (unable to open database file); give a file in "
            "a folder that exists, that you may write to and that has room."
        )

    def test_options_that_need_it(self):
        with pytest.raises(ValueError, match="version and retry_failed need the file"):
            Reward(Recorder(), version="2")
