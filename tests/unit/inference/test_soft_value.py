"""Soft-value guidance and learned values: costs, refusals and what a result says."""

import math

import pyro
import pytest
import torch

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC
from ppl_diffusion.inference.value_network import bellman_residuals, fit_value
from ppl_diffusion.potentials import Constraint, Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.testing.oracles import ExactChain, z_score
from ppl_diffusion.testing.toys import toy_chain, toy_potential

CHAIN = toy_chain(length=4, num_steps=5)
GOAL = toy_potential(3, 4)
NEVER = Constraint(lambda x0: torch.ones(x0.shape[:-1]), name="never")
TINY = {"num_paths": 300, "num_updates": 5, "batch_size": 16, "width": 8, "depth": 1}


def guide(potential=GOAL, *, chain=CHAIN, seed=1, **options):
    options = {"num_particles": 8, "num_runs": 3, "num_children": 4, **options}
    return SMC(chain, potential, method="soft-value", **options).run(seed=seed)


def test_all_children_are_rated_and_caching_changes_nothing_else():
    cached, plain = guide(), guide(cache=False)
    assert torch.equal(cached.path, plain.path)
    assert torch.equal(cached.log_evidence, plain.log_evidence)
    # Runs, lineages, children; rounds with five completions each, and the last, which is the end.
    assert plain.num_potential_calls == 3 * 8 * 4 * (3 * 5 + 1)
    assert cached.num_potential_calls < plain.num_potential_calls / 2


def test_a_child_that_equals_its_parent_costs_nothing():
    chain = toy_chain(length=2, num_steps=60)
    posterior = guide(chain=chain, potential=toy_potential(), num_runs=1, num_particles=1)
    changes = int((posterior.path.diff(dim=-2) != 0).any(-1).sum())
    assert changes <= 2
    # At most nine sequences as guesses and nine as results, whatever the number of children.
    assert posterior.num_potential_calls <= 18
    assert posterior.num_evaluations <= 16


def test_children_are_one_flat_batch():
    sizes = []

    def count(x0):
        sizes.append(len(x0))
        return GOAL(x0)

    guide(Potential(count), cache=False)
    assert sizes == [3 * 8 * 4 * 5] * 3 + [3 * 8 * 4]  # four positions, four rounds


def test_one_lineage_has_an_evidence_of_its_own():
    together = guide(ess_threshold=0.0)
    assert not bool(together.resampled.any())
    expected = torch.logsumexp(together.log_weights + together.log_evidence[:, None], -1)
    torch.testing.assert_close(expected, together.log_evidence)


def test_unweighted_results_claim_nothing():
    posterior = guide(weighted=False)
    assert not posterior.exact
    assert posterior.target.startswith("no declared law: one of 4 children was kept at each of 5")
    assert bool(posterior.log_evidence.isnan().all())
    assert bool(posterior.log_evidence_steps.isnan().all())
    assert bool(posterior.evidence_variance.isnan().all())
    torch.testing.assert_close(posterior.log_weights, torch.full((3, 8), -math.log(8)).double())
    torch.testing.assert_close(posterior.log_potential, GOAL(posterior.x0))
    assert not bool(posterior.resampled.any())
    assert posterior.settings["ess_threshold"] == 0.0
    assert "1[G(x0) is largest]" in guide(weighted=False, alpha=0.0).target


@pytest.mark.parametrize("weighted", [True, False])
def test_without_an_allowed_child_a_run_dies_at_the_end(weighted):
    posterior = guide(NEVER, weighted=weighted)
    assert posterior.died_at.tolist() == [4, 4, 4]
    assert bool((posterior.log_evidence == -math.inf).all())


@pytest.mark.parametrize("weighted", [True, False])
def test_forbidden_results_have_no_weight(weighted):
    allowed = Constraint(lambda x0: (x0[..., 0] == x0[..., 1]).double(), name="differ")
    posterior = guide(allowed, weighted=weighted, num_children=2, num_particles=64)
    drawn = posterior.resample(200)["x0"]
    assert bool((drawn[:, 0] != drawn[:, 1]).all())


def test_enormous_potentials_and_cold_choices_stay_finite():
    posterior = guide(1000.0 * GOAL, alpha=0.01, twist="argmax")
    assert bool(posterior.log_evidence.isfinite().all())


def test_a_choice_that_no_number_can_draw_is_not_exact():
    with pytest.warns(UserWarning, match="raise alpha"):
        posterior = guide(alpha=0.05, num_children=8)
    assert not posterior.exact
    assert posterior.target.startswith("approximately p(path) * G(x0)")
    assert "alpha=0.05" in posterior.target
    assert guide(alpha=0.5, num_children=8).exact


def test_children_that_nobody_would_miss_may_be_out_of_reach():
    allowed = Constraint(lambda x0: (x0[..., 0] == x0[..., 1]).double(), name="differ")
    assert guide(allowed, alpha=0.5).exact
    assert guide(100.0 * GOAL).exact  # at alpha=1 what is never drawn has no weight either


def test_weights_that_cannot_undo_the_choice_are_warned_of_once():
    with pytest.warns(UserWarning, match="not 8; raise alpha or use weighted=False") as caught:
        guide(5.0 * GOAL, alpha=0.2)
    assert len(caught) == 1


def test_a_prompt_stays():
    prompt = torch.tensor([-1, 2, -1, 0])
    posterior = guide(chain=toy_chain(length=4, num_steps=5, prompt=prompt))
    assert bool((posterior.path[..., 1] == 2).all())


def program():
    path = pyro.sample("path", CHAIN)
    x = pyro.deterministic("x", CHAIN.x0(path), event_dim=1)
    factor("goal", GOAL, x)


def test_a_program_is_its_own_potential():
    options = {"num_particles": 8, "num_runs": 200, "num_children": 4}
    own = SMC(program, method="soft-value", **options).run(seed=1)
    exact = ExactChain.of(CHAIN).evidence(GOAL)
    assert abs(z_score(own.log_evidence.exp(), exact)) < 4  # false alarm 6e-5
    torch.testing.assert_close(own.log_potential, GOAL(own.x0))
    assert torch.equal(own.samples["x"], own.x0)


def test_a_seed_is_a_result():
    assert torch.equal(guide().path, guide().path)


def test_results_say_what_was_chosen():
    settings = guide(alpha=0.5).settings
    expected = {"method": "soft-value", "num_children": 4, "alpha": 0.5, "weighted": True}
    assert expected.items() <= settings.items()
    assert settings["twist"] == "defensive"
    assert guide(weighted=False).settings["twist"] == "argmax"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_children": 0}, "num_children must be >= 1, got 0"),
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        ({"alpha": math.nan}, "alpha must be a finite number >= 0, got nan"),
        ({"alpha": 0.0}, "use weighted=False"),
        ({"twist": None}, "twist=None promises nothing"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        guide(**options)
    assert message in str(error.value)


# Learned values.


@pytest.mark.parametrize("loss", ["poisson", "itakura", "mean"])
def test_training_lowers_the_loss(loss):
    value = fit_value(CHAIN, GOAL, loss=loss, seed=0, num_paths=500, num_updates=150)
    assert float(value.losses[-10:].mean()) < float(value.losses[:10].mean())
    assert value.num_evaluations > 0
    assert 0 < value.num_potential_calls <= 500
    guide(twist=value)


def test_a_fresh_network_is_the_constant_value():
    value = fit_value(CHAIN, GOAL, seed=0, **{**TINY, "num_updates": 1, "learning_rate": 1e-12})
    tokens = torch.randint(4, (2, 3, 4))
    expected = torch.full((2, 3), value.offset, dtype=torch.float64)
    torch.testing.assert_close(value({"tokens": tokens}, 2), expected, rtol=0, atol=1e-6)


def test_training_is_reproducible_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    one, other = (fit_value(CHAIN, GOAL, seed=3, **TINY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.losses, other.losses)


def test_a_program_can_be_learned_and_plates_add_up():
    value = fit_value(program, seed=0, **TINY)
    tokens = torch.randint(4, (2, 3, 5, 4))
    total = value({"tokens": tokens}, 1)
    torch.testing.assert_close(total, value.log_value(tokens, 1).sum(-1))
    assert total.shape == (2, 3)


def test_residuals_need_paths_and_a_chain_without_memory():
    value = fit_value(CHAIN, GOAL, seed=0, **TINY)
    posterior = guide(twist=value)
    found = bellman_residuals(value, posterior, CHAIN, GOAL, num_children=8)
    assert found.shape == (5,)
    assert bool((found >= 0).all())
    with pytest.raises(ValueError, match="stored no paths"):
        bellman_residuals(value, guide(store_path=False), CHAIN, GOAL)


def test_residuals_refuse_chains_that_remember(monkeypatch):
    value, posterior = fit_value(CHAIN, GOAL, seed=0, **TINY), guide()
    monkeypatch.setattr(CHAIN.kernel, "markov", False)
    with pytest.raises(CapabilityError, match="depends on more than the tokens"):
        bellman_residuals(value, posterior, CHAIN, GOAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "huber"}, "unknown loss='huber'; choose one of poisson, itakura, mean"),
        ({"num_paths": 0}, "must be >= 1"),
        ({"potential": NEVER}, "no path of the chain ended where the potential is above -inf"),
    ],
    ids=["loss", "paths", "never"],
)
def test_impossible_trainings_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        fit_value(CHAIN, **{"potential": GOAL, "seed": 0, **TINY, **options})
    assert message in str(error.value)


def test_a_value_of_another_chain_says_which():
    value = fit_value(CHAIN, GOAL, seed=0, **TINY)
    with pytest.raises(ValueError, match="fitted to 5 steps of length 4, asked about length 3"):
        guide(toy_potential(3, 3), chain=toy_chain(length=3, num_steps=5), twist=value)
    with pytest.raises(ValueError, match="asked about length 4 after 6 steps"):
        guide(chain=toy_chain(length=4, num_steps=7), twist=value)


def test_a_value_of_another_shape_is_told_what_a_state_is():
    with pytest.raises(ValueError, match=r"expected \(3, 32\): .*times their children"):
        guide(twist=lambda carry, k: torch.zeros(3, 8))


def test_a_learned_value_is_asked_where_its_network_lives():
    value = fit_value(toy_chain(), toy_potential(3, 2), num_paths=4, num_updates=1, seed=0)
    value.network.to("meta")  # stands for an accelerator: mixing devices fails here too
    assert value({"tokens": torch.zeros(2, 5, 2, dtype=torch.int64, device="meta")}, 1).is_meta
