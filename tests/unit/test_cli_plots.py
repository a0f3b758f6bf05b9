"""A plot never decides whether a run is kept."""

import os
import subprocess
import sys

import pytest
import torch

from ppl_diffusion import diagnostics
from ppl_diffusion.cli import run
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc
from ppl_diffusion.testing import toy_markov_chain

PLOTS = {"ess", "evidence", "weights", "ancestry", "token_entropy"}
FILES = {
    "brief.toml",
    "designs.csv",
    "designs.fasta",
    "particles",
    "plots",
    "posterior.nc",
    "summary.json",
}


def too_many_bins(*_, **__):
    raise ValueError("Too many bins for data range.\nCannot create 30 finite-sized bins.")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = MaskedDiffusion.build(list("ACGT"), 16, name="tiny", dim=8, depth=1, heads=1)
    program.save(folder)
    return str(folder)


@pytest.fixture
def design(prior, tmp_path, capsys):
    def _design(*more):
        out = tmp_path / "run"
        asked = ["--particles", "8", "--runs", "2", "--steps", "4", "--gc", "0", "1", *more]
        assert run(["design", prior, *asked, "--out", str(out)]) == 0
        assert {path.name for path in out.iterdir()} | {"posterior.nc"} == FILES
        assert ParticlePosterior.load(out / "particles").num_particles == 8
        told = capsys.readouterr().err.splitlines()
        return out, [line for line in told if line.startswith("ppl-diffusion: ")]

    return _design


def test_a_plot_that_fails_is_one_sentence_and_the_run_is_whole(design, monkeypatch):
    monkeypatch.setattr(diagnostics.plots, "plot_weights", too_many_bins)
    out, told = design("--quiet")
    assert told == [
        "ppl-diffusion: The plot weights could not be drawn (ValueError: Too many bins for data "
        "range. Cannot create 30 finite-sized bins.). Every other file of the run was written."
    ]
    names = {path.stem for path in (out / "plots").iterdir()}
    assert names == {"ess", "evidence", "ancestry", "token_entropy"}


def test_a_design_needs_no_matplotlib(design, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out, (told,) = design()
    assert "The plots ess, evidence, weights, ancestry, token_entropy could not be drawn" in told
    assert not list((out / "plots").iterdir())


def test_a_picture_that_fails_halfway_leaves_no_file(design, monkeypatch):
    def stub(posterior, *, ax):
        ax.figure.savefig = lambda place, **_: (place.write_text("half"), too_many_bins())

    for name in ("ess", "evidence", "weights", "ancestry"):
        monkeypatch.setattr(diagnostics.plots, f"plot_{name}", stub)
    out, (told,) = design()
    assert "The plots ess, evidence, weights, ancestry could not be drawn" in told
    assert [path.name for path in (out / "plots").iterdir()] == ["token_entropy.png"]


def test_diagnose_draws_what_it_can(tmp_path, monkeypatch, capsys):
    model = FeynmanKac(toy_markov_chain("uniform"), Potential(lambda x0: x0.sum(-1) / 4))
    folder = run_smc(model, 8, 2).save(tmp_path / "run")
    asked = ["diagnose", str(folder), "--plots", str(tmp_path / "plots")]
    monkeypatch.setattr(diagnostics.plots, "plot_weights", too_many_bins)
    assert run(asked) == 0
    assert "The plot weights could not be drawn" in capsys.readouterr().err
    assert len(list((tmp_path / "plots").iterdir())) == 4
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run([*asked[:-1], str(tmp_path / "none")]) == 1
    assert "could not be drawn" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert run([*asked[:-1], str(tmp_path / "file")]) == 2


@pytest.fixture
def two_runs(tmp_path):
    model = FeynmanKac(toy_markov_chain("uniform"), Potential(lambda x0: x0.sum(-1) / 4))
    each = [run_smc(model, 8, 2, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    return [str(posterior.save(tmp_path / f"run{k}")) for k, posterior in enumerate(each)]


def test_a_design_needs_no_arviz(design, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    out, (told,) = design()
    assert "The ArviZ file posterior.nc could not be written (ModuleNotFoundError" in told
    assert told.endswith("Every other file of the run was written.")
    assert not (out / "posterior.nc").exists()
    assert {path.stem for path in (out / "plots").iterdir()} == PLOTS


def test_a_wrong_backend_of_matplotlib_changes_nothing(prior, two_runs, tmp_path):
    """In a process of its own: Matplotlib reads the setting when it is imported."""
    small = ["--particles", "8", "--runs", "2", "--steps", "4", "--gc", "0", "1"]
    calls = [
        ["design", prior, *small, "--out", str(tmp_path / "new")],
        ["diagnose", two_runs[0], "--plots", str(tmp_path / "plots")],
        ["compare", *two_runs, "--plot", str(tmp_path / "compared.png")],
    ]
    program = f"from ppl_diffusion.cli import run\nassert not any(map(run, {calls!r}))"
    setting = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=setting, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ppl-diffusion: " not in done.stderr
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == PLOTS
    assert (tmp_path / "compared.png").stat().st_size


def test_the_setting_of_the_caller_is_put_back(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    assert run(["--version"]) == 0
    assert os.environ["MPLBACKEND"] == "nonsense"


def test_a_comparison_that_cannot_be_drawn_is_one_sentence(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "plot_comparison", too_many_bins)
    place, figures = tmp_path / "a.png", tmp_path / "a.json"
    assert run(["compare", *two_runs, "--plot", str(place), "--json", str(figures)]) == 1
    told = capsys.readouterr()
    assert "Runs as they are" in told.out
    assert told.err.count("\n") == 1
    assert "a.png' could not be drawn (ValueError: Too many bins" in told.err
    assert figures.is_file()
    assert not place.exists()
