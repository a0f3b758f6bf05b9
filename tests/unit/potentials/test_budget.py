"""A budget ends look-aheads and never final values, so that weights stay right."""

import pytest
import torch

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.inference import SMC
from ppl_diffusion.potentials import Potential, Reward, Threads
from ppl_diffusion.potentials.budget import BudgetSpent
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.smc import ArgmaxFill, PersistentFill
from ppl_diffusion.testing import all_states
from ppl_diffusion.testing.toys import toy_chain, toy_potential

TWISTS = [ArgmaxFill(), PersistentFill(2, late=True)]
ROWS = torch.arange(12)[:, None].expand(-1, 3)


def first_token(x0):
    return x0[:, 0].double()


def picky(x0):
    if bool((x0[:, 0] % 2 == 1).any()):
        raise RuntimeError("no odd ones")
    return first_token(x0)


class TestLookAheads:
    def test_beyond_the_budget_they_get_the_mean_of_what_is_known(self):
        reward = Reward(first_token, 0.5, budget=10, reserve=4)
        assert reward.lookahead(ROWS[:4]).tolist() == [0.0, 2.0, 4.0, 6.0]
        found = reward.lookahead(ROWS[[1, 4, 5, 6, 7]])
        assert found[0] == 2.0
        assert reward.num_calls == 6
        new = [value for value in found[1:].tolist() if value in (8.0, 10.0, 12.0, 14.0)]
        assert len(new) == 2
        mean = (0 + 2 + 4 + 6 + 2 + sum(new)) / 7
        assert sum(value == pytest.approx(mean) for value in found[1:].tolist()) == 2

    def test_what_is_cached_is_free(self):
        reward = Reward(first_token, budget=5, reserve=1)
        reward.lookahead(ROWS[:4])
        assert reward.lookahead(ROWS[:4]).tolist() == [0.0, 1.0, 2.0, 3.0]
        assert reward(ROWS[:5]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert reward.num_calls == 5

    def test_calls_begun_early_keep_to_it(self):
        with Threads(2) as pool:
            reward = Reward(first_token, budget=6, reserve=3, executor=pool)
            reward.prefetch(ROWS)
            assert reward.num_calls == 3
            reward.lookahead(ROWS)
            assert reward.num_calls == 3

    def test_repetitions_after_a_failure_count(self):
        reward = Reward(picky, budget=9, reserve=1, on_error="reject")
        reward.lookahead(ROWS[:6])  # six together, then two alone
        assert reward.num_calls == 8
        reward = Reward(picky, budget=5, reserve=1, on_error="reject", retries=9, batch_size=1)
        reward.lookahead(ROWS[1:2])
        assert reward.num_calls == 4
        assert reward.num_failures == 0  # it may still turn out well
        reward(ROWS[1:2])
        assert reward.num_calls == 5
        assert reward.num_failures == 1


class TestFinalValues:
    def test_what_cannot_be_paid_is_one_sentence(self):
        reward = Reward(first_token, budget=6, reserve=4)
        reward.lookahead(ROWS)
        with pytest.raises(BudgetSpent) as caught:
            reward(ROWS)
        assert str(caught.value) == (
            "first_token has spent its budget of 6 sequences, of which 4 were kept back: 6 final "
            "sequences have no value; give a larger budget, or keep more back with reserve= "
            "(particles times runs, and what retries take)."
        )
        assert reward.num_calls == 2

    def test_a_batch_that_fails_may_cost_too_much(self):
        reward = Reward(picky, budget=8, reserve=0, on_error="reject")
        with pytest.raises(BudgetSpent, match="4 final sequences have no value"):
            reward(ROWS[:6])

    def test_somebody_has_to_say_what_they_need(self):
        reward = Reward(first_token, budget=10)
        with pytest.raises(PotentialError) as caught:
            reward.lookahead(ROWS)
        assert str(caught.value) == (
            "first_token has a budget of 10 sequences, and nobody said how many of them final "
            "values need; pass reserve= (particles times runs)."
        )
        (reward * 2.0 + Potential(first_token)).keep_back(7)
        reward.lookahead(ROWS)
        assert reward.num_calls == 3
        given = Reward(first_token, budget=10, reserve=9)
        given.keep_back(2)
        given.lookahead(ROWS)
        assert given.num_calls == 1

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"budget": 0}, "budget must be a whole number, at least 1, got 0"),
            ({"budget": 3, "reserve": -1}, "reserve must be a whole number, at least 0, got -1"),
            ({"reserve": 3}, "reserve=3 needs the budget it is part of"),
        ],
    )
    def test_bad_options_are_one_sentence(self, options, text):
        with pytest.raises(ValueError, match=text):
            Reward(first_token, **options)


def test_the_ledger_says_that_look_aheads_ended():
    with watch_failures() as watched:
        reward = Reward(first_token, budget=8, reserve=2)
        reward.lookahead(ROWS[:6])
    told = watched.work()["first_token"]["budget"]
    assert told == {"sequences": 8, "reserve": 2, "guessed": 0, "ended_look_aheads": False}
    with watch_failures() as watched:
        reward.lookahead(ROWS)
    told = watched.work()["first_token"]["budget"]
    assert told == {"sequences": 8, "reserve": 2, "guessed": 6, "ended_look_aheads": True}


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize(
    "twist", [ArgmaxFill(), PersistentFill(2, late=True)], ids=lambda t: t.name
)
def test_the_evidence_is_unbiased_where_the_budget_ends_on_the_way(process, twist):
    """Within 4 standard errors of 150 independent questions: false alarm 6e-5 each, 2.4e-4 in all.

    27 sequences exist, so that as many are kept back; 4 may be looked at ahead, of some 20 wishes.
    """
    chain, tilt = toy_chain(process, length=3, num_steps=4), toy_potential(length=3, scale=1.5)
    x0 = all_states(3, 3)
    z = float(torch.logsumexp(chain.marginal().log_prob(x0) + tilt(x0), 0).exp())
    options = {"twist": twist, "num_particles": 4, "num_runs": 8, "ess_threshold": 0.9}
    estimates = []
    for seed in range(150):
        reward = Reward(tilt.fn, budget=31, reserve=27)
        posterior = SMC(chain, reward, **options).run(seed=seed)
        (told,) = posterior.settings["rewards"].values()
        assert told["budget"]["ended_look_aheads"]
        assert told["asked"] <= 31
        estimates.append(posterior.log_evidence.exp().mean())
    found = torch.stack(estimates)
    assert abs(float(found.mean()) - z) < 4 * float(found.std()) / len(found) ** 0.5


def test_refinement_leaves_its_moves_out_where_the_budget_ends():
    """The particles and the evidence are those of the inner method, to the bit."""
    chain, worth = toy_chain(vocab_size=3, length=4, num_steps=4), toy_potential(3, 4)

    def run(method, budget):
        kept = {} if budget is None else {"budget": budget, "reserve": 0}
        reward = Reward(lambda x0: worth(x0), name="r", **kept)
        return SMC(chain, reward, method=method, num_particles=8, num_runs=2).run(seed=0)

    whole = run("refinement", None)
    assert whole.settings["num_sweeps"] > 0
    spent = whole.settings["rewards"]["r"]["asked"]
    inner = run("smc", None)
    used = inner.settings["rewards"]["r"]["asked"]
    assert used + 2 < spent
    with pytest.warns(UserWarning, match="spent before the moves of refinement were made"):
        cut = run("refinement", used + 1)
    assert cut.settings["num_sweeps"] == 0
    assert torch.equal(cut.x0, inner.x0)
    assert torch.equal(cut.log_weights, inner.log_weights)
    assert torch.equal(cut.log_evidence, inner.log_evidence)
    assert "sweep" not in cut.target
    assert "sweep" in whole.target
    assert run("refinement", spent).target == whole.target
