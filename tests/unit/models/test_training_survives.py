"""Training that is killed or stopped goes on to the same bytes, and overwrites nothing unasked."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from training_toy import RECIPE, STEPS, run

from ppl_diffusion.models import fitting
from ppl_diffusion.models.training import TrainingStopped

SCRIPT = Path(__file__).parents[2] / "helpers" / "training_toy.py"
WEIGHTS = Path("prior") / "model.safetensors"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    run(out)
    return {name: (out / name).read_bytes() for name in (WEIGHTS, "run.json")}


def same(out, unbroken):
    return all((out / name).read_bytes() == content for name, content in unbroken.items())


def die():
    raise RuntimeError("killed")


@contextmanager
def stop_at(step, act):
    """Let something happen in the middle of a step."""
    plain = fitting.Fit.training_step

    def stopped(self, *args):
        if self.global_step == step:
            act()
        return plain(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.Fit, "training_step", stopped)
        yield


@pytest.mark.parametrize("step", [4, 7, STEPS - 1])
def test_a_run_that_is_stopped_after_any_step_goes_on(step, unbroken, tmp_path):
    """Between two validations, before one and behind one: its schedule is not disturbed."""
    assert RECIPE.validate_every == 5
    usual = signal.getsignal(signal.SIGTERM)
    with (
        stop_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(TrainingStopped) as stopped,
    ):
        run(tmp_path)
    assert stopped.value.signal == signal.SIGTERM
    assert str(stopped.value) == "Training was interrupted; go on with --resume."
    assert signal.getsignal(signal.SIGTERM) is usual
    run(tmp_path, resume=True)
    assert same(tmp_path, unbroken)
    assert not (tmp_path / "started.json").exists()


def test_a_checkpoint_comes_every_so_often(unbroken, tmp_path):
    """The process dies in step 8, and has seen no validation since step 5."""

    with stop_at(8, die), pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, every=0.0)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 8
    run(tmp_path, resume=True)
    assert same(tmp_path, unbroken)


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    with stop_at(7, twice), pytest.raises(TrainingStopped, match=r"go on with --resume"):
        run(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(unbroken, tmp_path):
    with stop_at(2, die), pytest.raises(RuntimeError, match="killed"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["started.json"]
    run(tmp_path, resume=True)
    assert same(tmp_path, unbroken)


def test_no_run_is_overwritten_unasked(unbroken, tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError) as refused:
        run(tmp_path, seed=1)
    assert str(refused.value) == (
        f"The folder {str(tmp_path)!r} already holds a training run: go on with it by --resume, "
        "replace it by --force, or choose another --out."
    )
    assert same(tmp_path, unbroken)
    run(tmp_path, seed=1, force=True)
    assert not same(tmp_path, unbroken)


def killed_and_resumed(out, seconds):
    words = [sys.executable, str(SCRIPT), str(out)]
    process = subprocess.Popen(words)
    started = time.monotonic()
    while not (out / "started.json").is_file():
        assert time.monotonic() - started < 120
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    subprocess.run([*words, "--resume"], check=True)


@pytest.mark.parametrize("seconds", [0.6, 1.5])
def test_a_killed_run_goes_on_to_the_same_bytes(seconds, unbroken, tmp_path):
    killed_and_resumed(tmp_path, seconds)
    assert same(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_run_killed_at_random_moments_goes_on(moment, unbroken, tmp_path):
    killed_and_resumed(tmp_path, 3 * random.Random(moment).random())
    assert same(tmp_path, unbroken)
