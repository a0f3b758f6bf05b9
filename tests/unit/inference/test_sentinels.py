"""What a look-ahead costs, as draws that are never resampled see it."""

import math

import pytest
import torch

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, methods
from ppl_diffusion.inference.sentinels import lookahead_cost
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing import toy_chain, toy_markov_chain, toy_potential


def log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def test_the_cost_by_hand():
    """Two states of probability one half; the look-ahead drops the one that pays."""
    log_g, log_h, base = log(3.0, 1.0), log(0.01, 1.0), log(1.0, 1.0)
    # Effective share before: (1.01 / 2)^2 / (1.0001 / 2) = .51; E[h] = .505, E[G^2 / h] = 450.5
    expected = 0.505 * 450.5 / 5.0
    assert lookahead_cost([log_h], log_g, base, threshold=0.52) == pytest.approx(expected)
    assert lookahead_cost([log_h], log_g, base, threshold=0.5) == 0.0
    # Draws stand for more or less of the chain's own law where they were proposed.
    tilted = lookahead_cost([log_h], log_g, log(0.5, 1.5), threshold=0.9)
    mean_h, mean_gg, mean_g2 = (0.005 + 1.5) / 2, (450.0 + 1.5) / 2, (4.5 + 1.5) / 2
    assert tilted == pytest.approx(mean_h * mean_gg / mean_g2)


def test_a_second_look_is_held_against_the_first():
    """The failing twin forgets that the population follows the first look already."""
    log_g, base, first = log(1.0, 1.0), log(1.0, 1.0), log(0.1, 1.9)
    once = lookahead_cost([first], log_g, base, threshold=0.9)
    assert once == pytest.approx((1 / 0.1 + 1 / 1.9) / 2)
    nearly_same = log(0.09, 1.91)  # steeper, and nothing to resample for
    assert lookahead_cost([first, nearly_same], log_g, base, threshold=0.9) == pytest.approx(once)
    assert lookahead_cost([nearly_same], log_g, base, threshold=0.9) > once


def test_a_floor_bounds_the_cost():
    """At most one over the floor, here 5, whatever completions guess; without one, no bound."""
    chain = toy_chain(length=3, num_steps=3, seed=3)
    log_g = toy_potential(length=3, scale=8.0, seed=2)

    def cost(twist):
        one = SMC(chain, log_g, twist=twist, method="smc", num_particles=8, num_sentinels=256)
        return one.run(seed=0).settings["lookahead"]["cost"]

    assert 0 < cost("defensive") <= 5.0 + 1e-9
    assert cost("argmax") > 5.0


@pytest.mark.parametrize(("cost", "fires"), [(5.0, False), (5.1, True), (math.inf, True)])
def test_the_verdict(make_posterior, cost, fires):
    from dataclasses import replace

    from ppl_diffusion.smc.question_rules import lookahead

    settings = {"lookahead": {"cost": cost, "sentinels": 64}, "twist": "argmax"}
    verdict = lookahead(replace(make_posterior(), settings=settings))
    assert (verdict is not None) == fires
    if fires:
        assert (verdict.kind, verdict.level, verdict.limit) == ("lookahead", "weak", 5.0)
    assert lookahead(make_posterior()) is None


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if cls.needs.any_target])
def test_every_method_that_resamples_along_the_chain_has_sentinels(name):
    chain, log_g = toy_markov_chain(length=4, num_steps=4), toy_potential(length=4)
    options = {"method": name, "num_particles": 8, "num_runs": 2}
    if name == "tempering":
        with pytest.raises(CapabilityError, match="sentinels"):
            SMC(chain, log_g, num_sentinels=16, **options)
        return
    plain = SMC(chain, log_g, **options).run(seed=0)
    watched = SMC(chain, log_g, num_sentinels=16, **options).run(seed=0)
    assert torch.equal(plain.log_weights, watched.log_weights)  # they come after the run
    assert watched.num_evaluations >= plain.num_evaluations
    assert watched.settings["lookahead"]["sentinels"] == 16


def test_a_potential_that_none_of_them_meets_says_nothing():
    never = Potential(lambda x0: torch.full(x0.shape[:-1], -torch.inf).double())
    one = SMC(toy_markov_chain(), never, num_particles=4, num_sentinels=4).run(seed=0)
    assert one.settings["lookahead"]["cost"] == 0.0


def test_their_number_is_checked():
    with pytest.raises(ValueError, match="num_sentinels must be >= 0 and whole, got -1"):
        SMC(toy_markov_chain(), toy_potential(), num_sentinels=-1)
