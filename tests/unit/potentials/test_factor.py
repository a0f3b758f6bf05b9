"""Potentials as sites of a program."""

import math

import pyro.poutine as poutine
import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials import Potential, factor
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS

X0 = torch.tensor([[0, 1, 2], [2, 2, 1]])


def no_leading_two(x0):
    return torch.where(x0[..., 0] == 2, -math.inf, x0.sum(-1).double())


def site(potential):
    return poutine.trace(lambda: factor("f", potential, X0)).get_trace().nodes["f"]


@pytest.mark.parametrize("wrap", [Potential, lambda fn: fn], ids=["potential", "function"])
def test_functions_and_potentials_are_the_same_factor(wrap):
    node = site(wrap(no_leading_two))
    assert node["fn"].log_prob(node["value"]).tolist() == [3.0, -math.inf]
    assert node["fn"].lookahead().tolist() == [3.0, FORBIDDEN_GUESS]


def test_a_function_is_checked_like_a_potential():
    def broken(x0):
        return torch.full(x0.shape[:-1], torch.nan)

    node = site(broken)
    with pytest.raises(PotentialError, match="broken returned NaN"):
        node["fn"].log_prob(node["value"])


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="fn must be callable, got float"):
        site(0.5)
