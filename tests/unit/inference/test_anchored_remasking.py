"""Which anchors are committed: schedules, temperatures, scores, and the law of the selection."""

import math

import pytest
import torch

from ppl_diffusion.distributions import PlackettLuce
from ppl_diffusion.inference import AnchoredRemasking, QuantisedExpectation
from ppl_diffusion.testing.anchored_toys import measured_toy

TOY = measured_toy()
TOKENS = torch.tensor([[4, 4, 4, 4], [0, 4, 4, 1]])
LOG_D = TOY.denoiser(TOKENS, torch.tensor(1.0))
FOUND = QuantisedExpectation(num_iterations=5)(TOY.potential, TOKENS, LOG_D)


def masks(free, num_steps, schedule="cosine"):
    """How many are masked after each step of a row."""
    remasking, left, counts = AnchoredRemasking(schedule=schedule), torch.tensor([free]), []
    for k in range(1, num_steps + 1):
        left = remasking.num_masked(left, torch.tensor([free]), k, num_steps)
        counts.append(int(left))
    return counts


def test_the_cosine_schedule_is_that_of_the_released_decoder():
    """``max(1, min(|M| - 1, floor(L cos(pi k / 2T))))``, and nothing in the end."""
    left, expected = 64, []
    for k in range(1, 8):
        left = max(1, min(left - 1, math.floor(64 * math.cos(math.pi / 2 * k / 8))))
        expected.append(left)
    assert masks(64, 8) == [*expected, 0]
    assert expected[0] == 62
    assert expected[-1] == 12


def test_every_step_commits_something_until_one_is_left():
    assert masks(4, 4) == [3, 2, 1, 0]
    assert masks(4, 10) == [3, 2, 1, 1, 1, 1, 1, 1, 1, 0]
    assert masks(1, 3) == [1, 1, 0]
    assert masks(0, 3) == [0, 0, 0]
    assert masks(5, 1) == [0]


def test_the_linear_schedule_takes_equal_shares():
    assert masks(12, 4, "linear") == [9, 6, 3, 0]
    assert masks(3, 3, "linear") == [2, 1, 0]


def test_temperatures():
    """The released decoder multiplies one variable by every factor, which falls much faster."""
    product, plain = AnchoredRemasking(noise=2.0), AnchoredRemasking(annealing="linear", noise=2.0)
    assert [plain.temperature(k, 4) for k in (1, 2, 3, 4)] == [1.5, 1.0, 0.5, 0.0]
    expected = [1.5, 0.75, 0.1875, 0.0]
    assert [product.temperature(k, 4) for k in (1, 2, 3, 4)] == expected
    assert AnchoredRemasking(order="random", noise=0.0).temperature(1, 4) > 0


def test_scores():
    log_r, anchors = FOUND.log_r, FOUND.anchors

    def scores(chosen=anchors, **options):
        return AnchoredRemasking(**options).scores(FOUND, chosen, LOG_D)

    own = log_r.gather(-1, anchors[..., None])[..., 0]
    torch.testing.assert_close(scores(), own)
    torch.testing.assert_close(scores(score="max"), log_r.amax(-1))
    r = log_r.exp()
    entropy = -torch.where(r > 0, r * log_r, 0.0).sum(-1)
    torch.testing.assert_close(scores(score="neg-entropy"), -entropy, rtol=0, atol=1e-9)
    before = LOG_D.gather(-1, anchors[..., None])[..., 0]
    torch.testing.assert_close(scores(order="prior"), before.clamp_min(-70))
    averaged = FOUND.log_average.amax(-1)
    torch.testing.assert_close(scores(order="average", score="max"), averaged)
    assert not bool(scores(order="random").any())
    assert bool(scores(chosen=(anchors + 1) % 4).isfinite().all())


def test_the_selection_is_a_law_over_masked_sites():
    remasking, masked = AnchoredRemasking(noise=0.7), TOKENS == 4
    scores = remasking.scores(FOUND, FOUND.anchors, LOG_D)
    law = remasking.selection(scores, masked, masked.sum(-1), 1, 2)
    assert isinstance(law, PlackettLuce)
    assert law.num_picked.tolist() == [2, 1]  # of 4 and 2 free sites, cos(pi / 4) stay
    assert law.temperature == pytest.approx(0.35)
    draws = law.sample((200,))
    assert bool((law.log_prob(draws) > -torch.inf).all())
    assert not bool((law.picked(draws) & ~masked).any())
    last = remasking.selection(scores, masked, masked.sum(-1), 2, 2)
    assert bool((last.picked(last.sample()) == masked).all())


def test_without_noise_the_surest_are_committed():
    remasking = AnchoredRemasking(noise=0.0)
    scores = torch.tensor([[-3.0, -1.0, -2.0, -0.5]])
    masked = torch.tensor([[True, True, True, False]])
    law = remasking.selection(scores, masked, torch.tensor([3]), 1, 2)
    assert law.sample().tolist() == [[1]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"score": "rank"}, "score must be one of anchor, max, neg-entropy"),
        ({"order": "left"}, "order must be one of posterior, average, prior, random"),
        ({"schedule": "square"}, "schedule must be one of cosine, linear"),
        ({"annealing": "none"}, "annealing must be one of product, linear"),
        ({"noise": -1.0}, "noise must be a finite number >= 0"),
    ],
)
def test_what_is_no_option_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        AnchoredRemasking(**options)
