"""What the parts of a site create lives where the states live.

The meta device stands in for an accelerator: mixing it with tensors of the processor is an error.
"""

import math

import pytest
import torch

from ppl_diffusion.distributions import RevealStep, TokenStep
from ppl_diffusion.handlers import ClampProposal, mean_prediction
from ppl_diffusion.handlers.steering import _pick
from ppl_diffusion.kernels import Absorbing

FAR = torch.device("meta")
TOKENS = torch.full((5, 3), 4, device=FAR)
LOG_PROBS = torch.full((5, 3, 4), math.log(0.25), device=FAR)


EVERY = torch.ones(5, 3, dtype=torch.bool, device=FAR)
STEPS = {
    "token": TokenStep(Absorbing(4), TOKENS, LOG_PROBS, 0.2, 0.6, validate_args=False),
    "reveal": RevealStep(TOKENS, LOG_PROBS, EVERY, 1, validate_args=False),
}


@pytest.mark.parametrize("name", STEPS)
def test_clamps_and_mean_predictions_follow_the_step(name):
    step = STEPS[name]
    clamp = ClampProposal(torch.tensor([1, 0, 2]), torch.tensor([True, False, True]), 4)
    assert clamp(step, {"tokens": TOKENS}, 0).log_probs.device == FAR
    assert clamp.holds(TOKENS).device == FAR
    assert mean_prediction(step).device == FAR


def test_the_pick_of_a_steered_path_follows_the_weights():
    assert _pick(torch.zeros(4, 7, dtype=torch.float64, device=FAR)).device == FAR


def test_the_stand_in_catches_a_tensor_left_behind():
    with pytest.raises(RuntimeError, match="device"):
        torch.where(torch.tensor([True, False, True]), TOKENS, 0)
