"""Runs in processes of their own: the same result on one worker and on several."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import ppl_diffusion as ppd
from ppl_diffusion.cli import run
from ppl_diffusion.designs.spread import seed_of
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.smc.pooling import pooled

ASKED = ["--gc", "0.4", "0.6", "--method", "smc", "--particles", "16", "--runs", "3", "--quiet"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MaskedDiffusion.build(list("ACGT"), 12, name="tiny", dim=16, depth=1, heads=2).save(folder)
    return str(folder)


def timeless(folder):
    """Return what a run says of itself, without what clocks say."""
    summary = json.loads((folder / "summary.json").read_text())
    for told in summary["settings"].get("rewards", {}).values():
        for name in ("seconds", "under_way", "utilisation", "overlap"):
            told.pop(name)
    return {**summary, "seconds": 0}


def same_bytes(one, other):
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in files:
        if name.name != "summary.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert timeless(one) == timeless(other)


def test_one_worker_and_three_give_the_same_bytes(prior, tmp_path):
    for workers in ("1", "3"):
        out = str(tmp_path / workers)
        assert run(["design", prior, *ASKED, "--workers", workers, "--out", out]) == 0
    same_bytes(tmp_path / "1", tmp_path / "3")
    summary = json.loads((tmp_path / "1" / "summary.json").read_text())
    assert len({*summary["log_evidence"]}) == 3
    assert summary["settings"]["search"]["spread"] is True


def test_each_run_is_that_of_its_seed(prior):
    search = {"gc": (0.25, 0.75), "method": "smc", "particles": 16}
    whole = ppd.design(prior, runs=2, seed=5, workers=2, **search).posterior
    alone = [ppd.design(prior, runs=1, seed=seed_of(5, k), **search).posterior for k in (0, 1)]
    assert whole.log_evidence.tolist() == [float(p.log_evidence[0]) for p in alone]
    assert torch.equal(whole.x0, torch.cat([p.x0 for p in alone]))
    assert whole.num_evaluations == sum(p.num_evaluations for p in alone)


def test_a_budget_is_shared_by_the_runs(prior):
    def length(texts):
        return [len(text) for text in texts]

    table = {"python": length, "budget": 200}
    search = {"method": "smc", "particles": 16, "runs": 2, "workers": 2}
    found = ppd.design(prior, rewards=table, **search)
    assert 0 < found.summary["settings"]["rewards"]["length"]["asked"] <= 200


def test_what_is_no_one_target_is_not_pooled(prior):
    search = {"method": "smc", "particles": 8, "runs": 1}
    one = ppd.design(prior, gc=(0.25, 0.75), **search).posterior
    other = ppd.design(prior, gc=(0.0, 0.75), **search).posterior
    with pytest.raises(ValueError, match="the runs are not of one target"):
        pooled([one, other])
    with pytest.raises(ValueError, match="there are no runs"):
        pooled([])
    both = pooled([one, replace(one, seconds=1.0)])
    assert both.num_runs == 2
    assert both.pooled_log_evidence == pytest.approx(one.pooled_log_evidence)
    assert not math.isnan(both.pooled_log_evidence)


def test_a_failure_in_one_run_ends_all_in_one_sentence(prior, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad_score.py").write_text("def score(texts):\n    raise RuntimeError('broken')\n")
    monkeypatch.chdir(tmp_path)
    asked = ["design", prior, "--reward", "bad_score:score", *ASKED, "--workers", "2"]
    assert run([*asked, "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert "score failed on the sequence" in err
    assert err.count("\n") == 1


def test_impossible_places(prior, tmp_path, capsys):
    for more in (["--workers", "0"], ["--executor", "abacus"]):
        assert run(["design", prior, *ASKED, *more, "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="There is no executor called 'abacus'"):
        ppd.design(prior, gc=(0, 1), workers=1, executor="abacus")


def test_a_spread_job_goes_on_after_a_kill(prior, tmp_path):
    command = [sys.executable, "-m", "ppl_diffusion.cli", "design", prior, *ASKED]
    command += ["--workers", "2", "--checkpoint-every", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole)], check=True)
    job = subprocess.Popen([*command, "--out", str(killed)], start_new_session=True)
    while not list(killed.rglob("stage-*.pt")) and job.poll() is None:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    subprocess.run([*command, "--out", str(killed), "--resume"], check=True)
    same_bytes(whole, killed)


@pytest.mark.ray
def test_runs_on_ray(prior, tmp_path):
    pytest.importorskip("ray")
    for name, more in {"here": ["--workers", "1"], "ray": ["--executor", "ray"]}.items():
        assert run(["design", prior, *ASKED, *more, "--out", str(tmp_path / name)]) == 0
    same_bytes(tmp_path / "here", tmp_path / "ray")
