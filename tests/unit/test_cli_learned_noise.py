"""The commands with priors whose noise was learned: one number of steps, one sampler."""

import json

import pytest

from ppl_diffusion.cli import run
from ppl_diffusion.models.forward_learned import ForwardLearned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    prior = ForwardLearned.build("abc", 6, name="small", dim=16, depth=1, heads=2, num_steps=3)
    path = tmp_path_factory.mktemp("priors") / "small"
    prior.save(path)
    return str(path)


def test_sequences_are_drawn_in_the_steps_that_there_are(folder, capsys):
    assert run(["sample", folder, "--num", "4", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert run(["sample", folder, "--num", "4", "--seed", "3", "--steps", "3"]) == 0
    assert capsys.readouterr().out == first
    lines = first.splitlines()
    assert len(lines) == 8
    assert all(len(text) == 6 and set(text) <= set("abc") for text in lines[1::2])


@pytest.mark.parametrize("method", ["smc", "steering", "soft-value"])
def test_designs_with_its_own_steps_and_bound(folder, method, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--forbid", "aa", "--particles", "16", "--runs", "2", "--out", str(out)]
    assert run(["design", folder, "--method", method, *words]) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["search"]["num_steps"] == 3
    texts = [line for line in (out / "designs.fasta").read_text().splitlines() if line[0] != ">"]
    assert texts
    assert not any("aa" in text for text in texts)


@pytest.mark.parametrize("method", ["smc", "steering"])
def test_fixed_tokens_are_a_likelihood(folder, method, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--fix", "2:b", "--particles", "64", "--runs", "1", "--out", str(out)]
    assert run(["design", folder, "--method", method, *words]) == 0, capsys.readouterr().err
    texts = [line for line in (out / "designs.fasta").read_text().splitlines() if line[0] != ">"]
    assert texts
    assert all(text[2] == "b" for text in texts)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("sample --steps 9", "learned noise has 3 steps, not 9"),
        ("sample --sampler psi", "there is one sampler, 'ancestral', and no filter"),
        ("sample --filter nucleus:0.9", "there is one sampler, 'ancestral', and no filter"),
        ("design --forbid aa --steps 9", "learned noise has 3 steps, not 9"),
        ("design --forbid aa --method twisted", "--method twisted: twist: it tilts what"),
        ("design --forbid aa", "takes --method smc, steering or soft-value"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, command, sentence, tmp_path, capsys):
    name, *rest = command.split()
    place = ["--out", str(tmp_path / "run")] if name == "design" else []
    assert run([name, folder, *rest, *place]) == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint
    assert "Traceback" not in complaint
    assert complaint.count("\n") == 1


def test_given_noise_is_not_trained_by_fldd(capsys, tmp_path):
    words = ["masked-names", "--objective", "fldd", "--data", str(tmp_path), "--out"]
    assert run(["train", *words, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
