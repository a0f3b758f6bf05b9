"""Selections without replacement: the contract, and what their density is against enumeration."""

import math
from itertools import permutations

import pyro
import pytest
import torch
from scipy.stats import chi2

from ppl_diffusion.distributions import PlackettLuce
from ppl_diffusion.testing import DistributionContract

SCORES = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


class TestPlackettLuce(DistributionContract):
    def make_distribution(self):
        return PlackettLuce(torch.randn(4), 2)


class TestBatchOfSelections(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        return PlackettLuce(torch.randn(2, 1, 3), 3, temperature=0.5)


class TestShortRows(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        eligible = torch.tensor([[[True, True, False]], [[True, True, True]]])
        return PlackettLuce(torch.randn(3), torch.tensor([[3], [2]]), eligible=eligible)


class TestOrderOfTheScores(DistributionContract):
    batch_shape = (2,)

    def make_distribution(self):
        return PlackettLuce(torch.randn(2, 4), 2, temperature=0.0)


def by_hand(scores, picks):
    """Sequential normalisation, without replacement."""
    weights, log_p = scores.exp().tolist(), 0.0
    for pick in picks:
        log_p += math.log(weights[pick] / sum(weights))
        weights[pick] = 0.0
    return log_p


def test_log_prob_is_one_pick_after_another():
    for count in range(5):
        for picks in permutations(range(4), count):
            value = torch.tensor(picks, dtype=torch.int64)
            log_p = PlackettLuce(SCORES, count).log_prob(value)
            assert float(log_p) == pytest.approx(by_hand(SCORES, picks), abs=1e-12)


@pytest.mark.parametrize(("count", "tau"), [(1, 1.0), (2, 1.0), (2, 0.5), (4, 2.0)])
def test_the_largest_of_scores_with_gumbel_noise_follow_it(count, tau):
    """Chi-square of 40000 draws over all ordered subsets; false alarm 1e-4 each."""
    law = PlackettLuce(SCORES, count, temperature=tau)
    gumbel = torch.distributions.Gumbel(torch.tensor(0.0).double(), 1.0)
    pyro.set_rng_seed(3)
    noisy = SCORES + tau * gumbel.sample((40_000, 4))
    for draws in (
        noisy.argsort(-1, descending=True)[:, :count],
        law.sample((40_000,), generator=torch.Generator().manual_seed(5)),
    ):
        support = law.enumerate_support()
        counts = (draws[:, None] == support).all(-1).sum(0)
        expected = 40_000 * law.log_prob(support).exp()
        statistic = float(((counts - expected).square() / expected).sum())
        assert chi2.sf(statistic, len(support) - 1) > 1e-4


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_ordered_subsets_sum_to_one(count):
    law = PlackettLuce(SCORES, count)
    assert len(law.enumerate_support()) == math.perm(4, count)
    total = law.log_prob(law.enumerate_support()).exp().sum()
    torch.testing.assert_close(total, torch.ones(()).double(), rtol=0, atol=1e-12)


def test_a_constant_added_to_all_scores_changes_nothing():
    law, moved = PlackettLuce(SCORES, 3), PlackettLuce(SCORES + 700.0, 3)
    support = law.enumerate_support()
    torch.testing.assert_close(law.log_prob(support), moved.log_prob(support), rtol=0, atol=1e-11)


def test_all_positions_leave_all_orders():
    assert len(PlackettLuce(SCORES, 4).enumerate_support()) == math.factorial(4)


def test_low_temperatures_take_the_highest_scores_in_order():
    top = torch.tensor([2, 3])
    cold = [float(PlackettLuce(SCORES, 2, temperature=t).log_prob(top)) for t in (1, 0.1, 0.01)]
    assert cold[0] < cold[1] < cold[2]
    assert cold[2] == pytest.approx(0, abs=1e-12)
    frozen = PlackettLuce(SCORES, 2, temperature=0)
    assert torch.equal(frozen.sample((3,)), top.expand(3, 2))
    assert float(frozen.log_prob(top)) == 0
    assert float(frozen.log_prob(top.flip(0))) == -math.inf


def test_equal_scores_are_taken_from_the_left():
    assert PlackettLuce(torch.zeros(5), 3, temperature=0).sample().tolist() == [0, 1, 2]


def test_positions_that_are_not_eligible_are_never_picked():
    eligible = torch.tensor([True, False, True, True])
    law = PlackettLuce(SCORES, 2, eligible=eligible)
    assert not bool((law.sample((500,)) == 1).any())
    assert float(law.log_prob(torch.tensor([2, 1]))) == -math.inf
    assert float(law.log_prob(torch.tensor([2, 2]))) == -math.inf
    assert float(law.log_prob(torch.tensor([2, -1]))) == -math.inf
    only = PlackettLuce(SCORES[eligible], 2)
    torch.testing.assert_close(
        law.log_prob(torch.tensor([3, 0])), only.log_prob(torch.tensor([2, 0]))
    )


def test_a_row_with_too_few_picks_all_and_ends_in_nobody():
    law = PlackettLuce(SCORES, 3, eligible=torch.tensor([False, True, False, False]))
    assert law.sample().tolist() == [1, -1, -1]
    assert float(law.log_prob(torch.tensor([1, -1, -1]))) == 0
    assert law.picked(law.sample()).tolist() == [False, True, False, False]


def test_the_gradient_in_the_scores_is_that_of_finite_differences():
    scores = SCORES.clone().requires_grad_()
    value = torch.tensor([3, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(s, 4).log_prob(value), scores)
    assert torch.autograd.gradcheck(
        lambda s: PlackettLuce(s, 2, temperature=0.3).log_prob(value[:2]), scores
    )


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((SCORES, 5), {}, "between 0 and the 4 positions"),
        ((SCORES, -1), {}, "between 0 and the 4 positions"),
        ((SCORES, 1.5), {}, "count must be whole"),
        ((SCORES, 2), {"temperature": -1.0}, "temperature must be a finite number"),
        ((SCORES.log(), 2), {"validate_args": True}, "score that is not finite"),
    ],
)
def test_what_is_no_selection_is_refused(arguments, options, text):
    with pytest.raises(ValueError, match=text):
        PlackettLuce(*arguments, **options)


def test_wrong_without_removal():
    """The mutant that picks with replacement is no distribution over ordered subsets."""
    law = PlackettLuce(SCORES, 2)
    with_replacement = SCORES.log_softmax(-1)[law.enumerate_support()].sum(-1).exp().sum()
    assert abs(float(with_replacement) - 1) > 0.1
