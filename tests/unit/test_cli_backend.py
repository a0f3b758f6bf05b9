"""The command line on JAX: the same folder, seeds that repeat, and what only torch has."""

import json

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.models import MaskedDiffusion

QUICK = ["--particles", "6", "--runs", "2", "--steps", "3", "--gc", "0.25", "0.75", "--quiet"]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = {"dim": 16, "depth": 1, "heads": 2}
        MaskedDiffusion.build(list("ACGT"), 12, name="tiny", **size).save(folder)
    return str(folder)


def test_a_design(prior, tmp_path):
    words = ["design", prior, *QUICK, "--fix", "2:ACG", "--method", "smc", "--backend", "numpyro"]
    assert run([*words, "--out", str(tmp_path / "jax")]) == 0
    summary = json.loads((tmp_path / "jax" / "summary.json").read_text())
    assert summary["settings"]["search"]["backend"] == "numpyro"
    assert summary["exact"]
    assert "clamped at 3 of 12 positions" in summary["target"]
    lines = (tmp_path / "jax" / "designs.fasta").read_text().splitlines()
    assert all(line[2:5] == "ACG" for line in lines if not line.startswith(">"))


def test_samples_repeat(prior, capsys):
    texts = []
    for seed in ("0", "0", "1"):
        words = ["sample", prior, "--num", "2", "--steps", "3", "--seed", seed]
        assert run([*words, "--backend", "numpyro"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert {len(line) for line in texts[0].splitlines() if line[0] != ">"} == {12}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "numpyro"], "and not refinement, which torch has"),
        (["--backend", "numpyro", "--method", "smc", "--device", "cuda"], "drop --device cuda"),
        (["--backend", "jax"], "choose one of torch, numpyro"),
        (["--backend", "numpyro", "--method", "corrector", "--power", "2"], "by torch alone"),
    ],
)
def test_what_cannot_be_is_said(prior, words, said, tmp_path, capsys):
    assert run(["design", prior, *QUICK, *words, "--out", str(tmp_path / "x")]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
