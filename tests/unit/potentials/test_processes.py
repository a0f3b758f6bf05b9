"""Worker processes: what ends one of them costs its own call and no other."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import Processes
from ppl_diffusion.potentials.causes import Died, GaveUp
from ppl_diffusion.potentials.parcels import Parcels

# Functions stand inside of tests: those travel by value, and a worker cannot import a test.


@pytest.fixture(scope="module")
def pool():
    with Processes(2) as pool:
        yield pool


def pid_of(pool):
    return pool.submit(os.getpid).result()


def gone(pid, within=10.0):
    over = time.monotonic() + within
    while time.monotonic() < over:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_they_do_what_an_executor_does(pool):
    assert list(pool.map(lambda x: x + 1, range(20))) == list(range(1, 21))
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        pool.submit(lambda: 1 / 0).result()


def test_workers_are_processes_that_lead_their_group_and_stay_warm(pool):
    pids = {pid_of(pool) for _ in range(20)}
    assert os.getpid() not in pids
    assert len(pids) <= 2
    pid, group = pool.submit(lambda: (os.getpid(), os.getpgrp())).result()
    assert pid == group != os.getpgrp()


def test_a_function_is_sent_once(pool):
    parcels = Parcels()
    fn = partial(int, "7")
    assert parcels.of(fn) is parcels.of(fn)
    assert [pool.submit(fn).result() for _ in range(5)] == [7] * 5
    others = [partial(int, str(i)) for i in range(20)]  # more than a worker remembers
    assert [pool.submit(fn).result() for fn in others * 2] == [*range(20), *range(20)]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os._exit(3), "its process ended with exit code 3"),
        (
            lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "its process ended with signal 11 (SIGSEGV)",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "its process ended with signal 9 (SIGKILL, by which systems end what takes too much "
            "memory)",
        ),
    ],
)
def test_a_process_that_ends_fails_its_own_call(end, words):
    with Processes(1) as pool:
        calls = [pool.submit(fn) for fn in (os.getpid, end, os.getpid)]
        with pytest.raises(Died) as caught:
            calls[1].result()
        assert str(caught.value) == words
        assert calls[0].result() != calls[2].result()


@pytest.mark.parametrize("kind", [OSError, EOFError, TimeoutError, BrokenPipeError, GaveUp])
def test_errors_that_look_like_a_lost_pipe_are_the_functions_own(pool, kind):
    def fails():
        raise kind("of my own")

    before = {pid_of(pool) for _ in range(20)}
    with pytest.raises(kind, match="of my own"):
        pool.submit(fails).result()
    assert {pid_of(pool) for _ in range(20)} & before


def test_sys_exit_is_an_error_like_another(pool):
    with pytest.raises(RuntimeError, match="4") as caught:
        pool.submit(lambda: sys.exit(4)).result()
    assert type(caught.value).__name__ == "SystemExit"
    assert isinstance(caught.value, Exception)


def test_an_error_that_cannot_travel_keeps_its_name(pool):
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def fails():
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="1 and 2") as caught:
        pool.submit(fails).result()
    assert type(caught.value).__name__ == "Odd"


def test_what_takes_too_long_is_killed_with_all_it_started(tmp_path):
    note = tmp_path / "pid"

    def starts_another():
        child = subprocess.Popen(["sleep", "1000"])
        note.write_text(str(child.pid))
        child.wait()

    with Processes(1, timeout=1.0) as pool:
        first = pid_of(pool)
        with pytest.raises(GaveUp, match=r"^no answer within 1 s$"):
            pool.submit(starts_another).result()
        assert gone(int(note.read_text()))
        assert pid_of(pool) != first


def test_time_is_counted_from_the_start_of_the_call_and_not_in_the_queue():
    with Processes(1, timeout=1.5) as pool:
        calls = [pool.submit(time.sleep, 0.4) for _ in range(6)]  # 2.4 s in all
        assert [call.result() for call in calls] == [None] * 6


def test_a_call_may_have_a_deadline_of_its_own(pool):
    with pytest.raises(GaveUp, match=r"^no answer within 0\.2 s$"):
        pool.submit_within(0.2, time.sleep, 60).result()


def test_what_cannot_be_sent_is_one_sentence(pool, monkeypatch):
    def locked(lock):
        return 1

    with pytest.raises(PotentialError) as caught:
        pool.submit(locked, pool._crew._lock)
    assert str(caught.value) == (
        "locked cannot be sent to another process (TypeError: cannot pickle '_thread.lock' "
        "object); define it in a module, and let it open files, models and connections when it is "
        "called."
    )
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    locked.__module__ = "__main__"
    with pytest.raises(PotentialError) as caught:
        Parcels().of(partial(print, locked))
    assert "it is defined in __main__); define it in a module, or install cloudpickle" in str(
        caught.value
    )


def test_a_killed_executor_ends_its_calls():
    pool = Processes(1)
    pid = pid_of(pool)
    call = pool.submit(time.sleep, 1000)
    queued = pool.submit(time.sleep, 1000)
    while not call.running():
        time.sleep(0.01)
    pool.kill()
    assert isinstance(call.exception(timeout=20), Died)
    assert queued.cancelled()
    assert gone(pid)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(print)


def test_an_error_in_the_block_waits_for_nobody():
    def interrupted():
        with Processes(1) as pool:
            pool.submit(time.sleep, 1000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize(
    ("number", "options", "text"),
    [
        (0, {}, "Processes: num_workers must be a whole number, at least 1, got 0."),
        (True, {}, "Processes: num_workers must be a whole number, at least 1, got True."),
        (1, {"memory": 1.5}, "Processes: memory must be a whole number, at least 1 byte, got 1.5."),
        (
            1,
            {"timeout": 0},
            "Processes: timeout must be a positive, finite number of seconds, got 0.",
        ),
    ],
)
def test_bad_options_are_one_sentence(number, options, text):
    with pytest.raises(ValueError) as caught:
        Processes(number, **options)
    assert str(caught.value) == text


def script(text, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


HANGS = """
    import time
    from ppl_diffusion.potentials import Processes

    def hangs():
        time.sleep(1000)

    pool = Processes(1)
    print(pool.submit(lambda: __import__("os").getpid()).result(), flush=True)
    pool.submit(hangs)
"""


def test_a_script_without_a_guard_ends_though_a_call_hangs():
    with script(HANGS) as run:
        out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, "")
    assert gone(int(out))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_and_say_nothing(how):
    with script(HANGS + "    time.sleep(1000)\n", start_new_session=True) as run:
        pid = int(run.stdout.readline())
        os.killpg(run.pid, how)
        _, err = run.communicate(timeout=60)
    assert gone(pid)
    assert err.count("Traceback") == (how == signal.SIGINT)  # the script's own
