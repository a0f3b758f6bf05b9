"""Everything that a reward can do wrong, and what a run makes of it.

Each fault strikes the sequences that begin with 0; the others keep their values.
"""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import Processes, Reward
from ppl_diffusion.testing.toys import toy_chain

ROWS = torch.tensor([[1, 2], [0, 2], [2, 2]])
NOBODY = 65534


def striking(fault):
    """A reward that is struck by a fault at sequences that begin with 0."""

    def dock(x0):
        if bool((x0[:, 0] == 0).any()):
            return fault(x0)
        return x0[:, 0].double()

    return dock


def raises(x0):
    raise ValueError("no key")


def spins(x0):
    """Stay in compiled code that holds the interpreter: no thread and no signal handler runs."""
    return len(str(7 ** (10**8)))


def sleeps(x0):
    """Stay in compiled code that lets go of the interpreter."""
    ctypes.CDLL(None).sleep(1000)


def backtracks(x0):
    re.match(r"(a+)+$", "a" * 40 + "b")


def crashes(x0):
    ctypes.string_at(0)


def kills_itself(x0):
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(x0):
    os._exit(7)


def leaks(x0):
    held = []
    while True:
        held.append(bytearray(2**26))


def leaks_in_c(x0):
    """Allocate where nobody makes an exception of it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    while libc.malloc(2**26):
        pass
    libc.abort()


TABLE = {
    "raises": (raises, "raised ValueError", r"ValueError: no key"),
    "NaN": (lambda x0: [math.nan], "not a number", r"it returned nan"),
    "None": (lambda x0: None, "wrong answer", r"it returned None for 1 sequence"),
    "a None": (lambda x0: [None], "not a number", r"it returned None"),
    "text": (lambda x0: ["-7.1"], "not a number", r"it returned the text '-7\.1'"),
    "wrong count": (lambda x0: [1, 2], "wrong answer", r"it returned more than 1 values for 1 seq"),
    "spins": (spins, "gave up", r"GaveUp: no answer within 1 s"),
    "sleeps": (sleeps, "gave up", r"GaveUp: no answer within 1 s"),
    "backtracks": (backtracks, "gave up", r"GaveUp: no answer within 1 s"),
    "crashes": (crashes, "died", r"Died: its process ended with signal 11 \(SIGSEGV\)"),
    "kills itself": (kills_itself, "died", r"Died: its process ended with signal 9 \(SIGKILL, by"),
    "leaves": (leaves, "died", r"Died: its process ended with exit code 7"),
    "leaks": (leaks, "raised MemoryError", r"MemoryError: "),
    "leaks in C": (leaks_in_c, "died", r"Died: its process ended with signal 6 \(SIGABRT\)"),
}


def by_value(function):
    """Let a function of this file travel by value: workers cannot import a test."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return function


@pytest.fixture(scope="module")
def pool():
    with Processes(2, timeout=1.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def narrow():
    # A process with torch takes up .7 GiB before it begins; pages take their time to be filled.
    with Processes(1, memory=2**31) as pool:
        yield pool


@pytest.mark.parametrize("fault", TABLE)
def test_a_fault_costs_its_own_sequence(fault, request):
    strike, cause, words = TABLE[fault]
    dock = by_value(striking(strike))
    pool = request.getfixturevalue("narrow" if fault.startswith("leaks") else "pool")
    reward = Reward(dock, executor=pool, on_error="reject")
    assert reward(ROWS).tolist() == [1.0, -math.inf, 2.0]
    assert reward.failures == {cause: 1}
    assert re.match(words, reward.first_failure)
    assert reward.first_failure.endswith(", on the sequence [0, 2]")


@pytest.mark.parametrize("fault", ["raises", "sleeps", "leaves"])
def test_by_default_it_is_one_error(fault, pool):
    strike, _, words = TABLE[fault]
    reward = Reward(by_value(striking(strike)), executor=pool)
    with pytest.raises(PotentialError, match=rf"dock failed on the sequence \[0, 2\] \({words}"):
        reward(ROWS)


def test_a_run_goes_on_without_what_fails(pool):
    reward = Reward(by_value(striking(leaves)), 0.5, executor=pool, on_error="reject")
    posterior = SMC(toy_chain("uniform"), reward, num_particles=16).run(seed=0)
    assert posterior.log_evidence.isfinite().all()
    told = posterior.settings["rewards"]["dock"]
    assert told["failed"] == told["failed_by_cause"]["died"] > 0
    assert (posterior.x0[posterior.log_weights > -math.inf][:, 0] != 0).all()


class TestFolders:
    """What is written to may be damaged (:mod:`test_answer_store`), shared, or closed to us."""

    @pytest.fixture
    def folder(self):
        """A folder that everybody can reach, which those of pytest are not."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            folder.chmod(0o755)
            yield folder
            folder.chmod(0o755)

    @pytest.fixture
    def closed(self, folder):
        """What closes the folder, even to root, to whom everything is open."""
        root = os.geteuid() == 0

        def close():
            folder.chmod(0o555)
            if root:
                os.seteuid(NOBODY)

        yield close
        if root:
            os.seteuid(0)

    def test_a_folder_that_is_read_only(self, folder, closed):
        file = folder / "answers.sqlite"
        closed()
        with pytest.raises(PotentialError) as caught:
            Reward(raises, cache=file)
        assert str(caught.value) == (
            f"the cache file {file} cannot be used (unable to open database file); give a file in "
            "a folder that exists, that you may write to and that has room."
        )

    def test_a_file_that_is_read_only(self, folder, closed):
        file = folder / "answers.sqlite"
        Reward(lambda x0: x0[:, 0], cache=file)(ROWS)
        before = file.read_bytes()
        file.chmod(0o444)
        closed()
        with pytest.raises(PotentialError, match=r"cannot be used \(.*\); give a file in a folder"):
            Reward(raises, cache=file)
        assert file.read_bytes() == before


def test_a_script_with_a_hung_reward_ends_by_itself():
    code = """
        import ctypes, torch
        from ppl_diffusion.potentials import Processes, Reward

        def dock(x0):
            if x0[0, 0] == 0:
                ctypes.CDLL(None).sleep(1000)
            return x0.sum(-1)

        reward = Reward(dock, executor=Processes(2), on_error="reject")
        reward.prefetch(torch.tensor([[0, 1]]))  # nobody waits for it
        print(reward(torch.tensor([[1, 1], [2, 1]])).tolist())
    """
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[2.0, 3.0]\n", "")
    assert time.monotonic() - started < 100
