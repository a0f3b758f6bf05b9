"""What the commands say about a finished run: living, dead or damaged."""

import json

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.posterior_files import META_FILE
from ppl_diffusion.testing import toy_markov_chain

NEVER = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf))
LENGTH = 70


@pytest.fixture
def dead_run(tmp_path):
    model = FeynmanKac(toy_markov_chain("uniform"), NEVER)
    posterior = run_smc(model, 8, 2, generator=torch.Generator().manual_seed(0))
    return posterior.save(tmp_path / "dead")


@pytest.mark.filterwarnings("error")
def test_a_dead_run_is_described_without_its_plots(dead_run, tmp_path, capsys):
    assert run(["diagnose", str(dead_run)]) == 0
    assert "num_dead_runs" in capsys.readouterr().out
    assert run(["diagnose", str(dead_run), "--plots", str(tmp_path / "plots")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ppl-diffusion: No plots were drawn into ")
    assert "weight zero since step 3" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_a_damaged_run_is_refused(dead_run, capsys):
    (dead_run / META_FILE).write_text(json.dumps([]))
    assert run(["diagnose", str(dead_run)]) == 2
    error = capsys.readouterr().err
    assert "damaged particle posterior" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("columns", [80, 160])
def test_designs_are_printed_whole(columns, tmp_path, monkeypatch, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = MaskedDiffusion.build(list("ACGT"), LENGTH, name="tiny", dim=8, depth=1, heads=1)
    prior.save(tmp_path / "prior")
    monkeypatch.setenv("COLUMNS", str(columns))
    asked = ["--particles", "4", "--runs", "1", "--steps", "2", "--gc", "0", "1"]
    out = tmp_path / "run"
    assert run(["design", str(tmp_path / "prior"), *asked, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    sequences = (out / "designs.fasta").read_text().splitlines()[1::2]
    assert [line.split()[-1] for line in lines if line.endswith(tuple(sequences))] == sequences
    assert any("weight" in line and "log G" in line for line in lines)


@pytest.mark.parametrize(("particles", "known"), [(2, False), (64, True)])
def test_no_error_is_printed_where_the_runs_disagree(
    particles, known, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "160")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = MaskedDiffusion.build(list("ACGT"), 16, name="tiny", dim=8, depth=1, heads=1)
    prior.save(tmp_path / "prior")
    size = ["--particles", str(particles), "--runs", "4" if known else "2", "--steps", "4"]
    asked = [*size, "--gc", "0", "0.5", "--method", "importance-sampling"]
    out = tmp_path / "run"
    assert run(["design", str(tmp_path / "prior"), *asked, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["log_evidence_interval"] is not None) == known
    told = capsys.readouterr().out
    assert ("designs: mean ± s.e." in told) == known
    mean = summary["comparison"]["gc"]["designs_mean"]
    assert (f"{mean:.4g} ±" in told) == known


def test_the_help_of_motifs_names_what_is_read(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["design", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("MEME", "JASPAR", "TRANSFAC", "XMS"))
