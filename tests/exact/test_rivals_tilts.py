"""Classifier guidance and relaxed sampling by enumeration: their relations, and their weights.

Samples are held to an enumerated law by chi-square at a false-alarm rate of 1e-4 each, evidences at
four standard errors over independent runs (6e-5 each); closed forms to round-off. Constants are
those of the specification, printed there to the digits that are compared here.
"""

import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import SMC, PluginLikelihood
from ppl_diffusion.inference.classifier_guidance import NeighbourTilt
from ppl_diffusion.inference.relaxed import AtMean, ThroughNetwork
from ppl_diffusion.kernels import ClassifierKernel, InterpolatingKernel
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement, factor
from ppl_diffusion.testing.anchored_toys import measured_toy
from ppl_diffusion.testing.oracles import ExactChain, total_variation, z_score
from tests.helpers.rival_toy import (
    CODES,
    GAIN,
    LENGTH,
    MASKED,
    POSTERIOR,
    PRIOR,
    SIZE,
    TOY,
    masked_chain,
    ordered_chain,
    uniform_chain,
)

# Classifier guidance.


def noisy_classifier(states, t):
    """``log P(y | z)`` of masked states, by enumeration."""
    fits = ((states[:, None] == TOY.states) | (states[:, None] == SIZE)).all(-1)
    known = torch.where(fits, TOY.log_prior, -torch.inf)
    return torch.logsumexp(known + GAIN, 1) - torch.logsumexp(known, 1)


def guided(mode="exact", likelihood=noisy_classifier, num_steps=1):
    return ClassifierKernel(masked_chain(num_steps).kernel, likelihood, mode=mode)


def test_exact_guidance_of_one_site_at_a_time_is_the_posterior():
    """And of all sites at once it is .465 away from it."""
    kernel, rows, log_p = guided(), MASKED[None], torch.zeros(1).double()
    for site in (2, 0, 3, 1):
        others = torch.arange(LENGTH) != site
        table = kernel.step({"tokens": rows}, 0, fixed=others).log_probs[:, site, :SIZE]
        log_p = (log_p[:, None] + table).flatten()
        rows = rows.repeat_interleave(SIZE, 0)
        rows[:, site] = torch.arange(SIZE).repeat(len(rows) // SIZE)
    law = torch.zeros(256).double()
    law[TOY.index(rows)] = log_p.exp()
    torch.testing.assert_close(law, POSTERIOR, rtol=0, atol=1e-12)
    table = kernel.step({"tokens": MASKED[None]}, 0).log_probs[0, :, :SIZE]
    at_once = table[torch.arange(LENGTH), TOY.states].sum(-1).exp()
    assert total_variation(at_once, POSTERIOR) == pytest.approx(0.465, abs=5e-4)


@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_first_order_guidance_is_exact_where_the_likelihood_is_linear(bend):
    weight = torch.randn(LENGTH, SIZE + 1, generator=torch.Generator().manual_seed(3)).double()

    def likelihood(states, t):
        soft = states if states.is_floating_point() else torch.eye(SIZE + 1)[states]
        value = (soft.to(weight) * weight).sum((-2, -1))
        return value + bend * value.square()

    tokens = {"tokens": torch.tensor([[4, 1, 4, 4], [4, 4, 4, 4]])}
    first = guided("first-order", likelihood, 3).step(tokens, 0).log_probs
    exact = guided("exact", likelihood, 3).step(tokens, 0).log_probs
    gap = float((first.exp() - exact.exp()).abs().max())
    assert (gap < 1e-6) if bend == 0 else (gap > 1e-3), gap


@pytest.mark.parametrize("chain", [masked_chain, uniform_chain], ids=["masked", "uniform"])
def test_the_method_is_the_guided_kernel_with_the_plugged_in_likelihood(chain, monkeypatch):
    """One gradient through the codebook, by the kernel that takes any classifier and by the method.

    The kernel reads a classifier after the step, the method before it, where the network was
    asked: the same for masks, and here for both by construction.
    """
    kernel = chain(3).kernel
    monkeypatch.setattr(ClassifierKernel, "_reading_time", lambda self, k: float(self.times[k]))
    likelihood = PluginLikelihood(TOY.potential, kernel.process, kernel.denoiser)
    tilt = NeighbourTilt(TOY.potential)
    size = kernel.process.num_states
    tokens = torch.randint(0, size, (16, LENGTH), generator=torch.Generator().manual_seed(0))
    carry = {"tokens": tokens}
    guided = ClassifierKernel(kernel, likelihood, mode="first-order").step(carry, 1)
    own = tilt(kernel.step(carry, 1), carry, 1)
    # The kernel's one-hot rows are of torch's default type.
    torch.testing.assert_close(own.log_probs.exp(), guided.log_probs.exp(), rtol=0, atol=1e-6)


def test_neighbours_are_priced_exactly_where_log_g_is_affine():
    affine = EmbeddedPotential(lambda e: (e * torch.arange(8.0).reshape(4, 2)).sum((-2, -1)), CODES)
    mean = torch.rand(5, LENGTH, 2, generator=torch.Generator().manual_seed(0)).double()
    for guide, same in ((affine, True), (TOY.potential, False)):
        slopes = NeighbourTilt(guide).neighbours(mean)
        values = NeighbourTilt(guide, mode="exact").neighbours(mean)
        assert torch.allclose(slopes, values, rtol=0, atol=1e-9) == same


# Relaxed posterior sampling.


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Codes of unequal length: those of the toy all pay the same for their own squares.
ROWS, UNEQUAL = random(3, LENGTH, 2, seed=1), random(SIZE, 2, seed=2)
LINEAR = GaussianMeasurement(
    lambda e: torch.einsum("mlb,...lb->...m", ROWS, e), random(3, seed=3), 0.8, UNEQUAL, linear=True
)


def prediction():
    return torch.softmax(random(LENGTH, SIZE, seed=5), -1)


def tilted_table(guide=LINEAR, **options):
    d = prediction()
    return torch.softmax(d.log() + AtMean(guide, **options).tilt(d @ guide.codebook), -1)


def test_the_cheap_form_is_one_step_of_exponentiated_gradient():
    """``r ~ d exp(-dl/dr)``, the derivative being that in the table."""
    d = prediction().requires_grad_()
    (slope,) = torch.autograd.grad(-LINEAR.embedded(d @ UNEQUAL), d)
    step = torch.softmax(d.detach().log() - 0.7 * slope, -1)
    torch.testing.assert_close(tilted_table(zeta=0.7), step, rtol=0, atol=1e-12)


def sweep(d):
    """Return the table of every site given the others at their means: mean-field, all at once."""
    parts = torch.einsum("mlb,lb->lm", ROWS, d @ UNEQUAL)
    rest = LINEAR.y - parts.sum(0) + parts  # (L, m)
    misfit = rest[:, None] - torch.einsum("mlb,vb->lvm", ROWS, UNEQUAL)
    return torch.softmax(d.log() - misfit.square().sum(-1) / (2 * LINEAR.sigma**2), -1)


def test_with_the_second_order_term_it_is_the_first_mean_field_sweep():
    expected = sweep(prediction())
    torch.testing.assert_close(tilted_table(second_order=True), expected, rtol=0, atol=1e-12)
    assert float((tilted_table() - expected).abs().max()) > 0.05  # without it it is not


def test_rescaled_it_follows_the_norm_and_not_its_square():
    d = prediction()
    point = (d @ UNEQUAL).requires_grad_()
    norm = LINEAR.residual(point).norm() / LINEAR.sigma
    (slope,) = torch.autograd.grad(norm, point)
    expected = torch.softmax(d.log() - 1.3 * slope @ UNEQUAL.mT, -1)
    torch.testing.assert_close(tilted_table(zeta=1.3, rescale=True), expected, rtol=0, atol=1e-12)


class SoftTable:
    """The exact denoiser of the toy, which reads mixtures of states as well."""

    kind, time_free, vocab_size = "cavity", True, SIZE

    def __call__(self, tokens, t, /):
        return TOY.denoiser(tokens, t)

    def hidden_mixture(self, ids, weights, t):
        evidence = weights[..., :SIZE] + weights[..., SIZE:]
        table = PRIOR
        for site in range(LENGTH):
            table = table * evidence[..., site, :][..., TOY.states[:, site]]
        sites = []
        for site in range(LENGTH):
            own = evidence[..., site, :][..., TOY.states[:, site]]
            without = torch.where(own == 0, 0.0, table / torch.where(own == 0, 1.0, own))
            total = table.new_zeros(*table.shape[:-1], SIZE)
            sites.append(total.index_add(-1, TOY.states[:, site], without))
        joint = torch.stack(sites, -2)
        return joint / joint.sum(-1, keepdim=True)

    def head(self, hidden):
        return hidden.clamp_min(1e-30).log()


def soft_chain():
    return ReverseChain(InterpolatingKernel(TOY.process, SoftTable(), num_steps=4), LENGTH)


def test_the_full_form_is_the_derivative_in_the_one_hot_states():
    """By central differences of the plugged-in likelihood of masked states."""
    kernel, carry = soft_chain().kernel, {"tokens": MASKED[None]}
    step = kernel.step(carry, 0)
    tilt = ThroughNetwork(TOY.potential, kernel)(step, carry, 0)
    soft = torch.eye(SIZE + 1).double()[MASKED]

    def value(states):
        mean = SoftTable().hidden_mixture(None, states[None], 0.0)[0] @ CODES
        return float(TOY.potential.embedded(states[:, :SIZE] @ CODES + states[:, SIZE:] * mean))

    slope = torch.zeros(LENGTH, SIZE).double()
    for site in range(LENGTH):
        for token in range(SIZE):
            turn = torch.zeros_like(soft)
            turn[site, token] = 1e-5
            slope[site, token] = (value(soft + turn) - value(soft - turn)) / 2e-5
    expected = torch.softmax(step.log_probs[0] + slope, -1)
    torch.testing.assert_close(tilt.log_probs[0].exp(), expected, rtol=0, atol=1e-6)
    cheap = AtMean(TOY.potential)(step, carry, 0).log_probs[0].exp()
    assert float((cheap - expected).abs().max()) > 1e-2


# As proposals all of them are exact.

PAID = {
    "d-cbg": {},
    "d-cbg exact": {"mode": "exact"},
    "relaxed-dps": {},
    "relaxed-dps second": {"second_order": True},
    "relaxed-dps rescaled": {"rescale": True, "zeta": 2.0},
    "relaxed-dps wrong": {"zeta": -0.5},
}
CHAINS = {"masked": masked_chain, "ordered": ordered_chain, "uniform": uniform_chain}
SMALL = {"num_particles": 32, "num_runs": 200, "store_path": False}


def evidence_of(name):
    """Return the evidence of the chain's own prior, constants included."""
    prior = PRIOR if name == "ordered" else ExactChain.of(CHAINS[name]()).x0_law()
    return float((prior * GAIN.exp()).sum())


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("method", PAID)
def test_as_a_proposal_it_is_unbiased(method, name):
    options = {"method": method.partition(" ")[0], "weighted": True, **PAID[method]}
    posterior = SMC(CHAINS[name](), TOY.potential, **options, **SMALL).run(seed=1)
    assert posterior.exact
    assert abs(z_score(posterior.log_evidence.exp(), evidence_of(name))) < 4


def test_the_full_form_is_unbiased_and_counts_what_it_asks():
    options = {"method": "relaxed-dps", "weighted": True, **SMALL}
    full = SMC(soft_chain(), TOY.potential, form="full", **options).run(seed=1)
    assert abs(z_score(full.log_evidence.exp(), evidence_of("masked"))) < 4
    rows = SMALL["num_particles"] * SMALL["num_runs"] * 4
    assert full.num_evaluations > rows  # a row each for its slope, at every step


@pytest.mark.parametrize("method", ["d-cbg", "relaxed-dps"])
def test_it_steers_a_program_by_a_guide_and_leaves_the_target_alone(method):
    """The guide is another measurement than the one that is weighed."""
    guide, chain = measured_toy(seed=3).potential, masked_chain()
    held = clamp(
        lambda: factor("y", TOY.potential, chain.x0(pyro.sample("path", chain))),
        tokens=torch.tensor([0, 0, 0, 1]),
        mask=torch.tensor([False, False, False, True]),
    )
    posterior = SMC(held, method=method, guide=guide, weighted=True, **SMALL).run(seed=1)
    prior = ExactChain.of(chain).x0_law() * (TOY.states[:, 3] == 1)
    expected = float((prior * GAIN.exp()).sum())
    assert abs(z_score(posterior.log_evidence.exp(), expected)) < 4
    assert bool((posterior.x0[..., 3] == 1).all())


def test_unpaid_tilts_would_be_found_out():
    """What the published samplers leave out: with the weights of the chain alone."""
    runner = SMC(masked_chain(), TOY.potential, method="relaxed-dps", zeta=0.5, **SMALL)
    draws = runner.run(seed=1).x0
    naive = TOY.potential(draws).exp().mean(1)
    assert abs(z_score(naive, evidence_of("masked"))) > 10
