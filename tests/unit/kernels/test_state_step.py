"""Steps given as a table over states: density, draws, fixed positions, refusals."""

import pytest
import torch

from ppl_diffusion.distributions import StateStep, TokenStep
from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.testing import all_states, chi_square_p_value, state_index

TOKENS = torch.tensor([2, 0, 1])
FIXED = torch.tensor([False, True, False])
STATES = all_states(4, 3)


def table(*batch, seed=0):
    """Return unnormalised log-weights with one impossible state."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, 3, 4, generator=generator, dtype=torch.float64)
    logits[..., 0, 3] = -torch.inf
    return logits


@pytest.mark.parametrize("fixed", [None, FIXED])
def test_density_is_the_product_of_normalised_rows(fixed):
    d = StateStep(table() + 7.0, tokens=TOKENS, fixed=fixed)
    rows = table().softmax(-1)
    if fixed is not None:
        rows[1] = torch.tensor([1.0, 0, 0, 0])
    law = rows[0][STATES[:, 0]] * rows[1][STATES[:, 1]] * rows[2][STATES[:, 2]]
    torch.testing.assert_close(d.log_prob(STATES).exp(), law, rtol=0, atol=1e-12)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(d.log_prob(STATES) == -torch.inf, law == 0)
    torch.testing.assert_close(d.dense_log_probs().exp(), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fixed", [None, FIXED])
def test_samples_follow_the_density(fixed):
    """Chi-square of level 1e-4, also for a batch of two whose rows must not be swapped."""
    d = StateStep(table(2), tokens=TOKENS, fixed=fixed)
    drawn = d.sample((20_000,))
    law = d.log_prob(STATES[:, None]).exp()
    for row in (0, 1):
        counts = torch.bincount(state_index(drawn[:, row], 4), minlength=64)
        assert chi_square_p_value(counts, law[:, row]) > 1e-4
        assert chi_square_p_value(counts, law[:, 1 - row]) < 1e-12


@pytest.mark.parametrize("process", [Absorbing(3), Uniform(4)], ids=repr)
@pytest.mark.parametrize("fixed", [None, FIXED])
def test_a_mixture_written_as_a_table_is_the_same_law(process, fixed):
    log_c = torch.randn(5, 3, process.vocab_size, dtype=torch.float64).log_softmax(-1)
    tokens = torch.randint(4, (5, 3))
    mixture = TokenStep(process, tokens, log_c, 0.2, 0.6, 0.8, fixed=fixed)
    dense = StateStep(mixture.dense_log_probs(), tokens=tokens, fixed=fixed)
    values = STATES[:, None].expand(64, 5, 3)
    torch.testing.assert_close(dense.log_prob(values), mixture.log_prob(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense.dense_log_probs(), mixture.dense_log_probs())


def test_draw_is_a_function_of_its_uniforms():
    d = StateStep(table(5), tokens=TOKENS, fixed=FIXED)
    noise = torch.rand(7, 5, 3, dtype=torch.float64)
    drawn = d.draw(noise)
    assert torch.equal(d.draw(noise), drawn)
    assert torch.equal(d.expand((7, 5)).draw(noise), drawn)
    assert bool((drawn[..., 1] == 0).all())


def test_gradient_reaches_the_table_and_not_the_fixed_sites():
    logits = table().requires_grad_()
    d = StateStep(logits, tokens=TOKENS, fixed=FIXED)
    assert d.wants_gradient
    assert not StateStep(table(), tokens=TOKENS).wants_gradient
    value = torch.tensor([[2, 0, 1], [3, 0, 1], [2, 1, 1]])
    log_p = d.log_prob(value)
    assert (log_p == -torch.inf).tolist() == [False, True, True]
    torch.where(log_p > -torch.inf, log_p, 0.0).sum().backward()
    expected = -table().softmax(-1)
    expected[0, 2] += 1
    expected[2, 1] += 1
    expected[1] = 0
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


def test_bad_tables():
    with pytest.raises(ValueError, match=r"shape \(3, 4\) do not fit 2 sites"):
        StateStep(table(), tokens=TOKENS[:2])
    for wrong in (torch.nan, -torch.inf):
        rows = table()
        rows[1] = wrong
        with pytest.raises(ValueError, match="no possible next state, or a NaN"):
            StateStep(rows, tokens=TOKENS)
    with pytest.raises(ValueError, match=r"must end in shape \(3,\), got \(2,\)"):
        StateStep(table(), tokens=TOKENS, validate_args=False).log_prob(torch.zeros(2))


@pytest.mark.parametrize("large", [True, False])
def test_infer_shapes(large):
    tokens = (2, 1, 6) if large else (6,)
    batch, event = StateStep.infer_shapes((3, 6, 5), tokens)
    assert (batch, event) == (((2, 3) if large else (3,)), (6,))
