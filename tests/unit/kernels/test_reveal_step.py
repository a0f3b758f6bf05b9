"""Steps that reveal a given number of positions: density, draws, subsets, refusals."""

import math

import pytest
import torch

from ppl_diffusion.denoisers.prediction import HeadPrediction
from ppl_diffusion.distributions import RevealStep
from ppl_diffusion.testing import all_states, chi_square_p_value, state_index

MASK = 3
TOKENS = torch.tensor([MASK, 1, MASK, MASK])
ELIGIBLE = torch.tensor([True, True, True, False])
STATES = all_states(4, 4)


def table(*batch, sites=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, sites, 3, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def step(count=1, **options):
    return RevealStep(TOKENS, table(), ELIGIBLE, count, **options)


def brute_force(count, chosen_sets=None):
    """Return the law over :data:`STATES`, by listing subsets and tokens."""
    free = [0, 2]  # eligible and masked
    count = min(count, len(free))
    subsets = chosen_sets or [s for s in ([], [0], [2], [0, 2]) if len(s) == count]
    law = torch.zeros(len(STATES), dtype=torch.float64)
    for subset in subsets:
        for tokens in all_states(3, len(subset)) if subset else [[]]:
            state, p = TOKENS.clone(), 1 / len(subsets)
            for site, token in zip(subset, tokens, strict=True):
                state[site], p = token, p * float(table()[site, token].exp())
            law[state_index(state, 4)] += p
    return law


@pytest.mark.parametrize("count", [1, 2, 5])
def test_density_against_a_list_of_subsets(count):
    d = step(count)
    law = d.log_prob(STATES).exp()
    torch.testing.assert_close(law, brute_force(count), rtol=0, atol=1e-12)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert int(d.num_revealed) == min(count, 2)


def test_an_order_decides_with_certainty():
    order = torch.tensor([0.2, 0.9, 0.7, 0.8], dtype=torch.float64)
    d = step(order=order)
    law = d.log_prob(STATES).exp()
    torch.testing.assert_close(law, brute_force(1, [[2]]), rtol=0, atol=1e-12)
    assert bool((d.sample((100,)) != TOKENS).any(0).eq(torch.tensor([0, 0, 1, 0])).all())


@pytest.mark.parametrize("count", [1, 2])
def test_samples_follow_the_density(count):
    """Chi-square of level 1e-4; which of two positions is open, so a fixed choice fails."""
    d = step(count)
    drawn = d.sample((20_000,))
    counts = torch.bincount(state_index(drawn, 4), minlength=len(STATES))
    assert chi_square_p_value(counts, brute_force(count)) > 1e-4
    fixed_choice = step(count, order=torch.rand(4, dtype=torch.float64)).sample((20_000,))
    counts = torch.bincount(state_index(fixed_choice, 4), minlength=len(STATES))
    if count == 1:
        assert chi_square_p_value(counts, brute_force(count)) < 1e-12


def test_nothing_eligible_stays():
    for d in (
        RevealStep(torch.tensor([0, 1]), table(sites=2), torch.ones(2).bool(), 1),
        RevealStep(torch.tensor([MASK, 1]), table(sites=2), torch.zeros(2).bool(), 1),
        RevealStep(
            torch.tensor([MASK, 1]),
            table(sites=2),
            torch.ones(2).bool(),
            1,
            fixed=torch.tensor([True, True]),
        ),
    ):
        assert torch.equal(d.sample(), d.tokens)
        assert float(d.log_prob(d.tokens)) == 0
        law = d.log_prob(d.enumerate_support()).exp()
        assert float(law.sum()) == 1


def test_fixed_positions_are_not_chosen():
    d = RevealStep(
        torch.tensor([MASK, MASK]),
        table(sites=2),
        torch.ones(2).bool(),
        1,
        fixed=torch.tensor([True, False]),
    )
    assert bool((d.sample((100,))[:, 0] == MASK).all())
    moved = torch.tensor([[0, MASK], [MASK, 0], [MASK, MASK]])
    expected = [-math.inf, float(table(sites=2)[1, 0]), -math.inf]
    assert d.log_prob(moved).tolist() == pytest.approx(expected)


def test_rows_have_eligible_positions_of_their_own():
    tokens = torch.tensor([[MASK, MASK, MASK], [0, MASK, 1], [0, 1, 2]])
    d = RevealStep(tokens, table(3, sites=3), torch.ones(3).bool(), 2)
    assert d.num_revealed.tolist() == [2, 1, 0]
    drawn = d.sample((200,))
    assert torch.equal((drawn != tokens).sum(-1), d.num_revealed.expand(200, 3))
    for row in range(3):
        alone = RevealStep(tokens[row], table(3, sites=3)[row], torch.ones(3).bool(), 2)
        torch.testing.assert_close(d.log_prob(drawn)[:, row], alone.log_prob(drawn[:, row]))


def test_draw_is_a_function_of_its_uniforms():
    d = RevealStep(TOKENS.expand(5, 4), table(5), ELIGIBLE, 1)
    noise = torch.rand(2, 7, 5, 4, dtype=torch.float64)
    drawn = d.draw(*noise)
    assert torch.equal(d.draw(*noise), drawn)
    assert torch.equal(d.expand((7, 5)).draw(*noise), drawn)
    # the highest of the eligible uniforms is revealed
    site = torch.where(noise[0, ..., 0] > noise[0, ..., 2], 0, 2)
    assert torch.equal((drawn != TOKENS).long().argmax(-1), site)


def test_hidden_states_give_the_same_step():
    """Same uniforms, same states; the head sees the drawn and the scored positions only."""
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return hidden[..., :3].log_softmax(-1)

    hidden = torch.cat([table(6), torch.zeros(6, 4, 1)], -1)
    dense = RevealStep(TOKENS.expand(6, 4), table(6), ELIGIBLE, 1)
    sparse = RevealStep(TOKENS.expand(6, 4), HeadPrediction(hidden, head, 3), ELIGIBLE, 1)
    noise = torch.rand(2, 8, 6, 4, dtype=torch.float64)
    drawn = sparse.draw(*noise)
    assert sum(rows) == 8 * 6
    assert torch.equal(drawn, dense.draw(*noise))
    rows.clear()
    log_p = sparse.log_prob(drawn)
    assert sum(rows) == 8 * 6
    torch.testing.assert_close(log_p, dense.log_prob(drawn), rtol=0, atol=1e-12)
    rows.clear()
    assert bool((sparse.log_prob(torch.zeros(4)) == -torch.inf).all())
    assert sum(rows) == 0


def test_gradient_of_possible_and_impossible_moves():
    logits = table().clone().requires_grad_()
    moved = torch.tensor([[2, 1, MASK, MASK], [0, 0, 0, 0]])
    d = RevealStep(TOKENS, logits.log_softmax(-1), ELIGIBLE, 1)
    log_p = d.log_prob(moved)
    assert log_p[1] == -torch.inf
    torch.where(log_p > -torch.inf, log_p, 0.0).sum().backward()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[0] = -logits.detach()[0].softmax(-1)
    expected[0, 2] += 1
    torch.testing.assert_close(logits.grad, expected)
    assert d.wants_gradient
    assert not step().wants_gradient


def test_a_token_of_probability_zero_is_impossible():
    certain = torch.tensor([0.0, -torch.inf, -torch.inf]).expand(4, 3).clone().requires_grad_()
    d = RevealStep(TOKENS, certain, ELIGIBLE, 1)
    log_p = d.log_prob(torch.tensor([[0, 1, MASK, MASK], [1, 1, MASK, MASK]]))
    assert log_p.tolist() == pytest.approx([-math.log(2), -math.inf])
    log_p.masked_fill(log_p == -torch.inf, 0.0).sum().backward()
    assert not bool(torch.isnan(certain.grad).any())
    assert bool((d.sample((200,)).masked_fill(TOKENS != MASK, 0) % MASK == 0).all())


def test_states_that_do_not_exist_are_impossible():
    d = step(validate_args=False)
    wrong = torch.tensor([[-1, 1, MASK, MASK], [4, 1, MASK, MASK], [MASK, 1, 99, MASK]])
    assert d.log_prob(wrong).tolist() == [-torch.inf] * 3


def test_with_log_probs_keeps_the_rest():
    order, fixed = torch.rand(4, dtype=torch.float64), torch.tensor([True, False, False, False])
    d = step(2, order=order, fixed=fixed).with_log_probs(table(seed=1))
    assert (d.count, d.batch_shape) == (2, ())
    torch.testing.assert_close(d.log_probs, table(seed=1))
    same = RevealStep(TOKENS, table(seed=1), ELIGIBLE, 2, order=order, fixed=fixed)
    torch.testing.assert_close(d.log_prob(STATES), same.log_prob(STATES))


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"log_probs of shape \(5, 3\) are not for 4 sites"):
        RevealStep(TOKENS, table(sites=5), ELIGIBLE, 1)


@pytest.mark.parametrize("large", [True, False])
def test_infer_shapes(large):
    tokens = (2, 1, 6) if large else (6,)
    batch, event = RevealStep.infer_shapes(tokens, (3, 6, 5), (6,))
    assert (batch, event) == (((2, 3) if large else (3,)), (6,))
