"""The commands, on a tiny untrained prior: what they write, and how they refuse."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from ppl_diffusion.cli import run
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.models.training import TrainingDiverged
from ppl_diffusion.smc import ParticlePosterior

LENGTH = 16
QUICK = ["--particles", "16", "--runs", "2", "--steps", "8", "--gc", "0.25", "0.75"]
MATRIX = ">M1 first\nA [ 9 0 0 0 ]\nC [ 0 9 0 0 ]\nG [ 0 0 9 0 ]\nT [ 0 0 0 9 ]\n"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = MaskedDiffusion.build(list("ACGT"), LENGTH, name="tiny", dim=16, depth=1, heads=2)
    program.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def design_run(prior, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    assert run(["design", prior, *QUICK, "--out", str(out), "--quiet"]) == 0
    return out


def read_designs(folder):
    return list(csv.DictReader((folder / "designs.csv").read_text().splitlines()))


def refusal(arguments, capsys):
    assert run([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ppl-diffusion: ")
    assert err.count("\n") == 1
    return err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ppl_diffusion.cli import run; assert run(['sample', '--help']) == 0;"
        "assert 'torch' not in sys.modules; sys.exit(run(['design', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--particles" in done.stdout


def test_the_console_script_exits_with_the_code():
    command = [sys.executable, "-m", "ppl_diffusion.cli", "design", "x", "--particles", "many"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ppl-diffusion: ")
    assert "Traceback" not in done.stderr


def test_bare_command_and_version(capsys):
    assert run([]) == 0
    assert "design" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ppl-diffusion 0")


def test_models_lists_every_shipped_name(capsys):
    from ppl_diffusion.models import list_oracles, names

    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*names(), *list_oracles()))


def test_sample_prints_fasta(prior, capsys):
    assert run(["sample", prior, "--num", "3", "--steps", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [">sample_1", ">sample_2", ">sample_3"]
    assert all(len(s) == LENGTH and set(s) <= set("ACGT") for s in lines[1::2])


def test_sample_repeats_with_its_seed(prior, tmp_path):
    def draw(name, seed):
        out = tmp_path / name
        command = ["sample", prior, "--num", "4", "--steps", "4", "--seed", seed, "--force"]
        assert run([*command, "--out", str(out)]) == 0
        return out.read_text()

    assert draw("a.fasta", "1") == draw("b.fasta", "1")
    assert draw("a.fasta", "1") != draw("c.fasta", "2")
    assert draw("d.csv", "1").splitlines()[0] == "sample,sequence"


def test_design_writes_the_promised_files(design_run):
    names = {str(p.relative_to(design_run)) for p in design_run.rglob("*") if p.is_file()}
    assert {"posterior.nc", "designs.csv", "designs.fasta", "summary.json"} <= names
    assert len([n for n in names if n.startswith("plots/") and n.endswith(".png")]) == 5


def test_the_summary_agrees_with_the_particles(design_run):
    summary = json.loads((design_run / "summary.json").read_text())
    posterior = ParticlePosterior.load(design_run / "particles")
    assert summary["log_evidence"] == posterior.log_evidence.tolist()
    assert summary["log_evidence_pooled"] == posterior.pooled_log_evidence
    assert summary["evaluations"] == posterior.num_evaluations > 0
    assert summary["potential_calls"] == posterior.num_potential_calls > 0
    assert summary["exact"] is True
    assert summary["target"] == posterior.target
    assert summary["seed"] == 0
    assert summary["seconds"] > 0
    assert summary["settings"]["search"]["num_particles"] == 16


def test_the_designs_are_ranked_weighted_and_allowed(design_run):
    rows = read_designs(design_run)
    weights = [float(row["weight"]) for row in rows]
    assert [int(row["rank"]) for row in rows] == list(range(1, len(rows) + 1))
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) == pytest.approx(1.0, abs=1e-4)
    shares = [sum(map(row["sequence"].count, "GC")) / LENGTH for row in rows]
    assert all(0.25 <= share <= 0.75 for share in shares)
    assert shares == pytest.approx([float(row["gc"]) for row in rows])
    fasta = (design_run / "designs.fasta").read_text().splitlines()
    assert fasta[1::2] == [row["sequence"] for row in rows]


def test_the_same_seed_gives_the_same_files(prior, design_run, tmp_path):
    out = tmp_path / "again"
    assert run(["design", prior, *QUICK, "--out", str(out), "--quiet"]) == 0
    for path in (p for p in design_run.rglob("*") if p.is_file()):
        twin = out / path.relative_to(design_run)
        if path.name != "summary.json":
            assert twin.read_bytes() == path.read_bytes(), path.name
    first, second = (json.loads((d / "summary.json").read_text()) for d in (design_run, out))
    for summary in (first, second):
        summary["seconds"] = 0
        for told in summary["settings"].get("rewards", {}).values():
            del told["seconds"], told["under_way"], told["utilisation"], told["overlap"]
    assert first == second


def test_design_honours_fixed_bases_motifs_and_forbidden_motifs(prior, tmp_path, capsys):
    matrix = tmp_path / "m.jaspar"
    matrix.write_text(MATRIX)
    asked = ["--motif", f"{matrix}:2", "--forbid", "GGCC", "--fix", "2:TTTT", "--fix", "9:A"]
    out = tmp_path / "run"
    assert run(["design", prior, *QUICK, *asked, "--out", str(out)]) == 0
    rows = read_designs(out)
    assert all(row["sequence"][2:6] == "TTTT" and row["sequence"][9] == "A" for row in rows)
    assert not any("GGCC" in row["sequence"] for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert "clamped at 5 of 16 positions" in summary["target"]
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_demo_runs_on_an_accelerator(tmp_path):
    """The evidences of the demo agree with the CPU's within 4 standard errors."""
    evidences = []
    for device, seed in (("cpu", "0"), ("cuda", "1")):
        out = tmp_path / device
        asked = ["--device", device, "--seed", seed, "--out", str(out), "--quiet"]
        assert run(["design", "yeast-promoter", *asked]) == 0
        evidences.append(
            torch.tensor(json.loads((out / "summary.json").read_text())["log_evidence"])
        )
    here, there = evidences
    error = (here.var() / len(here) + there.var() / len(there)).sqrt()
    assert float((here.mean() - there.mean()).abs()) < 4 * float(error)


def test_diagnose_reads_a_run(design_run, tmp_path, capsys):
    assert run(["diagnose", str(design_run), "--plots", str(tmp_path / "plots")]) == 0
    assert "evidence" in capsys.readouterr().out
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5


def test_a_run_that_finds_nothing_exits_with_one(prior, tmp_path, capsys):
    asked = [*(word for base in "ACGT" for word in ("--forbid", base)), "--particles", "4"]
    asked += ["--steps", "2"]
    assert run(["design", prior, *asked, "--out", str(tmp_path / "run"), "--quiet"]) == 1
    assert "weight zero" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


REFUSALS: list[tuple[list[str], str]] = [
    (["fold"], "No such command 'fold'"),
    (["design"], "Missing argument"),
    (["design", "PRIOR", "--partcles", "3"], "No such option"),
    (["design", "PRIOR", "--particles", "-4"], "must be at least 2, not -4"),
    (["design", "PRIOR", "--runs", "0"], "must be at least 1, not 0"),
    (["design", "PRIOR", "--steps", "1.5"], "valid integer"),
    (["design", "PRIOR", "--seed", "-1"], "must be at least 0"),
    (["design", "PRIOR", "--particles", "99999999999"], "must be at most"),
    (["sample", "PRIOR", "--num", "99999999999"], "must be at most"),
    (["sample", "PRIOR", "--out", "s.fa.gz"], "would not be packed"),
    (["design", "PRIOR", "--fix", "0:GGGGGGGG", "--gc", "0", "0.25"], "never within 0 to 0.25"),
    (["design", "PRIOR", "--fix", "0:TATA", "--forbid", "TATA"], "hold the forbidden TATA"),
    (["design", "PRIOR", "--ess-threshold", "nan"], "between 0 and 1"),
    (["design", "PRIOR", "--twist", "plier"], "no twist called 'plier'"),
    (["design", "PRIOR", "--resampler", "dice"], "no resampler called 'dice'"),
    (["design", "PRIOR", "--gc", "0.6", "0.4"], "is not a range of shares"),
    (["design", "PRIOR", "--gc", "nan", "0.4"], "is not a range of shares"),
    (["design", "PRIOR", "--gc", "0.51", "0.52"], "allows no sequence of length 16"),
    (["design", "PRIOR", "--forbid", "GGXCC"], "holds X"),
    (["design", "PRIOR", "--fix", "TATA"], "write POS:BASES"),
    (["design", "PRIOR", "--fix", "0:TANA"], "holds N"),
    (["design", "PRIOR", "--fix", "14:TATA"], "run past the end of 16 bases"),
    (["design", "PRIOR", "--fix", "0:TA", "--fix", "1:C"], "fixed to both A and C"),
    (["design", "PRIOR", "--motif", "nowhere.meme"], "There is no motif file"),
    (["design", "PRIOR", "--motif", "BROKEN"], "give a MEME file"),
    (["design", "PRIOR", "--motif", "MATRICES"], "holds 2 matrices: choose one with"),
    (["design", "PRIOR", "--motif", "MATRICES@M9"], "No motif is called 'M9'"),
    (["design", "PRIOR", "--motif", "MATRICES@M1:-1"], "at most 1e+06, not -1.0"),
    (["design", "PRIOR", "--motif", "MATRICES@M1:inf"], "at most 1e+06, not inf"),
    (["design", "PRIOR"], "has no brief of its own: give --reward, --motif"),
    (["design", "PRIOR", "--observe", "9"], "has no expression oracle"),
    (["design", "PRIOR", "--observe", "nan"], "finite number, not nan"),
    (["design", "PRIOR", "--observe", "9", "--temperature", "1"], "not both"),
    (["design", "PRIOR", "--temperature", "0"], "must be above 0, not 0.0"),
    (["design", "nonsuch", "--gc", "0", "1"], "There is no prior 'nonsuch'"),
    (["design", "PRIOR", "--gc", "0", "1", "--out", "FILE"], "is not a folder"),
    (["design", "PRIOR", "--gc", "0", "1", "--out", "FILE/run"], "not a writable folder"),
    (["design", "PRIOR", "--gc", "0", "1", "--out", "RUN"], "replace it with --force"),
    (["design", "PRIOR", "--gc", "0", "1", "--out", "HOME", "--force"], "no run"),
    (["sample", "nonsuch"], "There is no prior 'nonsuch'"),
    (["sample", "PRIOR", "--num", "0"], "must be at least 1, not 0"),
    (["sample", "PRIOR", "--steps", "-3"], "must be at least 1, not -3"),
    (["sample", "PRIOR", "--num", "1", "--steps", "1", "--out", "HOME"], "name of a file"),
    (["sample", "HOME"], "holds no prior"),
    (["sample", "PRIOR", "--device", "meta"], "The device 'meta' cannot be used here"),
    (["design", "PRIOR", "--gc", "0", "1", "--device", "abacus"], "The device 'abacus' cannot"),
    (["train", "yeast-promoter", "--device", "abacus"], "choose another --device"),
    (["train", "nonsuch"], "nonsuch"),
    (["train", "nonsuch", "--alphabet", "dna"], "'nonsuch' is no file and no recipe: give a file"),
    (["train", "HOME", "--alphabet", "dna"], "'HOME' is a folder and no recipe: give a file"),
    (["train", "yeast-promoter", "--data", "HOME"], "yeast_promoters_80bp.npz"),
    (["train", "yeast-promoter", "--data", "HOME", "--steps", "0"], "at least 1, not 0"),
    (["train", "yeast-promoter", "--data", "HOME", "--out", "FILE"], "is not a folder"),
    (["train", "yeast-promoter", "--resume", "--out", "HOME"], "nothing to resume"),
    (["diagnose", "nowhere"], "There is no run folder 'nowhere'"),
    (["diagnose", "HOME"], "holds no particle posterior"),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS]
)
def test_bad_input_gets_one_sentence(
    arguments, sentence, prior, design_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "HOME").mkdir()
    (tmp_path / "HOME" / "thesis.tex").write_text("years")
    (tmp_path / "BROKEN").write_text("not a matrix\n")
    (tmp_path / "MATRICES").write_text(MATRIX + MATRIX.replace("M1", "M2"))
    places = {"PRIOR": prior, "RUN": str(design_run)}
    arguments = [places.get(a, a) for a in arguments]
    assert sentence in refusal(arguments, capsys)
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("PPL_DIFFUSION_DEBUG", "1")
    with pytest.raises(ValueError, match="There is no prior"):
        run(["sample", "nonsuch"])


@pytest.mark.parametrize(
    ("raised", "code", "sentence"),
    [
        (TrainingDiverged("never finite"), 1, "never finite"),
        (KeyboardInterrupt("go on with --resume"), 130, "go on with --resume"),
        (KeyboardInterrupt(), 130, "nothing was written to"),
    ],
)
def test_training_that_ends_early_says_why(raised, code, sentence, tmp_path, monkeypatch, capsys):
    def stub(*_, **__):
        raise raised

    monkeypatch.setattr("ppl_diffusion.models.training.train", stub)
    assert run(["train", "yeast-promoter", "--out", str(tmp_path / "run")]) == code
    err = capsys.readouterr().err
    assert err.startswith("ppl-diffusion: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_ctrl_c_in_any_command_is_one_sentence(monkeypatch, capsys):
    def stub(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ppl_diffusion.commands.actions.draw_samples", stub)
    assert run(["sample", "tiny"]) == 130
    assert capsys.readouterr().err == "ppl-diffusion: Stopped: no run folder was written.\n"
