"""What a comparison of run folders says, and what it refuses."""

import json
import shutil

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.models import MaskedDiffusion

LENGTH = 12
QUICK = ["--particles", "6", "--runs", "2", "--steps", "3", "--quiet"]
MATRIX = """MEME version 4
ALPHABET= ACGT
MOTIF M1 one
letter-probability matrix: alength= 4 w= 2 nsites= 10
{} 0.1 0.1 {}
0.1 0.7 0.1 0.1
"""


def save_prior(folder, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = MaskedDiffusion.build(list("ACGT"), LENGTH, name="p", dim=8, depth=1, heads=1)
    prior.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return save_prior(tmp_path_factory.mktemp("models") / "prior", 0)


@pytest.fixture(scope="module")
def runs(prior, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        asked = ["--gc", "0.2", "0.8", "--seed", str(seed), "--out", str(folder / f"run{seed}")]
        assert run(["design", prior, *QUICK, *asked]) == 0
    return folder


def compared(folders, tmp_path):
    out = tmp_path / "compared.json"
    assert run(["compare", *map(str, folders), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def letters(folders, tmp_path):
    return [row["target"] for row in compared(folders, tmp_path)["runs"]]


def test_matrices_of_one_name_are_told_apart_by_their_numbers(prior, tmp_path):
    for place, numbers in (("one", (0.7, 0.1)), ("two", (0.1, 0.7)), ("copy", (0.7, 0.1))):
        (tmp_path / place).mkdir()
        motif = tmp_path / place / "m.meme"
        motif.write_text(MATRIX.format(*numbers))
        seed = ["--seed", str(len(place)), "--out", str(tmp_path / f"run-{place}")]
        assert run(["design", prior, *QUICK, "--motif", f"{motif}@M1", *seed]) == 0
    folders = [tmp_path / f"run-{place}" for place in ("one", "two", "copy")]
    assert letters(folders, tmp_path) == ["A", "B", "A"]


def test_priors_are_told_apart_by_their_weights_not_their_path(prior, tmp_path):
    copy = shutil.copytree(prior, tmp_path / "copy")
    other = save_prior(tmp_path / "models" / "prior", 1)
    for name, place in (("a", prior), ("b", str(copy)), ("c", other)):
        asked = ["--gc", "0.2", "0.8", "--seed", str(ord(name)), "--out", str(tmp_path / name)]
        assert run(["design", place, *QUICK, *asked]) == 0
    folders = [tmp_path / name for name in "abc"]
    assert letters(folders, tmp_path) == ["A", "A", "B"]
    notes = compared(folders, tmp_path)["notes"]
    assert any("differ in prior:" in note for note in notes)


def test_runs_that_disagree_are_told_wherever_their_evidence_stands(prior, tmp_path, capsys):
    # Two particles that never look ahead, and a sharp reward: the best run is all there is.
    motif = tmp_path / "m.meme"
    longer = MATRIX.format(0.7, 0.1).replace("w= 2", "w= 6")
    motif.write_text(longer + 4 * "0.1 0.1 0.7 0.1\n")
    asked = ["--particles", "2", "--runs", "8", "--steps", "3", "--twist", "none"]
    asked += ["--motif", f"{motif}@M1:40", "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lowest, highest = summary["log_evidence_range"]
    assert highest - lowest > 2
    said = f"runs disagree by {highest - lowest:.1f} nats"
    assert said in summary["evidence_note"]
    assert f"Note: {said}" in capsys.readouterr().out
    assert run(["diagnose", str(tmp_path / "run")]) == 0
    assert f"Note: {said}" in capsys.readouterr().out


def test_roots_of_particles_without_weight_are_not_counted(prior, tmp_path, capsys):
    asked = ["--particles", "16", "--runs", "2", "--steps", "2", "--twist", "none", "--quiet"]
    asked += ["--ess-threshold", "0", "--gc", "0.4", "0.6", "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 0
    roots = json.loads((tmp_path / "run" / "summary.json").read_text())["root_ancestors"]
    assert max(roots) < 16  # some particle misses the GC content
    assert run(["diagnose", str(tmp_path / "run")]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "num_eves" in text]
    assert ", ".join(map(str, roots)) in line
