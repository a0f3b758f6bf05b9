"""What FeynmanKac and run_smc refuse, in one sentence each."""

import pytest
import torch

from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing.toys import toy_chain


def zero(x0):
    return torch.zeros(x0.shape[:-1])


def test_a_kernel_is_no_chain():
    with pytest.raises(TypeError, match="must be a ReverseChain, got InterpolatingKernel"):
        FeynmanKac(toy_chain().kernel, zero)


@pytest.mark.parametrize("other", [{"num_steps": 5}, {"process": "uniform"}])
def test_a_proposal_kernel_must_fit_the_chain(other):
    with pytest.raises(ValueError, match="one time grid and alphabet"):
        FeynmanKac(toy_chain(num_steps=3), zero, proposal=toy_chain(**other).kernel)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 0), (2.5, 1), (2, -1)])
def test_numbers_of_particles_are_whole_and_positive(sizes):
    fk = FeynmanKac(toy_chain(), zero)
    with pytest.raises(ValueError, match="must be >= 1 and whole"):
        run_smc(fk, num_particles=sizes[0], num_runs=sizes[1])


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_thresholds_are_finite_and_not_negative(threshold):
    with pytest.raises(ValueError, match="ess_threshold must be a number >= 0"):
        run_smc(FeynmanKac(toy_chain(), zero), 2, ess_threshold=threshold)
