"""Shapes of scores say what they do, in numbers and in words."""

import math

import pytest
import torch

from ppl_diffusion.potentials import (
    DoubleSigmoid,
    Linear,
    Reward,
    Sigmoid,
    Steps,
    between,
    maximise,
    minimise,
)
from ppl_diffusion.testing.potential_contract import PotentialContract


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def score(x0):
    return x0.double().sum(-1)


X0 = torch.arange(12).reshape(4, 3) % 5


@pytest.mark.parametrize(
    ("transform", "values", "expected", "words"),
    [
        (Linear(2, 6), f64(1, 2, 3, 6, 9), f64(0, 0, 0.25, 1, 1), "linear(score; 2 to 6)"),
        (Linear(6, 2), f64(1, 2, 5, 6, 9), f64(1, 1, 0.25, 0, 0), "linear(score; 6 to 2)"),
        (Sigmoid(-1, 3), f64(-1, 1, 3), f64(0.05, 0.5, 0.95), "sigmoid(score; -1 to 3)"),
        (Sigmoid(3, -1), f64(-1, 1, 3), f64(0.95, 0.5, 0.05), "sigmoid(score; 3 to -1)"),
        (
            DoubleSigmoid(0, 10, 0.5),
            f64(-9, 0, 5, 10, 19),
            f64(0, 0.5, 1, 0.5, 0),
            "double sigmoid(score; 0 to 10, width 0.5)",
        ),
        (
            Steps([(1, 0.5), (2, 0.1), (4, 1)]),
            f64(0.9, 1, 1.9, 2, 4, 99),
            f64(0, 0.5, 0.5, 0.1, 1, 1),
            "steps(score; 0.5 from 1, 0.1 from 2, 1 from 4)",
        ),
    ],
)
def test_transforms_go_onto_the_unit_interval(transform, values, expected, words):
    found = transform(values)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert transform.describe() == words
    ends = transform(f64(-math.inf, math.inf, -1e300, 1e300))
    assert ((ends >= 0) & (ends <= 1)).all()


@pytest.mark.parametrize(
    ("shape", "expected", "words"),
    [
        (maximise(0.4), f64(-5, 0, 5), "exp(dock / 0.4)"),
        (minimise(0.4), f64(5, 0, -5), "exp(-dock / 0.4)"),
        (between(-1, 1, 0.5), f64(-2, 0, -2), "exp(-distance(dock, [-1, 1])^2 / (2 * 0.5^2))"),
    ],
)
def test_shapes_say_what_the_tilt_is(shape, expected, words):
    torch.testing.assert_close(shape(f64(-2, 0, 2)), expected)
    assert shape.describe("dock") == words


class TestReward:
    def test_a_transform_stands_in_the_name_and_the_tilt(self):
        reward = Reward(score, 0.5, transform=Sigmoid(0, 4))
        assert reward.name == "sigmoid(score; 0 to 4) / 0.5"
        assert reward.tilt == "exp(sigmoid(score; 0 to 4) / 0.5)"
        torch.testing.assert_close(reward(X0), Sigmoid(0, 4)(score(X0)) / 0.5)
        plain = Reward(score, 0.5, maximise=False)
        assert (plain.name, plain.tilt) == ("-score / 0.5", "exp(-score / 0.5)")

    def test_a_shape_is_the_whole_tilt(self):
        reward = Reward(score, shape=between(3, 4, 2.0))
        assert reward.tilt == "exp(-distance(score, [3, 4])^2 / (2 * 2^2))"
        assert reward.name == f"log {reward.tilt}"
        assert torch.equal(reward(X0), between(3, 4, 2.0)(score(X0)))
        same = Reward(score, shape=minimise(0.3))(X0)
        assert torch.equal(same, Reward(score, 0.3, maximise=False)(X0))
        for options in ({"temperature": 2.0}, {"maximise": False}, {"transform": Linear(0, 1)}):
            with pytest.raises(ValueError, match="score: a shape is the whole tilt; leave out"):
                Reward(score, shape=minimise(0.3), **options)

    @pytest.mark.parametrize("options", [{"transform": Linear(0, 1)}, {"shape": maximise(1.0)}])
    def test_an_impossible_sequence_stays_one(self, options):
        reward = Reward(lambda x0: torch.full((len(x0),), -math.inf), **options)
        assert (reward(X0) == -math.inf).all()
        assert reward.num_failures == 0


class TestTransformedContract(PotentialContract):
    def make_potential(self):
        return Reward(score, 0.2, transform=DoubleSigmoid(2, 6), maximise=False)

    def make_sequences(self):
        return X0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Linear(1, 1), "Linear: low and high must be finite and differ, got 1 and 1."),
        (
            lambda: Sigmoid(math.nan, 1),
            "Sigmoid: low and high must be finite and differ, got nan and 1.",
        ),
        (
            lambda: DoubleSigmoid(2, 1),
            "DoubleSigmoid: low must not be above high, and both finite, got 2 and 1.",
        ),
        (
            lambda: DoubleSigmoid(1, 2, 0),
            "DoubleSigmoid: width must be a positive, finite number, got 0.",
        ),
        (
            lambda: Steps([(2, 0.1), (1, 0.2)]),
            "Steps: give (score, value) with ascending, finite scores and values from 0 to 1, got "
            "[(2.0, 0.1), (1.0, 0.2)].",
        ),
        (
            lambda: Steps([]),
            "Steps: give (score, value) with ascending, finite scores and values "
            "from 0 to 1, got [].",
        ),
        (lambda: maximise(0), "temperature must be a positive, finite number, got 0."),
        (
            lambda: between(2, 1, 1),
            "between: low must not be above high, and both finite, got 2 and 1.",
        ),
        (lambda: between(1, 2, -1), "between: sd must be a positive, finite number, got -1."),
    ],
)
def test_bad_numbers_are_one_sentence(make, text):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == text
