"""What a comparison of run folders says, and what it refuses."""

import json
import shutil

import pytest
import torch
import xarray as xr

from ppl_diffusion.cli import run
from ppl_diffusion.commands.tables import comparison_tables
from ppl_diffusion.diagnostics import Contender, compare
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import toy_markov_chain

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
def runs(prior, tmp_path_factory, _no_plots):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        asked = ["--gc", "0.2", "0.8", "--seed", str(seed), "--out", str(folder / f"run{seed}")]
        assert run(["design", prior, *QUICK, *asked]) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_plots():
    """Runs are compared here, not looked at; the plots of a run are seen to in test_cli.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppl_diffusion.designs.run.save_plots", lambda posterior, folder: None)
        yield


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
    asked = [
        "--particles",
        "2",
        "--runs",
        "8",
        "--steps",
        "3",
        "--method",
        "smc",
        "--twist",
        "none",
    ]
    asked += ["--motif", f"{motif}@M1:40", "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lowest, highest = summary["log_evidence_range"]
    assert highest - lowest > 2
    said = f"runs disagree: log evidence from {lowest:.1f} to {highest:.1f} nats"
    assert any(sentence.startswith(said) for sentence in summary["warnings"])
    assert summary["log_evidence_interval"] is None
    level = "Do not use this" if summary["log_evidence_sd"] > 3 else "Warning"
    out = capsys.readouterr().out
    assert f"{level}: {said}" in out
    together = summary["effective_root_ancestors_pooled"]
    (line,) = [text for text in out.splitlines() if "of all runs together" in text]
    assert f" {together:.4g} " in line
    assert run(["diagnose", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"{level}: {said}" in out
    assert "±" not in out


def test_roots_of_particles_without_weight_are_not_counted(prior, tmp_path, capsys):
    asked = [
        "--particles",
        "16",
        "--runs",
        "2",
        "--steps",
        "2",
        "--method",
        "smc",
        "--twist",
        "none",
        "--quiet",
    ]
    asked += ["--ess-threshold", "0", "--gc", "0.4", "0.6", "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 0
    roots = json.loads((tmp_path / "run" / "summary.json").read_text())["root_ancestors"]
    assert max(roots) < 16  # some particle misses the GC content
    assert run(["diagnose", str(tmp_path / "run")]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "num_eves" in text]
    assert ", ".join(map(str, roots)) in line


def damage(folder, name, **entries):
    path = folder / name
    known = json.loads(path.read_text())
    law = entries.get("law")
    if law and "exact" in law:
        entries["law"] = {**known["law"], **law}
    path.write_text(json.dumps({**known, **entries}))


@pytest.mark.parametrize(
    ("file", "entries", "sentence"),
    [
        ("particles/particles.json", {"num_evaluations": 0}, "evaluated no network row"),
        ("particles/particles.json", {"num_evaluations": None}, "num_evaluations is None"),
        ("particles/particles.json", {"num_potential_calls": "2"}, "num_potential_calls is '2'"),
        ("particles/particles.json", {"exact": True}, "has unknown 'exact'"),
        ("particles/particles.json", {"law": {"exact": "maybe"}}, "exact of its law is 'maybe'"),
        ("particles/particles.json", {"law": {"chain": []}}, "'law' in particles.json is no law"),
        ("particles/particles.json", {"law": None}, "'law' in particles.json is no law"),
        ("particles/particles.json", {"format": 2}, "written in another format"),
        ("particles/particles.json", {"seconds": "fast"}, "seconds is 'fast'"),
        ("particles/particles.json", {"settings": None}, "settings is no object"),
        ("summary.json", {"seconds": "fast"}, "could not convert string to float: 'fast'"),
        ("designs.csv", None, "designs.csv holds no designs"),
    ],
)
def test_damaged_folders_get_one_sentence(file, entries, sentence, runs, tmp_path, capsys):
    broken = shutil.copytree(runs / "run1", tmp_path / "broken")
    if entries is None:
        text = (broken / file).read_text()
        (broken / file).write_text(text.splitlines()[0] + "\n")
    else:
        damage(broken, file, **entries)
    assert run(["compare", str(runs / "run2"), str(broken)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert sentence in error
    assert error.count("\n") == 1
    assert "broken" in error


def test_a_deviation_without_an_observation_is_refused(prior, tmp_path, capsys):
    asked = ["--gc", "0", "1", "--sd", "0.3", "--out", str(tmp_path / "run")]
    assert run(["design", prior, *asked]) == 2
    error = capsys.readouterr().err
    assert "add --observe, or drop --sd" in error
    assert error.count("\n") == 1


def test_what_no_summary_says_is_unknown_not_different(runs, tmp_path):
    bare = shutil.copytree(runs / "run2" / "particles", tmp_path / "bare")
    first, second = compared([runs / "run1", bare], tmp_path)["notes"][:2]
    assert first.startswith("The targets A, B may differ in prior, question, unknown for some: ")
    assert second.startswith("The results may differ in prior, question, unknown for some: ")


def test_smc_leaves_its_name_and_seed_in_the_arviz_file(runs):
    with xr.open_datatree(runs / "run2" / "posterior.nc") as data:
        assert (data.attrs["method"], data.attrs["seed"]) == ("refinement", 2)


def test_refined_runs_say_that_their_effective_size_is_not_known(runs, capsys):
    summary = json.loads((runs / "run2" / "summary.json").read_text())
    assert (summary["ess_pooled"], set(summary["ess"])) == (None, {None})
    each = summary["effective_root_ancestors"]
    assert 1 <= summary["effective_root_ancestors_pooled"] <= sum(each) + 1e-6
    assert run(["diagnose", str(runs / "run2")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[1:4] == ["ess", "│", "n/a"] for line in lines)


@pytest.mark.parametrize(("columns", "tables"), [(80, 3), (400, 1)])
def test_many_runs_are_printed_whole_on_a_narrow_terminal(columns, tables, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    posteriors = [toy_posterior(seed) for seed in range(8)]
    comparison = compare([Contender(f"run-{i}", one) for i, one in enumerate(posteriors)])
    comparison_tables(comparison)
    out = capsys.readouterr().out
    assert out.count("│ runs kept ") == tables
    lines = out.splitlines()
    assert max(map(len, lines[: lines.index(next(s for s in lines if s[:2] == "A:"))])) <= columns
    for row in comparison.rows:
        assert any(row["label"] in line for line in lines)
        assert f" {row['log_evidence']:.4g} " in out
        interval, bound = row["log_evidence_interval"], row["log_evidence_bound"]
        ends = f">= {bound:.4g}" if interval is None else "[{:.4g}, {:.4g}]".format(*interval)
        assert ends in out
        low, high = row["log_evidence_range"]
        assert f"{low:.4g} to {high:.4g}" in out


def toy_posterior(seed):
    model = FeynmanKac(toy_markov_chain("uniform"), Potential(lambda x0: x0.sum(-1).double()))
    return run_smc(model, 8, 2, generator=torch.Generator().manual_seed(seed))
