"""Training on a toy: it learns, it resumes where it stopped, it says what is missing."""

import csv
import dataclasses
import gzip
import json
import math
import re
import signal
import sys

import numpy as np
import pytest
import torch
from training_toy import LENGTH
from training_toy import RECIPE as TOY
from training_toy import letters as make_toy

from ppl_diffusion.models import MaskedDiffusion, load
from ppl_diffusion.models.datasets import (
    load_sequences,
    reverse_complement,
)
from ppl_diffusion.models.evaluate import _error, _noise, evaluate, print_evaluation, write_card
from ppl_diffusion.models.markov_baseline import MarkovBaseline
from ppl_diffusion.models.recipes import RECIPES, find_recipe
from ppl_diffusion.models.training import TrainingDiverged, train


@pytest.fixture
def toy():
    return make_toy()


def run(toy, out, **options):
    return train("toy", out=out, recipe=TOY, sequences=toy, quiet=True, **options)


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_twenty_steps_lower_the_bound(toy, tmp_path, family):
    shape = {**TOY.shape, "time_conditioning": family == "uniform"}
    recipe = dataclasses.replace(TOY, family=family, shape=shape)
    result = train("toy", out=tmp_path, recipe=recipe, sequences=toy, quiet=True)
    assert result.steps == 20
    assert result.program.family == family
    # Two bits is the uniform guess at which the network starts; the truth is 2 bits / 8 tokens.
    assert result.valid_bits < 1.6
    assert json.loads((tmp_path / "run.json").read_text())["best_step"] == result.best_step


def test_a_resumed_run_equals_the_unbroken_one(toy, tmp_path):
    whole = run(toy, tmp_path / "whole", steps=20)
    recipe = dataclasses.replace(TOY, steps=20)
    # Stopped after 10 of 20 steps, as a killed process would be: same schedule, fewer epochs.
    from ppl_diffusion.models import training

    original = training._trainer

    def stopped(*args):
        trainer = original(*args)
        trainer.fit_loop.max_epochs = 2
        return trainer

    training._trainer = stopped
    try:
        half = train("toy", out=tmp_path / "half", recipe=recipe, sequences=toy, quiet=True)
    finally:
        training._trainer = original
    assert half.steps == 10
    resumed = run(toy, tmp_path / "half", steps=20, resume=True)
    assert resumed.steps == whole.steps == 20
    assert (resumed.valid_bits, resumed.best_step) == (whole.valid_bits, whole.best_step)
    for name, value in whole.program.denoiser.state_dict().items():
        assert torch.equal(value, resumed.program.denoiser.state_dict()[name])


def test_training_leaves_torch_s_generator_alone(toy, tmp_path):
    before = torch.get_rng_state()
    run(toy, tmp_path, steps=5)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_matter(toy, tmp_path):
    one, same, other = (
        run(toy, tmp_path / str(i), steps=5, seed=s) for i, s in enumerate((1, 1, 2))
    )
    assert one.valid_bits == same.valid_bits
    assert one.valid_bits != other.valid_bits


def test_wrong_requests_are_refused(toy, tmp_path):
    with pytest.raises(ValueError, match=r"no training recipe 'x': choose one of yeast-promoter"):
        train("x", out=tmp_path)
    with pytest.raises(ValueError, match="0 steps is not a run"):
        run(toy, tmp_path, steps=0)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt is missing; train without --resume"):
        run(toy, tmp_path, resume=True)


def test_lightning_is_asked_for_when_missing(toy, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ppl_diffusion.models.fitting", raising=False)
    monkeypatch.delattr("ppl_diffusion.models.fitting", raising=False)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppl-diffusion\[train\]'"):
        run(toy, tmp_path)


def test_recipes_build_their_programs():
    from ppl_diffusion.models.program import FAMILIES

    for name in RECIPES:
        recipe = find_recipe(name)
        program = FAMILIES[recipe.family].build("ACGT", 10, **recipe.shape)
        assert program.denoiser.time_free == (recipe.family in ("masked", "latent"))


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="pass --data, or set PPL_DIFFUSION_DATA"):
        load_sequences("yeast")
    with pytest.raises(FileNotFoundError, match=r"does not hold dna/human_core.*check --data"):
        load_sequences("human", tmp_path)


def test_yeast_rows_are_read(tmp_path):
    (tmp_path / "dna").mkdir()
    split = np.array([0, 0, 0, 1, 2, 2], np.uint8)
    np.savez(
        tmp_path / "dna" / "yeast_promoters_80bp.npz",
        x=np.random.default_rng(0).integers(0, 4, (6, 80)).astype(np.uint8),
        kind=np.array([1, 1, 0, 1, 1, 0], np.uint8),
        family=np.array([7, 7, 8, 9, 10, 10], np.int32),
        split=split,
    )
    data = load_sequences("yeast", tmp_path)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [2, 1, 1]
    # Two families, each counting once, then the Markov draws with as much mass in all.
    assert data.related_weights[:3].tolist() == [0.25, 0.25, 0.5]
    assert float(data.related_weights[3:].sum()) == pytest.approx(1.0)
    assert data.test_family.tolist() == [10]


def test_human_rows_are_read(tmp_path, monkeypatch):
    (tmp_path / "dna").mkdir()
    path = tmp_path / "dna" / "human_core_promoters_70bp.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label", "orig_split", "split"])
        writer.writerows(
            [["ACGT", 1, "", s] for s in ("train", "valid", "test")] + [["TTTT", 0, "", "train"]]
        )
    monkeypatch.setenv("PPL_DIFFUSION_DATA", str(tmp_path))
    data = load_sequences("human")
    assert data.train.tolist() == [[0, 1, 2, 3]]
    assert data.related.tolist() == [[0, 1, 2, 3], [3, 3, 3, 3]]


def write_text(folder, **parts):
    (folder / "text").mkdir()
    for part, text in parts.items():
        path = folder / "text" / f"tinyshakespeare.{part}.txt.gz"
        path.write_bytes(gzip.compress(text.encode()))


def test_text_is_cut_into_windows(tmp_path):
    train, held_out = "ab\nc" * 50, "ca" * 70 + "\n" * 128
    write_text(tmp_path, train=train, valid=held_out, test=held_out)
    data = load_sequences("tinyshakespeare", tmp_path)
    assert data.vocabulary == "\nabc"
    # 200 characters hold the windows that begin at 0, 16, 32, 48 and 64; 268 hold two apart.
    assert (data.train.shape, data.valid.shape) == ((5, 128), (2, 128))
    text = ["".join(data.vocabulary[i] for i in row) for row in data.train.tolist()]
    assert text == [train[start : start + 128] for start in range(0, 80, 16)]
    program = train_program(data, tmp_path)
    assert program.decode(data.test) == [held_out[:128], held_out[128:256]]
    assert torch.equal(program.encode(program.decode(data.test)), data.test)


def train_program(sequences, folder):
    recipe = dataclasses.replace(TOY, family="uniform", shares=(1.0, 1.0), valid_rows=1)
    run = train("text", out=folder, recipe=recipe, sequences=sequences, quiet=True, steps=1)
    return load(run.folder / "prior")


def test_characters_that_were_never_seen_are_refused(tmp_path):
    write_text(tmp_path, train="ab" * 100, valid="a" * 128, test="é" + "a" * 128)
    with pytest.raises(ValueError, match=r"the characters \['é'\] of a held-out part"):
        load_sequences("tinyshakespeare", tmp_path)


def test_some_validation_rows_stand_for_all(toy, tmp_path):
    """Rows that differ in cost: a quarter of them, evenly spread, gives another bound."""
    bounds = [
        train(
            "toy",
            out=tmp_path / str(rows),
            recipe=dataclasses.replace(TOY, valid_rows=rows),
            sequences=toy,
            quiet=True,
            steps=5,
        ).valid_bits
        for rows in (None, 16, 100, 4)
    ]
    assert bounds[0] == bounds[1] == bounds[2] != bounds[3]


def test_reverse_complement_turns_the_strand():
    rows = torch.tensor([[0, 1, 2, 2]])
    assert reverse_complement(rows).tolist() == [[1, 1, 2, 3]]
    assert torch.equal(reverse_complement(reverse_complement(rows)), rows)


def test_markov_chain_counts_by_hand():
    rows = torch.tensor([[0, 1, 1], [0, 0, 1]])
    chain = MarkovBaseline(rows, 1, 2, count=0.5)
    # First token: all six tokens, 3 of each. Transitions: from 0 one 0 and two 1; from 1 one 1.
    expected = [0.5, 2.5 / 4, 1.5 / 2]
    torch.testing.assert_close(
        chain.bits(rows[:1]),
        torch.tensor([[-math.log2(p) for p in expected]], dtype=torch.float64),
    )


def test_markov_draws_follow_the_chain():
    """Frequency of one transition over 4000 draws; false alarm 6e-5 (4 s.e.)."""
    rows = torch.tensor([[0, 1, 0, 0, 1, 0]])
    chain = MarkovBaseline(rows, 1, 2, count=0.0)
    draws = chain.sample(1000, 5, torch.Generator().manual_seed(0))
    assert draws.shape == (1000, 5)
    after_zero = draws[:, 1:][draws[:, :-1] == 0]
    p, n = 2 / 3, len(after_zero)
    assert abs(float((after_zero == 1).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert (draws[:, 1:][draws[:, :-1] == 1] == 0).all()


def test_error_treats_a_family_as_one():
    values = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    plain = _error(values, torch.arange(4))
    assert plain == pytest.approx(float(values.std()) / 2)
    assert _error(values, torch.tensor([5, 5, 9, 9])) == pytest.approx(1.0)


def test_noise_is_that_of_the_stratified_mean():
    """Terms with a trend: the trend must not count. Tolerance 20 %, 8 s.e. of the estimate."""
    generator = torch.Generator().manual_seed(0)
    trend = torch.arange(64, dtype=torch.float64)[:, None]
    terms = trend + torch.randn(64, 50, dtype=torch.float64, generator=generator) * 2.0
    assert _noise(terms) == pytest.approx(2.0 / math.sqrt(64 * 50), rel=0.2)


def test_evaluation_and_card(toy, tmp_path, capsys):
    program = run(toy, tmp_path, steps=5).program
    result = evaluate(program, toy, TOY, times=64)
    assert result.sequences == 8
    assert result.gain == pytest.approx(result.markov - result.bound)
    assert result == evaluate(program, toy, TOY, times=64)
    print_evaluation("toy", result)
    assert f"{result.bound:.4f}" in capsys.readouterr().out
    write_card(tmp_path, "yeast-promoter", toy, result, note="A note.")
    card = json.loads((tmp_path / "card.json").read_text())
    text = (tmp_path / "card.md").read_text()
    assert card["metrics"]["bound"] == round(result.bound, 4)
    assert card["note"] == "A note."
    assert f"{result.gain:+.4f}" in text
    assert "A note." in text


def test_the_card_of_a_text_speaks_of_characters(toy, tmp_path, capsys):
    text = dataclasses.replace(toy, noun="lines", unit="character")
    result = evaluate(run(toy, tmp_path, steps=1).program, text, TOY, times=4)
    print_evaluation("toy", result, unit=text.unit)
    write_card(tmp_path, "tinyshakespeare-uniform", text, result)
    markdown = (tmp_path / "card.md").read_text()
    for words in (capsys.readouterr().out, markdown):
        assert "bits per character" in words
        assert "base" not in words
        assert "nan" not in words
    assert "prior over lines" in markdown
    # No baseline is quoted for it; JSON knows no NaN.
    card = json.loads((tmp_path / "card.json").read_text(), parse_constant=pytest.fail)
    assert card["metrics"]["quoted"] is None


def test_a_run_shorter_than_a_validation_period_keeps_what_it_trained(tmp_path, toy):
    recipe = dataclasses.replace(TOY, validate_every=250)
    result = train("toy", out=tmp_path, recipe=recipe, sequences=toy, quiet=True, steps=3)
    assert (result.best_step, result.steps) == (3, 3)
    assert json.loads((tmp_path / "run.json").read_text())["valid_bits_per_token"] > 0
    longer = train(
        "toy", out=tmp_path, recipe=recipe, sequences=toy, quiet=True, steps=5, resume=True
    )
    assert longer.steps == 5


@pytest.mark.parametrize("objective", ["nelbo", "distillation"])
def test_a_diverged_run_is_no_run(toy, tmp_path, objective):
    """The folder holds an earlier prior, which must stay what it is and not be handed back."""
    recipe = dataclasses.replace(TOY, family="uniform", shape={**TOY.shape, "dropout": 0.0})
    options = {"recipe": recipe, "sequences": toy, "quiet": True, "out": tmp_path, "steps": 5}
    train("toy", **options)
    before = (tmp_path / "prior" / "model.safetensors").read_bytes()
    hot = dataclasses.replace(recipe, learning_rate=1e30)
    hot = dataclasses.replace(hot, objective=objective)
    options |= {"recipe": hot, "init": tmp_path / "prior", "force": True}
    with pytest.raises(TrainingDiverged, match=r"bound was never finite.*lower the learning rate"):
        train("toy", **options)
    assert (tmp_path / "prior" / "model.safetensors").read_bytes() == before
    with pytest.raises(TrainingDiverged):
        train("toy", **{**options, "out": tmp_path / "fresh"})
    assert not (tmp_path / "fresh" / "run.json").exists()
    # The checkpoint of the diverged run lies beside the earlier prior: it is not its own either.
    with pytest.raises(TrainingDiverged):
        train("toy", resume=True, **{**options, "steps": 10, "force": False})


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder of a run of ten steps."""
    out = tmp_path_factory.mktemp("begun")
    run(make_toy(), out, steps=10, seed=1)
    return out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 0}, "began with seed 1, not 0; resume it with that"),
        ({"init": "OTHER"}, "began with init None, not '"),
        ({"recipe": dataclasses.replace(TOY, batch_size=8)}, "began with batch_size 32, not 8"),
        ({"recipe": dataclasses.replace(TOY, family="uniform")}, "began with family 'masked'"),
        ({"recipe": dataclasses.replace(TOY, shape={"dim": 32})}, "began with shape {'dim': 16,"),
        ({"steps": 9}, "has done 10 steps, more than the 9 asked for"),
    ],
)
def test_only_the_same_run_is_resumed(begun, toy, tmp_path, options, sentence):
    if "init" in options:
        MaskedDiffusion.build("ACGT", LENGTH, **TOY.shape).save(tmp_path)
        options = {"init": tmp_path}
    fixed = {"recipe": TOY, "sequences": toy, "out": begun, "quiet": True, "resume": True}
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train("toy", **fixed | {"steps": 10, "seed": 1} | options)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_finished_run_may_be_resumed_to_no_effect(begun, toy):
    record = (begun / "run.json").read_text()
    assert run(toy, begun, steps=10, seed=1, resume=True).steps == 10
    assert (begun / "run.json").read_text() == record


@pytest.mark.parametrize("damage", [lambda b: b"x" * 99, lambda b: b[: len(b) // 2], lambda b: b""])
def test_a_damaged_checkpoint_is_one_sentence(begun, toy, tmp_path, damage):
    (tmp_path / "last.ckpt").write_bytes(damage((begun / "last.ckpt").read_bytes()))
    with pytest.raises(ValueError, match=r"last\.ckpt' is damaged or no checkpoint"):
        run(toy, tmp_path, steps=10, seed=1, resume=True)


@pytest.mark.parametrize(("at", "sentence"), [(3, "nothing to resume"), (7, "go on with --resume")])
def test_ctrl_c_says_whether_the_run_can_be_resumed(toy, tmp_path, monkeypatch, at, sentence):
    """A checkpoint of an earlier run does not count."""
    from ppl_diffusion.models.fitting import Fit

    run(toy, tmp_path, steps=5)
    plain, handler = Fit.training_step, signal.getsignal(signal.SIGINT)

    def stopped(self, *args):
        if self.global_step == at:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(Fit, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt, match=sentence):
        run(toy, tmp_path, force=True)
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_shape_recorded_is_that_of_the_network(toy, tmp_path):
    shape = {"dim": 8, "depth": 1, "heads": 2, "dropout": 0.0, "stem_width": 1}
    MaskedDiffusion.build("ACGT", LENGTH, **shape).save(tmp_path / "small")
    run(toy, tmp_path / "run", steps=1, init=tmp_path / "small")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["shape"]
    assert recorded.items() >= shape.items()
    assert load(tmp_path / "run" / "prior").denoiser.config.dim == 8
    # A recipe with that shape builds the network that was trained.
    assert MaskedDiffusion.build("ACGT", LENGTH, **recorded).denoiser.config.dim == 8


def test_large_seeds_and_no_warm_up_are_taken(toy, tmp_path):
    recipe = dataclasses.replace(TOY, warmup=0)
    options = {"recipe": recipe, "sequences": toy, "quiet": True, "steps": 1}
    for seed in (10**14, 10**30):
        train("toy", out=tmp_path / str(seed), seed=seed, **options)
        assert json.loads((tmp_path / str(seed) / "run.json").read_text())["seed"] == seed
