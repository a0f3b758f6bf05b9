import math

import pytest
import torch
from torch import tensor

from ppl_diffusion.designs.judging import compare, standard_error
from ppl_diffusion.designs.ranking import rank_designs
from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.smc.law import Base, Law

A, B, C = [0, 0], [0, 1], [1, 1]


def make_posterior(weights, log_evidence, x0, log_potential):
    runs, particles = tensor(weights).shape
    steps = 3
    return ParticlePosterior(
        x0=tensor(x0),
        log_weights=tensor(weights, dtype=torch.float64).log(),
        log_evidence=tensor(log_evidence, dtype=torch.float64),
        log_evidence_steps=torch.zeros(runs, steps, dtype=torch.float64),
        evidence_variance=torch.zeros(runs, dtype=torch.float64),
        ancestors=torch.arange(particles).expand(steps, runs, particles),
        eve=torch.arange(particles).expand(runs, particles),
        ess=torch.ones(runs, steps, dtype=torch.float64),
        resampled=torch.zeros(runs, steps, dtype=torch.bool),
        died_at=tensor([-1 if math.isfinite(z) else 2 for z in log_evidence]),
        log_potential=tensor(log_potential, dtype=torch.float64),
        times=torch.linspace(1, 0, steps + 1, dtype=torch.float64),
        samples={},
        num_evaluations=0,
        num_potential_calls=0,
        law=Law((Base("x", "a kernel", steps, tensor(x0).shape[-1]),)),
    )


@pytest.fixture
def posterior():
    """Return two runs whose evidences are 3 and 1, and one dead run."""
    return make_posterior(
        weights=[[0.5, 0.5], [0.75, 0.25], [0.0, 0.0]],
        log_evidence=[math.log(3), 0.0, -math.inf],
        x0=[[A, B], [A, C], [C, C]],
        log_potential=[[1.0, 2.0], [1.0, 3.0], [3.0, 3.0]],
    )


def test_copies_are_merged_and_runs_count_by_their_evidence(posterior):
    designs = rank_designs(posterior)
    assert designs.tokens.tolist() == [A, B, C]
    # 3/4 of the first run and 1/4 of the second.
    assert designs.weight.tolist() == pytest.approx([0.5625, 0.375, 0.0625])
    assert designs.copies.tolist() == [2, 1, 3]
    assert designs.run.tolist() == [0, 0, 1]
    assert designs.log_potential.tolist() == [1.0, 2.0, 3.0]


def test_weights_within_live_runs(posterior):
    run_weight = rank_designs(posterior).run_weight
    torch.testing.assert_close(
        run_weight, tensor([[0.5, 0.5, 0.0], [0.75, 0.0, 0.25]], dtype=torch.float64)
    )


def test_ties_go_to_the_higher_potential_then_to_the_sequence():
    x0 = [[C, B, A]]
    tied = make_posterior([[1 / 3] * 3], [0.0], x0, [[1.0, 2.0, 1.0]])
    assert rank_designs(tied).tokens.tolist() == [B, A, C]


def test_weightless_designs_are_left_out():
    posterior = make_posterior([[1.0, 0.0]], [0.0], [[A, B]], [[0.0, -math.inf]])
    assert rank_designs(posterior).tokens.tolist() == [A]


def test_comparison_with_the_prior(posterior):
    designs = rank_designs(posterior)
    score = tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    prior = {"score": torch.arange(101, dtype=torch.float64)}
    numbers = compare(designs, {"score": score, "score_sd": score}, prior)
    assert set(numbers) == {"score"}
    assert numbers["score"]["designs_mean"] == pytest.approx(0.375 + 0.125)
    # Both live runs have mean 0.5.
    assert numbers["score"]["designs_standard_error"] == pytest.approx(0.0)
    assert numbers["score"]["prior_mean"] == 50.0
    assert numbers["score"]["prior_95th_percentile"] == 95.0


def test_standard_error():
    assert standard_error(tensor([1.0, 3.0])) == pytest.approx(1.0)
    assert math.isnan(standard_error(tensor([1.0])))
