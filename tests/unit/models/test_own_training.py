"""A prior of one's own, from a file to a folder that can be used."""

import json
import random

import pytest
import torch

import ppl_diffusion as ppd
from ppl_diffusion.models import load, own_training, training
from ppl_diffusion.models.own_training import train_own
from ppl_diffusion.models.sequence_files import Columns
from ppl_diffusion.tokenisers import find_alphabet

SMALL = {"dim": 16, "depth": 1, "batch_size": 16, "steps": 40}


def words(count=120, seed=0):
    source = random.Random(seed)
    parts = ["AC", "GT", "T"]
    return ["".join(source.choices(parts, k=source.randint(2, 5))) for _ in range(count)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.fa"
    path.write_text(
        "".join(f">{i}\n{text.lower()}\n" for i, text in enumerate(words())) + ">n\nAN\n"
    )
    return path


def weights_of(program):
    return program.denoiser.state_dict()


def same_weights(one, other):
    pairs = zip(weights_of(one).items(), weights_of(other).items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_file_becomes_a_prior_with_a_card(file, tmp_path):
    out = tmp_path / "run"
    run = train_own(file, "dna", out=out, **SMALL)
    prior = load(out)
    assert same_weights(prior, run.program)
    assert prior.name == "own"
    assert prior.tokeniser == find_alphabet("dna")
    assert not prior.denoiser.training
    card = json.loads((out / "card.json").read_text())
    assert card == json.loads(json.dumps(run.card))
    assert card["data"]["rows"] == 120
    assert card["data"]["dropped"] == {"not of the alphabet": 1}
    assert sum(card["data"]["sizes"].values()) == 120
    assert len(card["metrics"]["markov"]) == 7
    assert len(card["samples"]["shown"]) == 10
    assert all(set(text) <= set("ACGT") for text in card["samples"]["shown"])
    page = (out / "card.md").read_text()
    assert f"≤ {card['metrics']['bound']:.3f} ± {card['metrics']['bound_error']:.3f}" in page
    assert "Left out, not of the alphabet: 1 rows. The first: own.fa, line 241:" in page


def test_the_bound_pays_for_the_length(file, tmp_path):
    """An untrained network is uniform over letters, so that its bound is known."""
    run = train_own(
        file, "dna", out=tmp_path / "run", **{**SMALL, "steps": 1, "learning_rate": 1e-9}
    )
    prior, texts = run.program, words()
    x0 = prior.encode(texts)
    bits = prior.bound_terms(x0, num_times=64).mean(0) / torch.log(torch.tensor(2.0))
    law = prior.process.lengths
    known = [2.0 * len(text) - float(torch.tensor(law[len(text)]).log2()) for text in texts]
    # The spread over masks of 120 rows: 8 standard errors, so that a false alarm is out of reach.
    assert float(bits.mean()) == pytest.approx(sum(known) / len(known), abs=0.5)


def test_training_learns_more_than_single_letters(tmp_path):
    texts = ["ACGT" * n for n in (1, 2, 3)] * 40
    parts = ["train", "train", "train", "valid", "test"] * 24
    run = train_own(
        texts, "dna", out=tmp_path / "run", parts=parts, **{**SMALL, "steps": 150, "dim": 32}
    )
    metrics = run.card["metrics"]
    assert metrics["bound"] < metrics["markov"][0]
    assert run.card["data"]["test_rows_in_train"] == 1.0


def test_the_steps_of_a_run_lead_to_the_same_bytes(tmp_path):
    timed = train_own(words(), "dna", out=tmp_path / "a", minutes=0.01, dim=16, depth=1)
    steps = timed.card["run"]["steps"]
    assert f"--steps {steps} " in timed.card["run"]["command"]
    again = train_own(words(), "dna", out=tmp_path / "b", steps=steps, dim=16, depth=1)
    files = ("prior/model.safetensors", "prior/config.json", "prior/program.json")
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert timed.card["metrics"] == again.card["metrics"]
    assert timed.card["samples"] == again.card["samples"]


def stopped_half_way(monkeypatch, out, **options):
    """Train until the tenth of twenty validations, as a killed process would."""
    original = training._trainer

    def stopped(*arguments):
        trainer = original(*arguments)
        trainer.fit_loop.max_epochs = 10
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(training, "_trainer", stopped)
        return train_own(words(), "dna", out=out, **SMALL, **options)


def test_a_resumed_run_equals_the_unbroken_one(tmp_path, monkeypatch):
    whole = train_own(words(), "dna", out=tmp_path / "whole", **SMALL)
    half = stopped_half_way(monkeypatch, tmp_path / "half")
    assert half.card["run"]["steps"] == 20
    # What the rule decided is read, not decided again.
    resumed = train_own(words(), "dna", out=tmp_path / "half", resume=True)
    assert resumed.card["run"]["steps"] == 40
    assert same_weights(whole.program, resumed.program)
    assert whole.card["metrics"] == resumed.card["metrics"]


def test_a_run_killed_before_its_first_step_begins_anew(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def die(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(own_training, "train_recipe", die)
        with pytest.raises(RuntimeError, match="killed"):
            train_own(words(), "dna", out=out, **SMALL)
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    resumed = train_own(words(), "dna", out=out, resume=True)
    whole = train_own(words(), "dna", out=tmp_path / "whole", **SMALL)
    assert same_weights(whole.program, resumed.program)


def test_what_is_resumed_must_be_the_same_run(tmp_path, monkeypatch):
    out = tmp_path / "half"
    stopped_half_way(monkeypatch, out)
    for change, text in (
        ({"steps": 41}, "began with steps 40, not 41; leave it out to resume"),
        ({"dropout": 0.5}, "began with dropout None, not 0.5; leave it out to resume"),
        ({"seed": 1}, "began with other seed; resume it with those"),
    ):
        with pytest.raises(ValueError, match=text):
            train_own(words(), "dna", out=out, resume=True, **change)
    with pytest.raises(ValueError, match="began with other sequences; resume it with those"):
        train_own(words(121), "dna", out=out, resume=True)
    (out / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json' is damaged; train without --resume"):
        train_own(words(), "dna", out=out, resume=True)
    with pytest.raises(FileNotFoundError, match=r"nothing to resume in .* plan.json is missing"):
        train_own(words(), "dna", out=tmp_path / "none", resume=True)


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    out = tmp_path / "run"
    first = train_own(words(), "dna", out=out, **SMALL)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError) as error:
        train_own(words(), "dna", out=out, **SMALL)
    assert str(error.value) == (
        f"The folder {str(out)!r} already holds a training run: go on with it by --resume, replace "
        "it by --force, or choose another --out."
    )
    # What cannot be used throws nothing away.
    for wrong in ({"dim": 15}, {"unknown": "error"}):
        texts = [*words(), "NNN"]
        with pytest.raises(ValueError, match=r"even|line 121"):
            train_own(texts, "dna", out=out, force=True, **{**SMALL, **wrong})
    assert same_weights(load(out), first.program)
    second = train_own(words(), "dna", out=out, seed=1, force=True, **SMALL)
    assert same_weights(load(out), second.program)
    assert not same_weights(first.program, second.program)
    assert (out / "notes.txt").read_text() == "mine"


def test_classes_guide(tmp_path):
    texts = ["AC" * n for n in range(1, 5)] * 20 + ["GT" * n for n in range(1, 5)] * 20
    labels = ["low"] * 80 + ["high"] * 80
    parts = ["train", "train", "train", "valid", "test"] * 32
    size = {**SMALL, "steps": 300, "dim": 32, "learning_rate": 0.01}
    run = train_own(texts, "dna", out=tmp_path / "run", labels=labels, parts=parts, **size)
    assert run.card["data"]["classes"] == ["high", "low"]
    metrics = run.card["metrics"]
    # The label tells which letters: a bit at least, had the network learnt nothing else.
    assert metrics["given_label"] < metrics["bound"] - 0.5
    low = torch.tensor(1).expand(200)
    chain = run.program.labelled(low).chain(8)
    drawn = run.program.decode(chain.x0(chain.sample(generator=torch.Generator().manual_seed(0))))
    assert sum(set(text) <= set("AC") for text in drawn) > 150


def test_weights_decide_what_is_learnt(tmp_path):
    texts = ["A" * 6] * 50 + ["C" * 6] * 50
    parts = (["train"] * 40 + ["valid"] * 5 + ["test"] * 5) * 2
    weights = [0.0] * 50 + [1.0] * 50
    size = {**SMALL, "steps": 200, "learning_rate": 0.02}
    run = train_own(texts, "dna", out=tmp_path / "run", weights=weights, parts=parts, **size)
    assert all(set(text) == {"C"} for text in run.card["samples"]["shown"])


def test_the_short_way_from_python(tmp_path):
    program = ppd.models.train(words(), alphabet="dna", **SMALL)
    assert set(program.decode(program.encode(["ACGT"]))[0]) <= set("ACGT")
    kept = ppd.models.train(words(), "dna", out=tmp_path / "run", **SMALL)
    assert same_weights(program, kept)


def test_molecules_come_out_as_smiles(tmp_path):
    pytest.importorskip("selfies")
    chem = pytest.importorskip("rdkit.Chem")
    path = tmp_path / "own.smi"
    source = random.Random(0)
    chains = ["".join(source.choices("CCON", k=source.randint(2, 8))) for _ in range(60)]
    path.write_text("".join(f"{text} m{i}\n" for i, text in enumerate(chains)))
    run = train_own(path, "selfies", out=tmp_path / "run", **SMALL)
    assert run.card["samples"]["valid"] == 1.0
    assert all(chem.MolFromSmiles(text) for text in run.card["samples"]["shown"] if text)


def test_columns_of_what_is_no_file_are_lists():
    with pytest.raises(
        ValueError, match=r"^There are 120 sequences, but 3 labels; give one for ea"
    ):
        ppd.models.train(words(), "dna", labels=["a", "b", "c"], **SMALL)


def test_columns_of_a_file_are_named(file):
    with pytest.raises(
        ValueError, match=r"^The weights of a file are a column of it: name it in c"
    ):
        ppd.models.train(file, "dna", weights=[1.0], **SMALL)


def test_a_table_says_parts_and_classes(tmp_path):
    path = tmp_path / "own.csv"
    lines = [
        f"{text},{'xy'[i % 2]},{'train' if i % 5 else 'test'}" for i, text in enumerate(words())
    ]
    path.write_text("seq,kind,part\n" + "\n".join(lines) + "\n")
    columns = Columns("seq", "kind", part="part")
    run = train_own(path, "dna", out=tmp_path / "run", columns=columns, **SMALL)
    assert run.card["data"]["sizes"]["test"] == 24
    assert run.card["data"]["classes"] == ["x", "y"]
    command = run.card["run"]["command"]
    assert "--column seq --label-column kind --split-column part" in command
