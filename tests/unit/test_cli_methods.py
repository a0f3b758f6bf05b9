"""Design by every method, and runs side by side, on a tiny untrained prior."""

import csv
import json
import shutil

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.designs.program import build_target
from ppl_diffusion.designs.question import Job, Question
from ppl_diffusion.designs.run import design
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion
from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.smc.law import Law

LENGTH = 12
QUICK = ["--particles", "6", "--runs", "2", "--steps", "4", "--gc", "0.25", "0.75", "--quiet"]
METHODS = {
    "smc": {},
    "soft-value": {"num_children": 2, "alpha": 0.5},
    "unweighted": {"method": "soft-value", "num_children": 2, "alpha": 0.0, "weighted": False},
    "steering": {"kind": "max", "every": 2},
    "twisted": {},
    "refinement": {"inner": "smc", "num_chains": 2},
    "corrector": {"power": 2.0},
    "best-of-n": {"keep": 2},
}
LAWLESS = ("unweighted", "best-of-n")


def words(name):
    """Return the command-line form of a method's options."""
    options = {"method": name, **METHODS[name]}
    flags = ["--unweighted"] if options.pop("weighted", True) is False else []
    pairs = ((f"--{key.removeprefix('num_')}", str(value)) for key, value in options.items())
    return [*flags, *(word for pair in pairs for word in pair)]


def search(name, **numbers):
    options = dict(METHODS[name])
    return Search(method=options.pop("method", name), options=options, **numbers)


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in (MaskedDiffusion, UniformDiffusion):
            size = {"dim": 16, "depth": 1, "heads": 2}
            program = kind.build(list("ACGT"), LENGTH, name=kind.__name__, **size)
            program.save(folder / kind.__name__)
    return folder


@pytest.fixture(scope="module")
def prior(priors):
    return str(priors / "MaskedDiffusion")


@pytest.fixture(scope="module")
def runs(prior, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in METHODS:
        out = str(folder / name)
        assert run(["design", prior, *words(name), *QUICK, "--out", out]) == 0
    return folder


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def refusal(arguments, capsys):
    assert run([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ppl-diffusion: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_the_same_files(name, runs):
    def files(method):
        folder = runs / method
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    assert files(name) == files("smc")
    assert len([file for file in files(name) if file.endswith(".png")]) == 5


@pytest.mark.parametrize("name", METHODS)
def test_every_summary_says_what_was_done(name, runs):
    summary = read_summary(runs / name)
    posterior = ParticlePosterior.load(runs / name / "particles")
    asked = {"method": name, **METHODS[name]}
    assert summary["method"] == asked["method"]
    assert asked.items() <= summary["settings"]["search"].items()
    assert summary["exact"] is posterior.exact is (name not in LAWLESS)
    assert summary["target"] == posterior.target
    assert Law.from_json(summary["law"]) == posterior.law
    assert summary["evaluations"] == posterior.num_evaluations > 0
    rows = list(csv.DictReader((runs / name / "designs.csv").read_text().splitlines()))
    assert sum(float(row["weight"]) for row in rows) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_evidence_is_claimed_where_a_law_is_declared_and_nowhere_else(name, runs, capsys):
    summary = read_summary(runs / name)
    posterior = ParticlePosterior.load(runs / name / "particles")
    assert summary["warnings"] == posterior.warnings
    assert run(["diagnose", str(runs / name)]) == 0
    assert ("log_evidence_per_run" in capsys.readouterr().out) == (name not in LAWLESS)
    if name in LAWLESS:
        assert summary["log_evidence"] == [None, None]
        assert summary["log_evidence_pooled"] is summary["log_evidence_interval"] is None
        assert "no evidence" in summary["evidence_note"]
    else:
        assert summary["log_evidence"] == posterior.log_evidence.tolist()
        assert "evidence_note" not in summary
        found = posterior.evidence
        interval = None if found.interval is None else list(found.interval)
        assert summary["log_evidence_interval"] == interval
        lowest, highest = summary["log_evidence_range"]
        assert lowest == min(summary["log_evidence"])
        assert highest == max(summary["log_evidence"])


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_run(name, runs, prior):
    asked = search(name, num_particles=6, num_runs=2, num_steps=4)
    job = Job(prior, Question(gc=(0.25, 0.75)), asked)
    torch.manual_seed(len(name))  # of no consequence
    result = design(build_target(job))
    posterior = ParticlePosterior.load(runs / name / "particles")
    assert torch.equal(result.posterior.x0, posterior.x0)
    assert torch.equal(result.posterior.log_weights, posterior.log_weights)
    same = {**read_summary(runs / name), "seconds": 0}
    assert json.loads(json.dumps({**result.summary, "seconds": 0})) == same


def test_the_corrector_declares_the_power(runs):
    assert "p^2" in read_summary(runs / "corrector")["target"]


def test_a_method_without_evidence_says_none(prior, tmp_path, capsys):
    asked = ["--method", "best-of-n", *QUICK[:-1], "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("log evidence" in line and "none" in line for line in lines)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("smc", "unweighted", "best-of-n")]
)
def test_every_method_takes_a_uniform_prior(name, priors):
    asked = search(name, num_particles=4, num_runs=1, num_steps=3)
    job = Job(str(priors / "UniformDiffusion"), Question(gc=(0.0, 1.0)), asked)
    result = design(build_target(job))
    assert result.posterior.exact
    assert result.summary["log_evidence"][0] is not None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["MASKED", "--method", "mcmc"], "no method called 'mcmc'"),
        (["MASKED", "--children", "3"], "--children is no option of refinement of twisted"),
        (["MASKED", "--unweighted"], "--unweighted is no option of refinement of twisted"),
        (["MASKED", "--method", "best-of-n", "--ess-threshold", "0.5"], "no option of best-of-n"),
        (["UNIFORM", "--method", "twisted", "--fix", "0:TA"], "fixed bases on masked priors"),
        (["UNIFORM", "--method", "corrector", "--fix", "0:TA"], "fixed bases on masked priors"),
    ],
)
def test_bad_methods_get_one_sentence(arguments, sentence, priors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"MASKED": "MaskedDiffusion", "UNIFORM": "UniformDiffusion"}
    arguments = [str(priors / names[a]) if a in names else a for a in arguments]
    assert sentence in refusal(["design", *arguments, "--gc", "0", "1"], capsys)
    assert not (tmp_path / "runs").exists()


def test_runs_side_by_side(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    chosen = [str(runs / name) for name in ("smc", "twisted", "best-of-n", "soft-value")]
    plot, out = tmp_path / "figures" / "c.png", tmp_path / "c.json"
    assert run(["compare", *chosen, "--plot", str(plot), "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "At equal evaluations" in text
    assert "The targets A, B differ in target" in text
    assert "No law is declared for best-of-n" in text
    assert plot.stat().st_size > 0
    assert [p.name for p in plot.parent.iterdir()] == ["c.png"]
    content = json.loads(out.read_text())
    rows = {row["label"]: row for row in content["runs"]}
    assert rows["smc"]["target"] == rows["soft-value"]["target"] != rows["twisted"]["target"]
    assert content["targets"][rows["smc"]["target"]] == read_summary(runs / "smc")["target"]
    assert rows["best-of-n"]["log_evidence"] is None
    assert content["evaluations"] == min(row["evaluations"] for row in rows.values())


def test_the_figures_are_those_of_the_folder(runs, tmp_path):
    chosen = [str(runs / name) for name in ("smc", "corrector")]
    assert run(["compare", *chosen, "--json", str(tmp_path / "c.json")]) == 0
    for row in json.loads((tmp_path / "c.json").read_text())["runs"]:
        summary = read_summary(runs / row["label"])
        assert row["log_evidence"] == pytest.approx(summary["log_evidence_pooled"])
        assert row["log_evidence_interval"] == summary["log_evidence_interval"]
        assert row["root_ancestors"] == min(summary["effective_root_ancestors"])
        assert row["ess"] == pytest.approx(summary["ess_pooled"])
        assert row["log_evidence_range"] == summary["log_evidence_range"]
        assert row["unique"] == summary["unique"]
        assert row["seconds"] == summary["seconds"]
        for name in ("log_prob_bound", "gc"):
            expected = summary["comparison"][name]["designs_mean"]
            assert row["scores"][name]["mean"] == pytest.approx(expected, rel=1e-4)


def test_particles_alone_can_be_compared(runs, tmp_path, capsys):
    chosen = [runs / "smc" / "particles", runs / "twisted" / "particles"]
    assert run(["compare", *map(str, chosen), "--json", str(tmp_path / "c.json")]) == 0
    assert "Note: " in capsys.readouterr().out
    rows = json.loads((tmp_path / "c.json").read_text())["runs"]
    assert [row["label"] for row in rows] == list(map(str, chosen))  # both are called particles
    assert [row["seconds"] for row in rows] == [None, None]


def test_other_priors_are_told_apart(runs, priors, tmp_path, capsys):
    uniform = str(priors / "UniformDiffusion")
    smc = ["--method", "smc"]
    assert run(["design", uniform, *smc, *QUICK, "--out", str(tmp_path / "uniform")]) == 0
    assert run(["compare", str(runs / "smc"), str(tmp_path / "uniform")]) == 0
    assert "The targets A, B differ in prior: compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Missing argument"),
        (["SMC"], "give two or more run folders"),
        (["SMC", "SMC"], "is given twice"),
        (["SMC", "COPY"], "hold the same particles"),
        (["SMC", "nowhere"], "There is no run folder 'nowhere'"),
        (["SMC", "EMPTY"], "holds no particle posterior"),
        (["SMC", "BROKEN"], "is damaged"),
        (["SMC", "OTHER", "--plot", "c.txt"], "end its name in .png or .pdf or .svg"),
        (["SMC", "OTHER", "--json", "EMPTY"], "is a folder"),
    ],
)
def test_bad_comparisons_get_one_sentence(arguments, sentence, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    shutil.copytree(runs / "smc", tmp_path / "COPY")
    shutil.copytree(runs / "twisted", tmp_path / "BROKEN")
    (tmp_path / "BROKEN" / "summary.json").write_text("[]")
    places = {"SMC": runs / "smc", "OTHER": runs / "twisted"}
    assert sentence in refusal(["compare", *(places.get(a, a) for a in arguments)], capsys)
    assert not list(tmp_path.glob("c.*"))
