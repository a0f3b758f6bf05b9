"""Diagnostics of latents on two correlated bits, where everything they estimate is known.

The sample holds every sequence as often as it is expected, so that what is left to chance is which
token of two is revealed first, and the draws of random encoders.
"""

import math

import pytest
import torch

from ppl_diffusion.models import LatentDiffusion
from ppl_diffusion.models.latent_diagnostics import code_use, diagnose
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.testing.latent_toys import corr_bits

BITS = corr_bits(0.05)
CORRELATION = 0.379191
SAMPLE = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat_interleave(
    torch.tensor([1810, 190, 190, 1810]), 0
)
CODES = {
    "first bit": lambda x: x[:, :1],
    "constant": lambda x: torch.zeros_like(x[:, :1]),
    "equal": lambda x: (x[:, :1] == x[:, 1:]).long(),
}


def found(problem, encoder, process=None):
    program = LatentDiffusion(problem.denoiser(process), vocabulary="01", length=2, encoder=encoder)
    torch.manual_seed(0)
    return diagnose(program, SAMPLE)


@pytest.mark.parametrize(
    ("code", "information", "given", "left", "finding"),
    [
        ("first bit", math.log(2), 0.313956, 0.0, "useful"),
        ("constant", 0.0, 2 * math.log(2), CORRELATION, "says nothing"),
        ("equal", 0.313956, 2 * math.log(2), math.log(2), "useless"),
    ],
)
def test_codes_that_fail_are_told_from_those_that_do_not(code, information, given, left, finding):
    encoder = CODES[code]
    diagnosis = found(BITS.encoded(encoder, 2), encoder)
    assert diagnosis.information == pytest.approx(information, abs=1e-5)
    assert diagnosis.entropy == 0.0
    assert diagnosis.without == pytest.approx(2 * math.log(2), abs=1e-5)
    assert diagnosis.given == pytest.approx(given, abs=1e-5)
    # Which bit goes first matters for single sequences, not for the mean: 4000 rows, s.e. 0.015.
    assert diagnosis.correlation == pytest.approx(CORRELATION, abs=0.075)
    assert diagnosis.left == pytest.approx(left, abs=0.075)
    assert diagnosis.finding == finding


class Posterior:
    """The random encoder of the fair bit behind both."""

    def log_probs(self, x0):
        law = BITS.joint / BITS.joint.sum(-1, keepdim=True)
        return law[tuple(x0.T)].log()[:, None]

    def __call__(self, x0):
        return self.log_probs(x0).argmax(-1)


def test_codes_that_are_drawn_have_an_entropy():
    diagnosis = found(BITS, Posterior())
    assert diagnosis.entropy == pytest.approx(0.083075, abs=1e-5)
    assert BITS.information == pytest.approx(math.log(2) - 0.083075, abs=1e-5)
    # Draws of 4000 codes: the log of a posterior of .0026 or .9972 deviates by 0.006 in the mean.
    assert diagnosis.information == pytest.approx(BITS.information, abs=0.03)
    assert diagnosis.left == pytest.approx(0.0, abs=0.075)
    assert diagnosis.finding == "useful"


def test_vectors_are_diagnosed_too():
    """Two points, at which the noise left at the end is half of log 2 at most."""
    process = Gaussian()
    encoder = lambda x: (2.0 * x[:, :1, None] - 1.0).double()  # noqa: E731
    diagnosis = found(BITS.embedded(encoder), encoder, process)
    assert diagnosis.information == pytest.approx(math.log(2), abs=0.01)
    assert diagnosis.use is None
    assert diagnosis.finding == "useful"


def test_use_of_codes_is_counted():
    codes = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    use = code_use(codes, 5)
    assert use.perplexity == pytest.approx((1.0 + 2.0) / 2)
    assert use.used == pytest.approx(3 / 5)
