"""Potentials as such: checks, arithmetic, look-ahead."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.potentials import Constraint, Potential, Reward
from ppl_diffusion.testing.potential_contract import PotentialContract


def sequences(count=24, length=6, seed=0):
    return torch.randint(4, (count, length), generator=torch.Generator().manual_seed(seed))


def count_g(x0):
    return (x0 == 2).sum(-1)


def no_a(x0):
    return torch.where((x0 == 0).any(-1), -math.inf, 0.0)


class TestFunctionContract(PotentialContract):
    def make_potential(self):
        return Potential(count_g)

    def make_sequences(self):
        return sequences()


class TestHardFunctionContract(PotentialContract):
    def make_potential(self):
        return Potential(no_a)

    def make_sequences(self):
        return sequences()


class TestSumContract(PotentialContract):
    tolerance = 1e-12

    def make_potential(self):
        return 0.3 * Potential(count_g) + Potential(no_a) + 2 * Potential(lambda x0: x0[..., 0])

    def make_sequences(self):
        return sequences()


def test_integers_become_float64():
    assert Potential(count_g)(torch.tensor([[2, 2, 0]])).tolist() == [2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_plus_infinity_are_errors_that_show_a_sequence(value):
    def broken(x0):
        return torch.where(x0[..., 0] == 1, value, 0.0)

    with pytest.raises(PotentialError, match=r"broken returned NaN or \+inf for 1 of 2 .*\[1, 3\]"):
        Potential(broken)(torch.tensor([[0, 2], [1, 3]]))


def test_a_wrong_shape_is_an_error():
    with pytest.raises(PotentialError, match=r"returned shape \(2, 3\) for sequences of shape"):
        Potential(lambda x0: x0)(torch.zeros(2, 3, dtype=torch.int64))


def test_a_function_must_be_callable():
    with pytest.raises(TypeError, match="fn must be callable, got int"):
        Potential(3)


def test_sums_of_sums_are_flat():
    a, b, c = (Potential(count_g, name=name) for name in "abc")
    assert [term.name for term in ((a + b) + (c + a)).terms] == ["a", "b", "c", "a"]


def test_only_potentials_are_added_and_only_numbers_scale():
    with pytest.raises(TypeError):
        Potential(count_g) + 1.0
    with pytest.raises(TypeError):
        Potential(count_g) * Potential(count_g)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_scales_are_finite_and_not_negative(scale):
    with pytest.raises(ValueError, match="scaled by a finite number >= 0"):
        scale * Potential(count_g)


def test_scaling_by_zero_forgets_an_exclusion():
    x0 = torch.tensor([[0, 1], [1, 1]])
    assert (0.5 * Potential(no_a))(x0).tolist() == [-math.inf, 0.0]
    assert (0 * Potential(no_a))(x0).tolist() == [0.0, 0.0]


def test_the_lookahead_of_a_sum_grades_each_term():
    total = Reward(count_g) + Constraint(lambda x0: (x0 == 0).sum(-1), penalty=2.0)
    x0 = torch.tensor([[0, 0, 2], [2, 1, 1]])
    assert total(x0).tolist() == [-math.inf, 1.0]
    assert total.lookahead(x0).tolist() == [-3.0, 1.0]


def test_a_function_that_fails_is_named():
    def broken(x0):
        return x0.no_such_thing

    def silent(x0):
        return None

    x0 = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        PotentialError, match=r"^broken raised AttributeError .* 2 sequences of length 3"
    ):
        Potential(broken)(x0)
    with pytest.raises(PotentialError, match=r"^silent returned NoneType; return a tensor"):
        Potential(silent)(x0)
    with pytest.raises(PotentialError, match=r"^silent returned NoneType"):
        Potential(silent).lookahead(x0)


@pytest.mark.parametrize(
    "answer",
    [
        "text",
        {"log_g": 0.0},
        [None, None],
        ["0", "0"],
        [[0.0], [0.0]],
        [0.0],
        object(),
        (0.0 for _ in range(2)),
        np.array([None, None]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, complex),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=lambda answer: str(type(answer)),
)
def test_answers_that_are_no_log_potential_are_one_sentence(answer):
    def broken(x0):
        return answer

    with pytest.raises(PotentialError, match=r"^broken returned .*; return (a|one|real)"):
        Potential(broken)(torch.zeros(2, 3, dtype=torch.int64))


def test_a_refusal_inside_of_a_potential_keeps_its_words():
    def refusing(x0):
        raise CapabilityError("not this chain")

    with pytest.raises(CapabilityError, match=r"^not this chain$"):
        Potential(refusing)(torch.zeros(2, 3, dtype=torch.int64))
