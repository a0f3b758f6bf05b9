"""Jobs that are killed, stopped, or run out of disk."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ppl_diffusion.inference import SMC
from ppl_diffusion.jobs import keeping
from ppl_diffusion.jobs.checks import DiskFull, InputError, JobStopped
from ppl_diffusion.jobs.folder import check_target, whole_folder
from ppl_diffusion.jobs.keeping import kept_job
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import ParticlePosterior, checkpoint
from ppl_diffusion.testing.toys import toy_markov_chain

SCRIPT = Path(__file__).parents[2] / "helpers" / "kept_toy.py"


def begin(folder):
    words = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def wait_for(folder, seconds):
    """Wait until a job has written a checkpoint, and then some seconds."""
    started = time.monotonic()
    while not list(folder.glob("checkpoint/stage-*.pt")):
        assert time.monotonic() - started < 120
        time.sleep(0.01)
    time.sleep(seconds)


def finish(process):
    said = process.communicate()[1]
    assert process.returncode == 0, said


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    started = time.monotonic()
    process = begin(folder)
    wait_for(folder, 0)
    begun = time.monotonic()
    finish(process)
    return content(folder), time.monotonic() - begun, started


def killed_and_resumed(folder, unbroken, number, share):
    whole, seconds, _ = unbroken
    process = begin(folder)
    wait_for(folder, share * seconds)
    process.send_signal(number)
    said = process.communicate()[1]
    finish(begin(folder))
    assert content(folder) == whole
    return process.returncode, said


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_killed_job_goes_on_to_the_same_bytes(share, unbroken, tmp_path):
    code, _ = killed_and_resumed(tmp_path / "run", unbroken, signal.SIGKILL, share)
    assert code == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_job_killed_at_random_moments_goes_on(moment, unbroken, tmp_path):
    share = random.Random(moment).random() * 0.9
    killed_and_resumed(tmp_path / "run", unbroken, signal.SIGKILL, share)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_job_with_one_sentence(number, unbroken, tmp_path):
    folder = tmp_path / "run"
    code, said = killed_and_resumed(folder, unbroken, number, 0.3)
    assert code == 128 + number
    place = str(folder / "checkpoint")
    assert said == f"Stopped: the run is kept in {place!r}; go on with --resume.\n"


# In one process.


def toy(**options):
    potential = Potential(lambda x0: 1.5 * (x0[..., :-1] == x0[..., 1:]).sum(-1), name="pairs")
    return SMC(toy_markov_chain(length=6), potential, num_particles=8, **options)


def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    def twice(done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the step went on")

    with pytest.raises(JobStopped) as stopped, kept_job(tmp_path / "run", {}, every=0.0):
        toy(progress=twice).run(seed=0)
    assert stopped.value.code == 130
    assert (tmp_path / "run" / "checkpoint" / "stage-0000.pt").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), kept_job(tmp_path / "run", {}):
        1 / 0  # noqa: B018
    assert not (tmp_path / "run").exists()


def unfinished(folder, question):
    with suppress(ZeroDivisionError), kept_job(folder, question, every=0.0):
        toy().run(seed=0)
        1 / 0  # noqa: B018


def test_another_question_is_refused(tmp_path):
    unfinished(tmp_path / "run", {"seed": 0, "search": {"particles": 8, "twist": None}})
    asked = {"seed": 0, "search": {"particles": 9, "twist": None}}
    with pytest.raises(InputError) as refused, kept_job(tmp_path / "run", asked, resume=True):
        pass
    assert str(refused.value) == (
        f"The run in {str(tmp_path / 'run' / 'checkpoint')!r} began with search.particles 8, not "
        "9; resume it with that, or begin anew without --resume."
    )


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "run"
    unfinished(folder, {})
    place = folder / "checkpoint" / "stage-0000.pt"
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(ValueError) as refused, kept_job(folder, {}, resume=True):
        toy().run(seed=0)
    assert str(refused.value) == (
        f"The file {str(place)!r} is damaged or no checkpoint of a run; begin anew without "
        "--resume."
    )


def test_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return pytest.fail, ("code of a checkpoint was run",)

    folder = tmp_path / "run"
    unfinished(folder, {})
    place = folder / "checkpoint" / "stage-0000.pt"
    torch.save({"format": 1, "shape": Payload()}, place)
    with pytest.raises(ValueError, match="is damaged"), kept_job(folder, {}, resume=True):
        toy().run(seed=0)


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    folder = tmp_path / "run"
    unfinished(folder, {})
    with pytest.raises(InputError) as refused:
        check_target(folder, replace=False)
    assert str(refused.value) == (
        f"The folder {str(folder)!r} holds a run that is not finished: go on with --resume, or "
        "begin anew with --force."
    )
    check_target(folder, replace=True)
    check_target(folder, replace=False, resume=True)


# A full disk.


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def run_and_write(folder):
    toy().run(seed=0)
    with whole_folder(folder, replace=False):
        full()


def test_a_full_disk_keeps_the_particles(tmp_path):
    folder = tmp_path / "run"
    posterior = toy().run(seed=0)
    with pytest.raises(DiskFull) as told, kept_job(folder, {}):
        run_and_write(folder)
    place = folder / "checkpoint" / "particles"
    assert str(told.value) == (
        f"The disk is full: the particles are kept in {str(place)!r}, and what is made of them is "
        "missing; free some space, and go on with --resume."
    )
    assert torch.equal(ParticlePosterior.load(place).x0, posterior.x0)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_full_of_weights_is_full(tmp_path):
    """Whoever writes them has an error of its own, without a number."""
    words = f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"
    with pytest.raises(DiskFull, match="free some space"), kept_job(tmp_path / "run", {}):
        raise SafetensorError(words)
    with pytest.raises(SafetensorError), kept_job(tmp_path / "run", {}):
        raise SafetensorError("header too large")


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    folder, whole = tmp_path / "run", toy().run(seed=0)
    with kept_job(folder, {}, every=0.0):
        monkeypatch.setattr(checkpoint, "write_bytes", full)
        with pytest.warns(UserWarning, match="it goes on, and can be resumed from the last one"):
            posterior = toy().run(seed=0)
    assert torch.equal(posterior.log_weights, whole.log_weights)


def test_other_errors_of_the_system_pass(tmp_path):
    with pytest.raises(FileNotFoundError), kept_job(tmp_path / "run", {}):
        (tmp_path / "missing").read_text()


def test_signals_need_the_main_thread_and_nothing_else(tmp_path):
    from threading import Thread

    failed = []

    def work():
        try:
            with keeping.kept_job(tmp_path / "run", {}):
                toy().run(seed=0)
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
