"""Baselines: what each claims, and the laws of those that have one.

Evidences are held to enumeration at four standard errors (false alarms 6e-5 each), chi-square
tests reject at 1e-3.
"""

import math

import pyro
import pytest
import torch

from ppl_diffusion.inference import SMC
from ppl_diffusion.inference.baselines import KeepBest
from ppl_diffusion.potentials import Constraint, Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.testing.oracles import ExactChain, chi_square_p_value, total_variation, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

CHAIN = toy_chain(length=3, num_steps=4, sharpness=1.5)
GOAL = toy_potential(3, 3, scale=1.5)
EXACT = ExactChain.of(CHAIN)
NEVER = Constraint(lambda x0: torch.ones(x0.shape[:-1]), name="never")
METHODS = ["importance-sampling", "guided-lineages", "best-of-n", "beam"]


def run(method, potential=GOAL, *, chain=CHAIN, seed=1, **options):
    options = {"num_particles": 8, "num_runs": 50, **options}
    return SMC(chain, potential, method=method, **options).run(seed=seed)


def evidence_z(posterior):
    return z_score(posterior.log_evidence.exp(), EXACT.evidence(GOAL))


@pytest.mark.parametrize("method", ["importance-sampling", "guided-lineages"])
def test_weighted_baselines_are_exact(method):
    posterior = run(method, num_runs=500)
    assert abs(evidence_z(posterior)) < 4
    assert posterior.exact
    assert not bool(posterior.resampled.any())


def test_a_proposal_is_paid_for():
    other = toy_chain(length=3, num_steps=4, sharpness=0.5, seed=3)
    posterior = run("importance-sampling", proposal=other.kernel, num_runs=500)
    assert abs(evidence_z(posterior)) < 4
    assert posterior.settings["proposal"] == "InterpolatingKernel"


def test_guidance_nobody_pays_for_is_found():
    options = {"num_runs": 200, "num_particles": 32}
    goal = EXACT.posterior(GOAL)
    right, wrong = (run("guided-lineages", weighted=paid, **options) for paid in (True, False))
    kept = total_variation(EXACT.histogram(right.x0, right.pooled_log_weights.exp()), goal)
    dropped = total_variation(EXACT.histogram(wrong.x0, wrong.weights), goal)
    assert kept < 0.06
    assert dropped > 0.12
    assert torch.equal(right.x0, wrong.x0)
    assert not wrong.exact
    assert wrong.target.startswith("no declared law: 4 guided steps that nothing paid for")
    assert wrong.settings["weighted"] is False


def test_the_best_of_n_has_the_law_of_a_maximum():
    """``P(best = x) = F(g)^N - F(g-)^N`` where no two sequences tie."""
    posterior = run("best-of-n", num_runs=3000, num_particles=4)
    best = posterior.x0[posterior.weights == 1]
    assert len(best) == 3000
    log_g, law = GOAL(EXACT.states[EXACT.clean]), EXACT.x0_law()
    below = torch.stack([law[log_g < g].sum() for g in log_g])
    expected = (below + law) ** 4 - below**4
    assert chi_square_p_value(EXACT.histogram(best) * 3000, expected) > 1e-3


def test_several_may_be_kept():
    posterior = run("best-of-n", keep=3)
    assert torch.equal((posterior.weights > 0).sum(-1), torch.full((50,), 3))
    worst_kept = torch.where(posterior.weights > 0, posterior.log_potential, math.inf).amin(-1)
    best_left = torch.where(posterior.weights > 0, -math.inf, posterior.log_potential).amax(-1)
    assert bool((worst_kept >= best_left).all())
    assert "the best 3 of 8 draws" in posterior.target


@pytest.mark.parametrize("method", ["best-of-n", "beam"])
def test_optimisers_claim_no_evidence(method):
    posterior = run(method)
    assert not posterior.exact
    assert bool(posterior.log_evidence.isnan().all())
    assert bool(posterior.evidence_variance.isnan().all())
    assert "log_evidence is NaN" in posterior.target
    torch.testing.assert_close(posterior.weights.sum(-1), torch.ones(50, dtype=torch.float64))
    best = posterior.expectation(lambda x0: GOAL(x0))
    torch.testing.assert_close(best, posterior.log_potential.amax(-1))


@pytest.mark.parametrize("method", METHODS)
def test_dead_runs_say_so(method):
    posterior = run(method, NEVER)
    assert bool((posterior.died_at == 3).all())
    assert bool((posterior.log_evidence == -math.inf).all())
    assert bool((posterior.weights == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_forbidden_sequences_never_come_out(method):
    allowed = Constraint(lambda x0: (x0[..., 0] == x0[..., 1]).double(), name="differ")
    options = {"weighted": False} if method == "guided-lineages" else {}
    drawn = run(method, allowed, num_particles=16, **options).resample(200)["x0"]
    assert bool((drawn[:, 0] != drawn[:, 1]).all())


@pytest.mark.parametrize("method", METHODS)
def test_programs_are_their_own_potential(method):
    def program():
        path = pyro.sample("path", CHAIN)
        factor("goal", GOAL, pyro.deterministic("x", CHAIN.x0(path), event_dim=1))

    own = run(method, None, chain=program, num_runs=300)
    assert torch.equal(own.samples["x"], own.x0)
    torch.testing.assert_close(own.log_potential, GOAL(own.x0))
    assert not own.exact or abs(evidence_z(own)) < 4


# Beam search.


def test_a_beam_climbs_higher_than_the_best_of_as_many():
    """By more than 4 standard errors (the difference is some 15 of them)."""
    chain, options = toy_chain(length=8, num_steps=8), {"num_particles": 16, "num_runs": 200}

    def count(x0):
        return (x0 == 0).sum(-1).to(torch.float64)

    beam = SMC(chain, count, method="beam", num_children=4, **options).run(seed=0)
    best = SMC(chain, count, method="best-of-n", **options).run(seed=0)
    gain = beam.expectation(count) - best.expectation(count)
    assert float(gain.mean()) > 4 * float(gain.std()) / 200**0.5


def test_a_wide_beam_finds_the_best_sequence():
    """Every one of the 27 sequences has a positive probability; the best is among 512 children."""
    posterior = run("beam", num_particles=512, num_children=8, num_runs=2)
    best = GOAL(EXACT.states[EXACT.clean]).max()
    torch.testing.assert_close(posterior.log_potential.amax(-1), best.expand(2))


def test_equal_candidates_count_once():
    posterior = run("beam", num_particles=64, num_children=8, num_runs=5, keep=64)
    for x0, weights in zip(posterior.x0, posterior.weights, strict=True):
        alive = x0[weights > 0]
        assert len(alive) == len(alive.unique(dim=0)) == len(x0.unique(dim=0))


def test_survivors_are_the_highest_rated_of_their_step():
    """Each step's parents, ranked by the potential of the completed state."""
    posterior = run("beam", num_particles=8, num_children=4, num_runs=5)
    assert bool(posterior.resampled[:, :-1].all())
    for run_of in posterior.ancestors[1:].unbind(1):
        assert all(len(set(parents.tolist())) <= 2 for parents in run_of)
    lineage = posterior.path[..., -1, :]
    assert torch.equal(lineage, posterior.x0)
    revealed = posterior.path[..., :-1, :] < 3  # a true lineage never changes what it has revealed
    assert bool((posterior.path[..., 1:, :] == posterior.path[..., :-1, :])[revealed].all())


def test_the_best_survive_in_order():
    log_weights = torch.tensor([[0.0, 3.0, -math.inf, 1.0], [-math.inf, -math.inf, 2.0, -math.inf]])
    ancestors = KeepBest(2)(torch.empty(2, 0), log_weights)
    assert ancestors.tolist() == [[1, 1, 3, 3], [2, 2, 2, 2]]


def test_ratings_far_apart_are_ranked():
    posterior = run("beam", Potential(lambda x0: 1e6 * GOAL(x0)), num_particles=32)
    assert bool(posterior.log_potential.isfinite().all())
    assert bool((posterior.weights.sum(-1) == 1).all())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("beam", {"num_children": 3}, "num_children must divide num_particles, got 3 and 8"),
        ("beam", {"keep": 0}, "BeamSearch: keep must be >= 1, got 0"),
        ("beam", {"twist": None}, "twist=None rates nothing"),
        ("best-of-n", {"keep": 0}, "BestOfN: keep must be >= 1, got 0"),
        ("guided-lineages", {"ess_threshold": 0.5}, "lineages are never resampled"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(method, options, message):
    with pytest.raises(ValueError) as error:
        run(method, **options)
    assert message in str(error.value)
