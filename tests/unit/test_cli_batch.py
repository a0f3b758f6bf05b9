"""What a script that runs commands relies on: logs, JSON, endings, exit codes, going on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.commands.progress import LogLines, clock_time, progress_bar
from ppl_diffusion.designs.methods import SMC
from ppl_diffusion.models import MaskedDiffusion

QUICK = [
    "--particles",
    "8",
    "--runs",
    "1",
    "--steps",
    "4",
    "--method",
    "smc",
    "--gc",
    "0.25",
    "0.75",
]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = MaskedDiffusion.build(list("ACGT"), 16, name="tiny", dim=16, depth=1, heads=2)
    program.save(folder)
    return str(folder)


# Progress.


def lines(moments, total, capsys):
    """Return the lines written at some moments, each with the steps that are done by then."""
    times = iter([0.0, *(seconds for seconds, _ in moments)])
    log = LogLines("design x", lambda: next(times))
    for _, step in moments:
        log.advance(step, total)
    return capsys.readouterr().err.splitlines()


def test_a_log_gets_a_line_per_tenth_of_the_way(capsys):
    said = lines([(2.0 * step, step) for step in range(1, 101)], 100, capsys)
    assert len(said) == 10
    assert said[0] == "design x: 10 of 100, 3:00 left"
    assert said[-1] == "design x: 100 of 100, 0:00 left"


def test_a_log_gets_a_line_per_half_a_minute(capsys):
    said = lines([(10.0 * step, step) for step in range(1, 7)], 1000, capsys)
    assert said == ["design x: 3 of 1000, 2:46:10 left", "design x: 6 of 1000, 2:45:40 left"]


def test_a_log_is_not_flooded(capsys):
    assert len(lines([(0.01 * step, step) for step in range(1, 101)], 100, capsys)) == 1


def test_what_is_left_does_not_count_what_an_earlier_process_did(capsys):
    assert lines([(30.0, 61), (60.0, 62)], 100, capsys)[-1] == "design x: 62 of 100, 19:00 left"


def test_quiet_says_nothing(capsys):
    with progress_bar("x", quiet=True) as advance:
        advance(1, 1)
    assert capsys.readouterr() == ("", "")


def test_times():
    assert [clock_time(s) for s in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


# JSON.


def told(words, capsys):
    assert run([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_answer_in_json(prior, tmp_path, capsys):
    out = tmp_path / "run"
    summary = told(["design", prior, *QUICK, "--out", out], capsys)
    assert summary == json.loads((out / "summary.json").read_text())
    # A run that is finished is the answer to going on with it.
    assert told(["design", prior, *QUICK, "--out", out, "--resume"], capsys) == summary
    figures = told(["diagnose", out], capsys)
    assert figures["num_particles"] == 8
    assert isinstance(figures["warnings"], list)
    other = str(tmp_path / "other")
    assert run(["design", prior, *QUICK, "--out", other, "--seed", "1", "--quiet"]) == 0
    assert run(["compare", str(out), other, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2
    drawn = told(["sample", prior, "--num", 3, "--steps", 4], capsys)
    assert len(drawn["sequences"]) == drawn["num"] == 3
    assert "yeast-promoter" in told(["models"], capsys)["priors"]


# Files of samples.


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("a.fasta", ">sample_1"),
        ("a.FA", ">sample_1"),
        ("a.csv", "sample,sequence"),
        ("a.tsv", "sample\tsequence"),
        ("a.txt", None),
        ("a.smi", None),
    ],
)
def test_endings_say_what_files_hold(name, first, prior, tmp_path):
    words = ["sample", prior, "--num", "2", "--steps", "4", "--out", str(tmp_path / name)]
    assert run(words) == 0
    found = (tmp_path / name).read_text().splitlines()
    if first is None:
        assert [len(line) for line in found] == [16, 16]
    else:
        assert found[0] == first


def test_an_unknown_ending_and_a_file_that_is_there_are_refused(prior, tmp_path, capsys):
    words = ["sample", prior, "--num", "2", "--steps", "4", "--out"]
    place = tmp_path / "a.xlsx"
    assert run([*words, str(place)]) == 2
    assert capsys.readouterr().err == (
        f"ppl-diffusion: The ending of {str(place)!r} is none that is known: end it in one of "
        ".fasta, .fa, .csv, .tsv, .txt, .smi.\n"
    )
    place = tmp_path / "a.txt"
    place.write_text("mine")
    assert run([*words, str(place)]) == 2
    assert capsys.readouterr().err == (
        f"ppl-diffusion: The file {str(place)!r} is there already: choose another --out, or "
        "replace it with --force.\n"
    )
    assert place.read_text() == "mine"
    assert run([*words, str(place), "--force"]) == 0
    assert place.read_text() != "mine"


# Going on.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_design_goes_on_after_a_signal(number, code, prior, tmp_path, capsys, monkeypatch):
    asked = ["design", prior, *QUICK, "--quiet", "--checkpoint-every", "0"]
    assert run([*asked, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"

    class Signalled(SMC):
        def __init__(self, *args, **options):
            def progress(step, total):
                if step == 3:
                    os.kill(os.getpid(), number)

            super().__init__(*args, **{**options, "progress": progress})

    with monkeypatch.context() as patch:
        patch.setattr("ppl_diffusion.designs.methods.SMC", Signalled)
        assert run([*asked, "--out", str(out)]) == code
    place = str(out / "checkpoint")
    assert capsys.readouterr().err == (
        f"ppl-diffusion: Stopped: the run is kept in {place!r}; go on with --resume.\n"
    )
    assert run([*asked, "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"ppl-diffusion: The folder {str(out)!r} holds a run that is not finished: go on with "
        "--resume, or begin anew with --force.\n"
    )
    assert run([*asked, "--out", str(out), "--resume"]) == 0
    for name in ("designs.csv", "designs.fasta", "particles/particles.safetensors", "posterior.nc"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_design_killed_at_a_random_moment_goes_on(moment, prior, tmp_path):
    code = "from ppl_diffusion.cli import main; main()"
    asked = ["design", prior, *QUICK, "--method", "refinement", "--quiet"]
    asked += ["--checkpoint-every", "0", "--out"]
    words, out = [sys.executable, "-c", code, *asked], tmp_path / "run"
    assert run([*asked, str(tmp_path / "whole")]) == 0
    process = subprocess.Popen([*words, str(out)])
    while not list(out.glob("checkpoint/stage-*.pt")):
        time.sleep(0.01)
    time.sleep(3 * random.Random(moment).random())
    process.kill()
    process.wait()
    subprocess.run([*words, str(out), "--resume"], check=True)
    for name in ("designs.csv", "designs.fasta", "particles/particles.safetensors", "posterior.nc"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_bad_period_is_one_sentence(prior, capsys):
    assert run(["design", prior, *QUICK, "--checkpoint-every", "-1"]) == 2
    said = "ppl-diffusion: --checkpoint-every must be 0 or more seconds, not -1.0.\n"
    assert capsys.readouterr().err == said


def completed(words):
    """Return what bash is told of the last of some words, as it is typed."""
    asked = {
        "_PPL_DIFFUSION_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from ppl_diffusion.cli import main; main()"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **asked})
    return done.stdout.split()


def test_shells_complete_commands_and_flags_of_methods():
    assert completed(["ppl-diffusion", "dia"]) == ["diagnose"]
    assert completed(["ppl-diffusion", "design", "x", "--chai"]) == ["--chains"]
