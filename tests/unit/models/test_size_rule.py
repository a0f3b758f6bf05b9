"""The rule of size: what it chooses, and that all of it can be said."""

import dataclasses

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.models.own_data import prepare
from ppl_diffusion.models.sequence_files import Rows
from ppl_diffusion.models.sequences import unrelated
from ppl_diffusion.models.size_rule import (
    Asked,
    choose,
    heads,
    seconds_per_step,
    steps_in,
    train_tokens,
    with_steps,
)
from ppl_diffusion.tokenisers import find_alphabet


def aligned(rows, length):
    words = {"licence": "", "source": "", "vocabulary": "ACGT"}
    sizes = (rows, rows // 10, rows // 10)
    return unrelated([torch.zeros(n, length, dtype=torch.int64) for n in sizes], **words)


@pytest.mark.parametrize(
    ("rows", "length", "dim", "dropout", "batch"),
    [(1000, 50, 64, 0.1, 16), (3000, 50, 96, 0.0, 16), (200_000, 30, 128, 0.0, 32),
     (30_000, 4, 96, 0.0, 256), (100, 1, 64, 0.1, 256)],
)  # fmt: skip
def test_the_network_grows_with_the_data(rows, length, dim, dropout, batch):
    recipe = choose(aligned(rows, length), Asked())
    assert (recipe.shape["dim"], recipe.shape["dropout"], recipe.batch_size) == (
        dim,
        dropout,
        batch,
    )
    assert recipe.shape["depth"] == 3
    assert recipe.learning_rate == min(0.2 / dim, 2e-3)


def test_motifs_are_seen_at_once_in_long_rows_of_few_symbols():
    widths = [choose(aligned(100, length), Asked()).shape["stem_width"] for length in (15, 16, 50)]
    assert widths == [1, 7, 7]
    many = dataclasses.replace(aligned(100, 50), vocabulary=tuple(map(str, range(33))))
    assert choose(many, Asked()).shape["stem_width"] == 1


def test_what_is_said_stands():
    asked = Asked(steps=70, dim=40, depth=2, batch_size=5, learning_rate=0.01, dropout=0.3)
    recipe = choose(aligned(1000, 10), asked)
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (70, 5, 0.01)
    assert (recipe.shape["dim"], recipe.shape["depth"], recipe.shape["dropout"]) == (40, 2, 0.3)


def test_classes_are_learnt_with_labels_withheld():
    recipe = choose(aligned(1000, 10), Asked(), classes=3)
    assert recipe.shape["num_classes"] == 3
    assert recipe.options == {"label_dropout": 0.2}


def test_steps_fit_into_the_minutes():
    data, recipe = aligned(100_000, 30), choose(aligned(100_000, 30), Asked())
    # 8 minutes, less a tenth, at 50 steps a second of which a sixth is other work; and no more
    # digits than can be typed.
    assert steps_in(8.0, 0.02, data, recipe) == 18_000
    assert steps_in(8.0, 0.02, data, recipe, spent=160.0) == 12_000
    assert steps_in(8.0, 0.02, data, recipe, spent=1000.0) == 9_000
    assert steps_in(1e-6, 1.0, data, recipe) == 1


def test_few_rows_are_not_seen_for_ever():
    data = aligned(100, 30)
    assert steps_in(60.0, 0.001, data, choose(data, Asked())) == 1000
    data = aligned(10_000, 30)
    epochs = 200 * 10_000 / choose(data, Asked()).batch_size
    assert steps_in(600.0, 0.001, data, choose(data, Asked())) == pytest.approx(epochs, rel=0.1)


@pytest.mark.parametrize("steps", [1, 7, 300, 20_000])
def test_validations_are_spread_over_the_run(steps):
    recipe = with_steps(choose(aligned(1000, 50), Asked()), steps, 100_000)
    assert recipe.validate_every * 20 >= steps
    # A tenth of the time, where a step on a row costs three evaluations of it.
    cost = 20 * recipe.valid_rows * recipe.valid_times
    assert cost <= max(0.11 * steps * recipe.batch_size * 3.0, 20 * 100 * recipe.valid_times)


@pytest.mark.parametrize("dim", [2, 10, 16, 32, 40, 64, 74, 96, 128, 512])
def test_heads_fit_every_width(dim):
    TransformerConfig(4, 5, 10, dim=dim, heads=heads(dim))


def test_heads_are_about_24_wide():
    assert {dim: heads(dim) for dim in (64, 96, 128)} == {64: 2, 96: 4, 128: 4}


def test_what_fills_up_is_no_training_token():
    source = np.random.default_rng(0)
    texts = tuple("A" * int(n) for n in source.integers(1, 9, 50))
    data = prepare(Rows(texts, tuple(range(50))), find_alphabet("chars"))
    assert train_tokens(data.sequences) == sum(len(data.tokens[i]) for i in data.split.train)


def test_a_step_is_timed_without_a_trace():
    data = aligned(100, 5)
    before = torch.get_rng_state()
    recipe = choose(data, Asked(dim=16, depth=1, batch_size=4))
    assert 0.0 < seconds_per_step(data, recipe, torch.device("cpu")) < 10.0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"steps": 0}, "The option steps is 0; give 1 or more."),
        ({"dim": -2}, "The option dim is -2; give 1 or more."),
        ({"minutes": float("nan")}, "The option minutes is nan; give a number above 0."),
        ({"learning_rate": 0.0}, "The option learning_rate is 0.0; give a number above 0."),
        ({"dropout": 1.0}, "The option dropout is 1.0; give a number in [0, 1)."),
        ({"steps": 1, "minutes": 1.0}, "Minutes and steps were both given; leave one of them "
         "out."),
    ],
)  # fmt: skip
def test_what_cannot_be_said(said, text):
    with pytest.raises(ValueError, match=r"give|out") as error:
        Asked(**said)
    assert str(error.value) == text


def test_odd_widths_have_no_heads():
    with pytest.raises(ValueError, match=r"^The option dim is 33; give an even number\.$"):
        choose(aligned(100, 5), Asked(dim=33))
