"""``train FILE``: from a file to a folder that other commands take by path."""

import gzip
import random

import pytest

from ppl_diffusion.cli import run

SMALL = ["--steps", "20", "--dim", "16", "--depth", "1", "--batch-size", "16"]


def fasta(folder, packed=False, strange=0, lengths=(3, 8)):
    source = random.Random(0)
    rows = ["".join(source.choices("acgt", k=source.randint(*lengths))) for _ in range(60)]
    text = "\r\n".join(f">{i}\r\n{row}" for i, row in enumerate([*rows, *["ANN"] * strange]))
    path = folder / ("own.fa.gz" if packed else "own.fa")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return str(path)


def refusal(words, capsys):
    assert run(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("ppl-diffusion: ")
    assert err.count("\n") == 1
    return err.removeprefix("ppl-diffusion: ").strip()


def test_a_file_becomes_a_folder_that_commands_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["train", fasta(tmp_path, packed=True, strange=2), "--alphabet", "dna", *SMALL]
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "left out, not of the alphabet: 2 rows. The first: own.fa.gz, line 121:" in said
    assert "60 rows: 48 train, 6 valid, 6 test; families by" in said
    assert "Markov chain of order 6" in said
    assert said.rstrip().endswith("wrote runs/train-own")
    assert run(["sample", "runs/train-own", "--num", "3"]) == 0
    drawn = capsys.readouterr().out.split("\n")
    assert drawn[0] == ">sample_1"
    assert set(drawn[1]) <= set("ACGT")
    assert 3 <= len(drawn[1]) <= 8


@pytest.mark.parametrize("lengths", [(6, 6), (3, 8)])
def test_a_design_takes_the_folder(lengths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["train", fasta(tmp_path, lengths=lengths), "--alphabet", "dna", "--quiet", *SMALL]
    assert run(asked) == 0
    words = ["design", "runs/train-own", "--gc", "0", "1", "--particles", "4", "--runs", "1"]
    assert run([*words, "--quiet"]) == 0
    assert (tmp_path / "runs" / "design-train-own" / "summary.json").is_file()


def test_quiet_says_nothing(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert (
        run(["train", fasta(tmp_path), "--alphabet", "dna", "--quiet", "--out", out, *SMALL]) == 0
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["own", "recipe"])
def test_no_run_is_overwritten_by_accident(name, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    source = [fasta(tmp_path), "--alphabet", "dna"] if name == "own" else ["masked-names"]
    said = refusal(["train", *source, "--out", str(out)], capsys)
    assert said == (
        f"The folder {str(out)!r} already holds a training run: go on with it by --resume, replace "
        "it by --force, or choose another --out."
    )


def test_force_and_resume(tmp_path, capsys):
    asked = ["train", fasta(tmp_path), "--alphabet", "dna", "--out", str(tmp_path / "run"), "-q"]
    assert run([*asked, *SMALL]) == 0
    assert run([*asked, "--resume"]) == 0
    assert run([*asked, *SMALL, "--seed", "1", "--force"]) == 0
    assert "seed; resume it with those" in refusal([*asked, "--resume"], capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FILE"], "What 'own.fa' is written in must be said: give --alphabet dna, rna, protein, "
         "smiles, selfies, safe, chars, or a file with one token per line."),
        (["FILE", "--alphabet", "dnaa"], "There is no alphabet 'dnaa': choose one of dna, rna, "
         "protein, smiles, selfies, safe, chars, or give a file with one token per line."),
        (["none.fa", "--alphabet", "dna"], "There is no file 'none.fa': check its name."),
        (["FILE", "--alphabet", "dna", "--column", "x"], "The file 'own.fa' has no columns: leave "
         "--column out."),
        (["FILE", "--alphabet", "dna", "--unknown", "mend"], "There is no policy for unknown "
         "letters called 'mend': choose one of drop, error."),
        (["FILE", "--alphabet", "dna", "--init", "x"], "The option --init is not for a file of "
         "your own sequences: leave it out."),
        (["FILE", "--alphabet", "dna", "--minutes", "1", "--steps", "1"], "Minutes and steps were "
         "both given; leave one of them out."),
        (["FILE", "--alphabet", "protein", "--unknown", "error"], "own.fa, line 3: The protein "
         "text 'ANNB' has 'B' at letter 4, which is none of A, C, D, E, F, G, H, I, K, L, M, N, P, "
         "Q, R, S, T, V, W, Y; mend it or leave it out."),
        (["yeast-promoter", "--alphabet", "dna"], "The option --alphabet is not for the recipe "
         "'yeast-promoter': leave it out."),
        (["yeast-promoter", "--split-column", "x"], "The option --split-column is not for the "
         "recipe 'yeast-promoter': leave it out."),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.fa").write_text(">a\nACG\n>b\nANNB\n")
    found = refusal(["train", *["own.fa" if word == "FILE" else word for word in words]], capsys)
    assert found == said  # The second record begins on line 3.
    assert not (tmp_path / "runs").exists()


def test_resume_begins_where_nothing_has_begun(tmp_path):
    """A job that may be requeued before its first second is over always says it."""
    (tmp_path / "empty").mkdir()
    asked = ["train", fasta(tmp_path), "--alphabet", "dna", *SMALL, "--quiet"]
    places = {"plain": [], "new": ["--resume"], "empty": ["--resume"]}
    for name, more in places.items():
        assert run([*asked, *more, "--out", str(tmp_path / name)]) == 0
    weights = [next((tmp_path / name).rglob("model.safetensors")).read_bytes() for name in places]
    assert weights[0] == weights[1] == weights[2]
