"""Small programs, recipes and data for the tests of training."""

import dataclasses

import pytest
import torch

from ppl_diffusion.models import UniformDiffusion
from ppl_diffusion.models.datasets import Sequences
from ppl_diffusion.models.recipes import Recipe

_SHAPE = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "stem_width": 3}
_RECIPE = Recipe(
    family="uniform",
    dataset="none",
    shape={**_SHAPE, "time_conditioning": True},
    steps=20,
    batch_size=32,
    learning_rate=2e-2,
    weight_decay=0.0,
    warmup=2,
    ema_decay=0.9,
    shares=(1.0, 1.0),
    validate_every=5,
    valid_times=4,
)


@pytest.fixture(scope="session")
def make_recipe():
    """Return a recipe of twenty steps with other fields."""
    return lambda **fields: dataclasses.replace(_RECIPE, **fields)


@pytest.fixture(scope="session")
def make_sequences():
    """Return a data set of rows; every tenth is for validation and test."""

    def make(rows, vocabulary):
        return Sequences(
            train=rows,
            valid=rows[::10],
            test=rows[::10],
            test_family=torch.arange(len(rows[::10])),
            related=rows[:0],
            related_weights=torch.ones(0, dtype=torch.float64),
            licence="Data: made up.",
            source="Made up.",
            vocabulary=vocabulary,
        )

    return make


@pytest.fixture
def make_program():
    """Return an untrained program over six letters whose predictions differ."""

    def make(family=UniformDiffusion):
        program = family.build("abcdef", 6, **_RECIPE.shape)
        with torch.no_grad():
            for parameter in program.denoiser.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return program

    return make


@pytest.fixture
def draw_rows():
    """Return random rows of six letters."""
    return lambda count: torch.randint(6, (count, 6))
