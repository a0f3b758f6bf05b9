"""Steering: schedules, costs, refusals and what a result says."""

import pyro
import pytest
import torch

from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.smc import FeynmanKac, PersistentFill, run_smc
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

KINDS = ["difference", "max", "sum", "add"]
CHAIN = toy_chain(length=4, num_steps=5)
GOAL = toy_potential(3, 4)


def steer(potential=GOAL, *, chain=CHAIN, seed=1, **options):
    return SMC(
        chain, potential, method="steering", **{"num_particles": 16, "num_runs": 3, **options}
    ).run(seed=seed)


def test_every_round_is_scored_if_nothing_else_is_said():
    posterior = steer()  # four positions: four rounds, the last of which is the end
    assert posterior.settings["scored_steps"] == [1, 2, 3]
    moves = (posterior.log_evidence_steps.diff(dim=-1) != 0).any(0)
    assert 0 < int(moves.sum()) <= 3


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 2}, [1, 3]),
        ({"interval": (2, 3)}, [2, 3]),
        ({"every": 2, "interval": (2, 9)}, [2, 4]),
    ],
    ids=str,
)
def test_states_are_scored_when_due(options, steps):
    posterior = steer(**options)
    assert posterior.settings["scored_steps"] == steps
    # Weights move at scored steps and at the end, and nowhere else.
    moves = (posterior.log_evidence_steps.diff(dim=-1, prepend=torch.zeros(3, 1)) != 0).any(0)
    assert set((moves.nonzero()[:, 0] + 1).tolist()) <= {*steps, 5}


def test_difference_is_the_plain_feynman_kac_model():
    """The start's own score is one constant for all, which the end takes back."""
    torch.manual_seed(1)
    plain = run_smc(FeynmanKac(CHAIN, GOAL), 16, 3)
    steered = steer()
    torch.testing.assert_close(steered.log_evidence, plain.log_evidence)
    assert torch.equal(steered.x0, plain.x0)


@pytest.mark.parametrize("kind", KINDS)
def test_never_resampled_it_is_importance_sampling(kind):
    steered = steer(kind=kind, ess_threshold=0.0, twist="argmax")  # which draws nothing
    weighed = SMC(CHAIN, GOAL, method="importance-sampling", num_particles=16, num_runs=3).run(
        seed=1
    )
    assert torch.equal(steered.x0, weighed.x0)
    torch.testing.assert_close(steered.log_weights, weighed.log_weights)
    torch.testing.assert_close(steered.log_evidence, weighed.log_evidence)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_shifts_the_evidence_and_nothing_else(kind):
    before = steer(kind=kind)
    after = steer(GOAL + Potential(lambda x0: torch.full(x0.shape[:-1], -40.0)), kind=kind)
    assert torch.equal(before.path, after.path)
    torch.testing.assert_close(after.log_evidence, before.log_evidence - 40.0)


@pytest.mark.parametrize("kind", KINDS)
def test_enormous_potentials_stay_finite(kind):
    posterior = steer(1000.0 * GOAL, kind=kind)
    assert bool(posterior.log_evidence.isfinite().all())
    assert bool(posterior.weights.sum(-1).isclose(torch.ones(3, dtype=torch.float64)).all())


def test_a_prompt_stays():
    prompt = torch.tensor([-1, 2, -1, 0])
    posterior = steer(chain=toy_chain(length=4, num_steps=5, prompt=prompt))
    assert bool((posterior.path[..., 1] == 2).all())
    assert bool((posterior.path[..., 3] == 0).all())


@pytest.mark.parametrize("twist", ["argmax", PersistentFill(2)], ids=str)
def test_caching_changes_the_cost_and_nothing_else(twist):
    cached, plain = steer(twist=twist), steer(twist=twist, cache=False)
    assert torch.equal(cached.path, plain.path)
    assert torch.equal(cached.log_evidence, plain.log_evidence)
    fills = 1 if twist == "argmax" else 2
    assert plain.num_potential_calls == 3 * 16 * (3 * fills + 1)  # four positions, four rounds
    assert cached.num_potential_calls < plain.num_potential_calls / 2
    assert cached.num_evaluations == plain.num_evaluations


def test_log_potential_is_that_of_the_result():
    for closing in ("exact", "published"):
        posterior = steer(kind="max", closing=closing)
        torch.testing.assert_close(posterior.log_potential, GOAL(posterior.x0))


def test_a_program_is_its_own_potential():
    def program():
        path = pyro.sample("path", CHAIN)
        x = pyro.deterministic("x", CHAIN.x0(path), event_dim=1)
        factor("goal", GOAL, x)

    own = SMC(program, method="steering", num_particles=16, num_runs=200).run(seed=1)
    exact = ExactChain.of(CHAIN).evidence(GOAL)
    assert abs(z_score(own.log_evidence.exp(), exact)) < 4  # false alarm 6e-5
    torch.testing.assert_close(own.log_potential, GOAL(own.x0))
    assert own.is_program
    assert torch.equal(own.samples["x"], own.x0)
    assert "the program program" in own.target


def test_results_say_what_they_are(tmp_path):
    posterior = steer(kind="max")
    assert posterior.exact
    assert posterior.settings["method"] == "steering"
    assert posterior.settings["seed"] == 1
    assert posterior.ess.shape == (3, 5)
    assert posterior.genealogy().number_of_nodes() == 6 * 16
    posterior.save(tmp_path)
    assert type(posterior).load(tmp_path).target == posterior.target
    assert torch.equal(steer(kind="max").path, posterior.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, "unknown kind='mean'; choose one of difference, max, sum, add"),
        ({"closing": "official"}, "unknown closing='official'"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"interval": (3, 2)}, "1 <= first <= last, got (3, 2)"),
        ({"interval": (0, 2)}, "1 <= first <= last, got (0, 2)"),
        ({"interval": (5, 9)}, "holds no state between the ends of a 5-step chain"),
        ({"twist": None}, "twist=None scores nothing"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        steer(**options)
    assert message in str(error.value)
