"""Anchored moves: their distributions, options, refusals, look-ahead, and what results say."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ppl_diffusion.distributions import PlackettLuce, ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import (
    SMC,
    AnchoredProposal,
    AnchoredSMC,
    Guidance,
    QuantisedExpectation,
    Refinement,
    Remask,
    TiltedTokens,
)
from ppl_diffusion.inference.anchored_guidance import stay_probability
from ppl_diffusion.inference.anchored_steps import (
    IndependentStep,
    PolicyStep,
    log_subset_prob,
    pick_law,
    values_move,
)
from ppl_diffusion.inference.anchored_twist import moment_lookahead
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel, RevealStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.smc import OrderRefresh, ParticlePosterior
from ppl_diffusion.testing import DistributionContract, all_states, toy_chain
from ppl_diffusion.testing.anchored_toys import CODES, averages, measured_toy

TOY = measured_toy()
MASK = 4
TOKENS = torch.tensor([MASK, 1, MASK, MASK])


def table(*batch, sites=4, size=4):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(*batch, sites, size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def ordered(**options):
    kernel = OrderedKernel(TOY.process, TOY.denoiser, length=4, **options)
    return ReverseChain(kernel, 4)


def on_a_grid(**options):
    options = {"num_steps": 4} | options
    return ReverseChain(InterpolatingKernel(TOY.process, TOY.denoiser, **options), 4)


# The steps.


class TestIndependentStep(DistributionContract):
    batch_shape = (2, 1)

    def make_distribution(self):
        stay = torch.tensor([[[0.2, 0.5, 0.0]], [[0.7, 0.1, 0.4]]], dtype=torch.float64)
        tokens = torch.tensor([[[2, 0, 2]], [[2, 2, 1]]])
        return IndependentStep(tokens, table(2, 1, sites=3, size=2), stay)


class TestPolicyStep(DistributionContract):
    batch_shape = (2,)

    def make_distribution(self):
        tokens = torch.tensor([[2, 2, 2], [2, 0, 2]])
        scores = torch.tensor([[0.3, -1.0, 2.0], [0.0, 5.0, 1.0]], dtype=torch.float64)
        return PolicyStep(tokens, table(2, sites=3, size=2), tokens == 2, scores, 2)


def test_a_fixed_site_stays():
    fixed = torch.tensor([True, False, False, False])
    step = IndependentStep(TOKENS, table(), torch.full((4,), 0.1).double(), fixed=fixed)
    assert bool((step.sample((200,))[:, 0] == MASK).all())
    value = torch.tensor([0, 1, 2, 3])
    assert float(step.log_prob(value)) == -math.inf


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_subset_sums_over_the_orders_of_its_picks(count):
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    law = PlackettLuce(scores, count)
    picks = law.enumerate_support()
    chosen = law.picked(picks)
    whole = torch.zeros(16, dtype=torch.float64)
    index = (chosen * 2 ** torch.arange(4)).sum(-1)
    whole.index_add_(0, index, law.log_prob(picks).exp())
    ours = log_subset_prob(scores, torch.ones(4, dtype=torch.bool), chosen, count).exp()
    torch.testing.assert_close(ours, whole[index], rtol=0, atol=1e-12)


def test_too_many_reveals_at_once_have_no_density():
    tokens = torch.full((13,), 2)
    scores = torch.zeros(13, dtype=torch.float64)
    step = PolicyStep(tokens, table(sites=13, size=2), tokens == 2, scores, 13)
    with pytest.raises(ValueError, match="reveal at most 12"):
        step.log_prob(step.sample())


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_picks_are_a_mixture_with_uniform_ones(delta):
    conf = torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
    left = torch.tensor([True, True, False])
    own = torch.tensor([1.0, math.exp(3.0)]) / (1 + math.exp(3.0))
    law = pick_law(conf, left, delta).exp()
    expected = (1 - delta) * own + delta / 2
    torch.testing.assert_close(law[:2], expected.double(), rtol=1e-6, atol=0)
    assert float(law[2]) == 0.0


def test_values_are_weighed_by_tokens_and_by_picks():
    step = RevealStep(TOKENS.expand(300, 4), table().expand(300, 4, 4), TOKENS == MASK, 2)
    log_c, delta = torch.roll(table(), 1, -1).expand(300, 4, 4), 0.4
    picked = values_move(step, log_c, log_c, delta)
    changed = picked.value != step.tokens
    assert changed.sum(-1).tolist() == [2] * 300
    value = picked.value.clamp_max(3)[..., None]
    ratio = (step.log_probs - log_c).gather(-1, value)[..., 0]
    expected = torch.where(changed, ratio, 0.0).sum(-1)
    torch.testing.assert_close(picked.log_tokens, expected, rtol=0, atol=1e-12)
    bound = 2 * math.log(1 / delta)  # no pick is rarer than delta times a uniform one
    assert bool((picked.log_order <= bound + 1e-9).all())


def test_sure_sites_open_rather():
    step = TokenStep(TOY.process, TOKENS, table(), 0.2, 0.5)
    scores = torch.tensor([0.0, 9.0, -0.5, -4.0], dtype=torch.float64)
    model = (1 - 0.5) / (1 - 0.2)
    stay = stay_probability(step, scores, 1.0)
    assert float(stay[0]) < model < float(stay[3]) < 1.0
    odds = (stay / (1 - stay)).log() - math.log(model / (1 - model))
    assert float(odds[[0, 2, 3]].abs().max()) <= 1.0 + 1e-12
    level = stay_probability(step, scores, math.inf)
    torch.testing.assert_close(level[[0, 2, 3]], torch.full((3,), model).double())
    last = TokenStep(TOY.process, TOKENS, table(), 0.5, 1.0)
    assert stay_probability(last, scores, 1.0).tolist() == [0.0] * 4


# The look-ahead.


def test_moments_of_what_is_finished_are_the_likelihood():
    rows = TOY.states[::17]
    found = moment_lookahead(TOY.potential, rows, TOY.denoiser(rows, 1.0))
    torch.testing.assert_close(found, TOY.potential(rows), rtol=0, atol=1e-12)


def test_moments_of_a_linear_measurement_by_enumeration():
    """Mean and covariance of ``A(C x)`` under the product of a table's sites."""
    tokens = torch.tensor([[MASK, 2, MASK, MASK]])
    log_d = TOY.denoiser(tokens, 1.0)
    site = log_d[0].exp()
    site[1] = torch.eye(4, dtype=torch.float64)[2]
    p = site[torch.arange(4), TOY.states].prod(-1)
    values = averages(CODES[TOY.states])
    mean = p @ values
    cov = torch.einsum("s,sa,sb->ab", p, values - mean, values - mean)
    noise = TOY.potential.sigma**2 * torch.eye(4, dtype=torch.float64)
    expected = MultivariateNormal(mean, cov + noise).log_prob(TOY.potential.y)
    found = moment_lookahead(TOY.potential, tokens, log_d)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-10)


def test_single_precision_looks_the_same():
    """Float32 codes against float64, to 1e-4 of the log-weight."""
    toy, rows = TOY.potential, all_states(5, 4)[::7]
    single = GaussianMeasurement(toy.predict, toy.y.float(), toy.sigma, toy.codebook.float())
    log_d = TOY.denoiser(rows, 1.0)
    found = moment_lookahead(single, rows, log_d.float())
    torch.testing.assert_close(found, moment_lookahead(toy, rows, log_d), rtol=0, atol=1e-4)


def test_a_curved_measurement_is_linearised_where_the_table_is():
    curved = GaussianMeasurement(
        lambda e: averages(e).sin(), TOY.potential.y, 0.5, CODES, name="curved"
    )
    rows = torch.tensor([[0, 3, MASK, MASK], [MASK] * 4])
    found = moment_lookahead(curved, rows, TOY.denoiser(rows, 1.0))
    assert found.shape == (2,)
    assert bool(found.isfinite().all())


# Options and refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "maskgit"}, "unknown variant 'maskgit'"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"delta": 1.5}, r"delta lie in \[0, 1\]"),
        ({"floor": 1.0}, r"floor in \[0, 1\)"),
        ({"eps": 0.0}, "without a floor no weight makes up"),
        ({"lam": -0.1}, r"lam lies in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is positive"),
        ({"num_sweeps": -1}, "num_sweeps must be >= 0"),
        ({"num_children": 0}, "num_children >= 1"),
        ({"twist": "nothing"}, "unknown twist 'nothing'"),
        ({"score": "luck"}, "unknown score 'luck'"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        SMC(ordered(), TOY.potential, method="aps-smc", **options).run(seed=0)


def refused(chain, message, **options):
    potential = options.pop("potential", TOY.potential)
    with pytest.raises(CapabilityError, match=message):
        SMC(chain, potential, method="aps-smc", num_particles=4, **options).run(seed=0)


def test_chains_that_anchors_cannot_steer():
    refused(on_a_grid(kappa=0.5), "anchors are for masked chains at kappa=1")
    uniform = toy_chain("uniform", vocab_size=4, length=4, num_steps=3)
    refused(uniform, "anchors are for masked chains at kappa=1")
    refused(on_a_grid(), "variant='policy' is not for a InterpolatingKernel", variant="policy")
    refused(ordered(), "choose 'auto' or 'policy' or 'values'", variant="independent")


def no_codes(x0):
    return -x0.double().sum(-1)


def test_guides_that_do_not_fit():
    refused(
        ordered(), "follows gradients through a codebook", potential=lambda x: -x.double().sum(-1)
    )
    other = EmbeddedPotential(lambda e: e.sum((-2, -1)), CODES[:3])
    refused(ordered(), "3 codes", potential=other)
    soft = EmbeddedPotential(lambda e: e.sum((-2, -1)), CODES)
    refused(ordered(), "the guide is no GaussianMeasurement", potential=soft, twist="moments")
    with pytest.raises(ValueError, match="no chain site; there is x"):
        SMC(ordered(), TOY.potential, method="aps-smc", guide={"y": soft}).run(seed=0)


def test_a_proposal_of_other_steps_is_refused():
    step = TokenStep(TOY.process, TOKENS, table(), 0.2, 0.5, kappa=0.5)
    with pytest.raises(CapabilityError, match="at kappa=1, in an order that it may choose"):
        AnchoredProposal(Guidance(TOY.potential))(step, {"tokens": TOKENS}, 0)


def test_a_potential_that_is_no_measurement_looks_ahead_by_completions():
    soft = EmbeddedPotential(lambda e: e.sum((-2, -1)), CODES, name="brightness")
    found = SMC(ordered(), soft, method="aps-smc", num_particles=8).run(seed=0)
    assert found.settings["twist"] == "defensive"
    assert found.settings["guide"] == {"x": "brightness"}


# What results say.


def test_settings_are_kept_with_a_result(tmp_path):
    found = SMC(on_a_grid(), TOY.potential, method="aps-smc", num_particles=8).run(seed=0)
    again = ParticlePosterior.load(found.save(tmp_path / "run"))
    assert again.law == found.law
    assert again.settings["variant"] == "independent"
    assert again.settings["twist"] == "moments"
    assert again.settings["expectation"]["num_iterations"] == 30
    assert again.settings["num_embedded"] > 8 * 30


def test_the_law_names_the_base():
    laws = {
        variant: SMC(ordered(), TOY.potential, method=AnchoredSMC(variant=variant)).run(seed=0).law
        for variant in ("policy", "values")
    }
    assert laws["values"] == SMC(ordered(), TOY.potential).run(seed=0).law
    assert laws["policy"].exact
    assert laws["policy"].base != laws["values"].base
    assert str(laws["policy"]).startswith("p_u(path) * G(x0)")
    assert "depends on the data through the policy" in str(laws["policy"])


def test_unpaid_moves_are_said_to_be():
    method = AnchoredSMC(num_sweeps=2, moves=[Remask(where="anywhere")])
    law = SMC(ordered(), TOY.potential, method=method, num_particles=8).run(seed=0).law
    assert not law.exact
    assert "moved 2 times by 'remask'" in str(law)


def test_moves_without_a_guide_or_under_a_policy():
    with pytest.raises(CapabilityError, match="nothing proposes its tokens"):
        SMC(ordered(), TOY.potential, method=Refinement(moves=[Remask()])).run(seed=0)
    method = AnchoredSMC(variant="policy", num_sweeps=1, moves=[OrderRefresh()])
    with pytest.raises(CapabilityError, match="move by Remask"):
        SMC(ordered(), TOY.potential, method=method).run(seed=0)
    with pytest.raises(ValueError, match="'last' or 'anywhere'"):
        Remask(where="first")


def test_moves_are_at_home_in_refinement():
    moves = [OrderRefresh(), Remask(Guidance(TOY.potential))]
    method = Refinement(inner=AnchoredSMC(), moves=moves, num_sweeps=2)
    found = SMC(ordered(), TOY.potential, method=method, num_particles=16).run(seed=0)
    assert found.exact
    torch.testing.assert_close(found.log_potential, TOY.potential(found.x0))


@pytest.mark.parametrize("options", [{}, {"quantiser": "gumbel"}, {"warm_start": 0.3}], ids=str)
def test_a_seed_means_the_same_again(options):
    method = AnchoredSMC(expectation=QuantisedExpectation(3, **options))
    smc = SMC(ordered(), TOY.potential, method=method, num_particles=16)
    one, two = smc.run(seed=5), smc.run(seed=5)
    torch.testing.assert_close(one.log_weights, two.log_weights, rtol=0, atol=0)
    assert torch.equal(one.x0, two.x0)


def test_equal_states_are_asked_about_once():
    asked = TOY.potential.num_embedded
    guidance = Guidance(TOY.potential, QuantisedExpectation(2))
    rows = TOKENS.expand(50, 4)
    guidance(rows, table().expand(50, 4, 4))
    assert TOY.potential.num_embedded - asked == 3


def test_nothing_masked_is_left_as_it_is():
    clean = torch.tensor([[0, 3, 3, 1]])
    guided = Guidance(TOY.potential)(clean, TOY.denoiser(clean, 1.0))
    assert guided.log_c.shape == (1, 4, 4)
    assert bool(guided.log_c.logsumexp(-1).abs().max() < 1e-9)


def test_the_tilted_law_keeps_its_floor_and_the_support():
    log_d = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).double().log()
    log_r = torch.tensor([[0.1, 0.1, 0.4, 0.4]]).double().log()
    c = TiltedTokens()(log_d, log_r, torch.tensor([2])).exp()
    assert c[0, 2:].tolist() == [0.0, 0.0]
    assert float(c.sum()) == pytest.approx(1.0)
    assert bool((c >= 0.2 * log_d.exp()).all())


def test_an_idle_step_of_a_prompted_chain_costs_nothing():
    process = Absorbing(4)
    kernel = OrderedKernel(process, TOY.denoiser, length=4)
    chain = ReverseChain(kernel, 4, prompt=torch.tensor([0, 3, 3, -1]))
    found = SMC(chain, TOY.potential, method="aps-smc", num_particles=8).run(seed=0)
    assert bool((found.x0[..., :3] == torch.tensor([0, 3, 3])).all())


def test_moves_without_sweeps_are_refused():
    with pytest.raises(ValueError, match="moves are made in sweeps; give num_sweeps"):
        AnchoredSMC(moves=[Remask()])
