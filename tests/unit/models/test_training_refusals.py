"""Recipes and data that training refuses, each in one sentence and before anything is written."""

import dataclasses
import math
import re

import pytest
import torch

from ppl_diffusion.models.datasets import check_sequences, load_sequences
from ppl_diffusion.models.training import train

ROWS = torch.arange(4)[:, None].expand(4, 8).repeat(16, 1)
WEIGHTS = torch.ones(len(ROWS), dtype=torch.float64)
LONG = torch.zeros(3, 9, dtype=torch.int64)


@pytest.fixture
def toy(make_sequences):
    """Data with related rows."""
    rows = make_sequences(ROWS, "ACGT")
    return dataclasses.replace(rows, related=ROWS, related_weights=WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"train": ROWS[:0]}, "train holds no rows"),
        ({"valid": ROWS[:0]}, "valid holds no rows"),
        ({"related": LONG}, "rows of related have 9 tokens, those of train 8"),
        ({"valid": LONG}, "rows of valid have 9 tokens, those of train 8"),
        ({"train": ROWS.double()}, "train must hold token ids, int64 (n, L), but is torch.float64"),
        ({"train": ROWS[0]}, "but is torch.int64 (8,)"),
        ({"train": ROWS + 1}, "train holds the id 4, but those of the 4 letters 'ACGT' are 0 to 3"),
        ({"valid": ROWS - 1}, "valid holds the id -1"),
        ({"related": ROWS + 1}, "related holds the id 4"),
        ({"related": ROWS[:0], "related_weights": WEIGHTS[:0]}, "but the data have none; set sh"),
        ({"related_weights": WEIGHTS[1:]}, "related_weights must be 64 finite numbers"),
        ({"related_weights": -WEIGHTS}, "related_weights must be 64 finite numbers"),
        ({"related_weights": WEIGHTS * math.nan}, "related_weights must be 64 finite numbers"),
        ({"vocabulary": "ACGTN"}, "both_strands needs the four letters ACGT"),
    ],
)
def test_data_that_do_not_suit_are_one_sentence(toy, make_recipe, tmp_path, fields, sentence):
    recipe = make_recipe(shares=(0.5, 1.0), both_strands="vocabulary" in fields)
    data = dataclasses.replace(toy, **fields)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train("toy", out=tmp_path, recipe=recipe, sequences=data, quiet=True)
    assert not list(tmp_path.iterdir())


def test_data_that_suit_are_accepted(toy, make_recipe):
    check_sequences(toy, make_recipe(shares=(0.5, 1.0), both_strands=True))
    own = {"related": ROWS[:0], "related_weights": WEIGHTS[:0], "test": ROWS[:0]}
    check_sequences(dataclasses.replace(toy, **own), make_recipe(shares=(1.0, 1.0)))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"family": "gaussian"}, "family is 'gaussian'; give one of"),
        ({"objective": "x"}, "objective is 'x'; give one of nelbo, curriculum, distillation"),
        ({"decay": "linear"}, "decay is 'linear'"),
        ({"batch_size": 0}, "batch_size is 0; give an integer from 1 up"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"valid_times": 0}, "valid_times is 0"),
        ({"valid_rows": 0}, "valid_rows is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"learning_rate": math.nan}, "learning_rate is nan; give a number from 0 up"),
        ({"shares": (0.5, 1.5)}, "shares is (0.5, 1.5); give two numbers in [0, 1]"),
        ({"switch": math.nan}, "switch is nan"),
    ],
)
def test_recipes_that_cannot_be_followed_are_one_sentence(fields, sentence, make_recipe):
    with pytest.raises(ValueError, match=re.escape(f"Recipe: {sentence}")):
        make_recipe(**fields)


def test_unknown_data_sets_are_one_sentence():
    with pytest.raises(ValueError, match=r"no data set 'x': choose one of yeast, human"):
        load_sequences("x")
