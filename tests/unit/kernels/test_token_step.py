"""Single steps: shapes, prompts, reproducible draws, refusals."""

import pytest
import torch

from ppl_diffusion.distributions import TokenStep
from ppl_diffusion.kernels import Absorbing, Uniform
from ppl_diffusion.processes import mixture_log_prob


def step(process=None, fixed=None, batch=(4,), **options):
    process = process or Uniform(3)
    tokens = torch.randint(process.num_states, (*batch, 5))
    log_probs = torch.randn(*batch, 5, 3).log_softmax(-1)
    return TokenStep(process, tokens, log_probs, 0.3, 0.7, fixed=fixed, **options)


@pytest.mark.parametrize("process", [Uniform(3), Absorbing(3)], ids=repr)
def test_log_prob_is_the_sum_over_sites(process):
    d = step(process, kappa=0.8)
    value = d.sample()
    site = mixture_log_prob(process, d.tokens, value, d.log_probs, 0.3, 0.7, 0.8)
    torch.testing.assert_close(d.log_prob(value), site.sum(-1))


def test_draw_is_a_function_of_its_uniforms():
    d = step()
    uniforms = torch.rand(2, 6, 4, 5, dtype=torch.float64)
    assert torch.equal(d.draw(*uniforms), d.draw(*uniforms))
    expanded = d.expand((6, 4)).draw(*uniforms)
    assert torch.equal(expanded, d.draw(*uniforms))


def test_generator_makes_draws_reproducible():
    d = step()
    draws = [d.sample((9,), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_fixed_positions_stay_and_cost_nothing():
    fixed = torch.tensor([True, False, False, True, False])
    d = step(fixed=fixed)
    value = d.sample((50,))
    assert bool((value == d.tokens)[..., fixed].all())
    site = mixture_log_prob(
        d.process, d.tokens.expand_as(value), value, d.log_probs.expand(50, 4, 5, 3), 0.3, 0.7
    )
    torch.testing.assert_close(d.log_prob(value), site[..., ~fixed].sum(-1))
    moved = d.tokens.clone()
    moved[..., 0] = (moved[..., 0] + 1) % 3
    assert bool((d.log_prob(moved) == -torch.inf).all())


def test_gradient_reaches_the_denoiser_not_the_samples():
    log_probs = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1).requires_grad_()
    d = TokenStep(Uniform(3), torch.zeros(5).long(), log_probs, 0.3, 0.7)
    value = d.sample((100,))
    assert not value.requires_grad
    d.log_prob(value).sum().backward()
    assert float(log_probs.grad.abs().sum()) > 0


def test_score_has_mean_zero():
    """``E[d log p] = 0`` along a direction in logit space: 4 s.e. (6e-5)."""
    logits = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    direction = torch.randn(2, 3, dtype=torch.float64)
    n = 20_000

    def log_p(shift):
        moved = (logits + shift[:, None, None] * direction).log_softmax(-1)
        return TokenStep(Absorbing(3), torch.tensor([3, 3]), moved, 0.2, 0.6)

    shift = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        value = log_p(shift).sample()
    (score,) = torch.autograd.grad(log_p(shift).log_prob(value).sum(), shift)
    assert abs(float(score.mean() / (score.std() / n**0.5))) < 4
    assert float(score.std()) > 0.1


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        ((0.7, 0.3), "need 0 <= alpha_t <= alpha_s <= 1"),
        ((-0.1, 0.3), "need 0 <= alpha_t"),
        ((0.5, 1.1), "need 0 <= alpha_t"),
        ((float("nan"), 0.5), "need 0 <= alpha_t"),
    ],
)
def test_bad_levels(levels, text):
    with pytest.raises(ValueError, match=text):
        TokenStep(Uniform(3), torch.zeros(5).long(), torch.zeros(5, 3), *levels)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"log_probs must end in \(5, 3\), got \(5, 4\)"):
        TokenStep(Uniform(3), torch.zeros(5).long(), torch.zeros(5, 4), 0.3, 0.7)
    with pytest.raises(ValueError, match=r"must end in shape|must match event_shape"):
        step().log_prob(torch.zeros(4, 6))
    d = step()
    d._validate_args = False
    with pytest.raises(ValueError, match=r"must end in shape \(5,\), got \(4, 6\)"):
        d.log_prob(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="does not broadcast with batch shape"):
        d.log_prob(torch.zeros(3, 5))


def test_long_sequences_are_not_enumerated():
    with pytest.raises(NotImplementedError, match=r"3\*\*30 values"):
        TokenStep(
            Uniform(3), torch.zeros(30).long(), torch.zeros(30, 3).log_softmax(-1), 0.3, 0.7
        ).enumerate_support()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kappa": 2.0}, "kappa must be at most 1"),
        ({"kappa": torch.nan}, "kappa must be at most 1"),
        ({"kappa": -9.0}, "kappa must be at most 1"),
        ({"log_probs": torch.zeros(2, 3)}, "log_probs must hold normalised"),
        ({"log_probs": torch.full((2, 3), torch.nan)}, "log_probs must hold normalised"),
        ({"tokens": torch.tensor([0, 7])}, r"tokens must be states 0\.\.2, got 0\.\.7"),
    ],
)
def test_arguments_are_validated_where_validation_is_on(change, text):
    flat = torch.zeros(2, 3).log_softmax(-1)
    given = {"tokens": torch.tensor([0, 1]), "log_probs": flat, "kappa": 1.0, **change}
    tokens, log_probs, kappa = given.values()
    with pytest.raises(ValueError, match=text):
        TokenStep(Uniform(3), tokens, log_probs, 0.3, 0.7, kappa)
    TokenStep(Uniform(3), tokens, log_probs, 0.3, 0.7, kappa, validate_args=False)
