"""The rivals of anchored posterior sampling by enumeration: what each samples, what it does not.

Samples are held to an enumerated law by chi-square at a false-alarm rate of 1e-4 each, evidences at
four standard errors over independent runs (6e-5 each); closed forms to round-off. Constants are
those of the specification, printed there to the digits that are compared here.
"""

import math
from dataclasses import dataclass

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp
from ppl_diffusion.inference import (
    G2D2,
    SMC,
    PluginLikelihood,
    RelaxedDPS,
    SoftValueGuidance,
    SplitGibbs,
)
from ppl_diffusion.inference.classifier_guidance import NeighbourTilt
from ppl_diffusion.inference.relaxed import AtMean, ThroughNetwork
from ppl_diffusion.inference.split_gibbs import log_accept, mismatch_log_odds
from ppl_diffusion.kernels import (
    Absorbing,
    ClassifierKernel,
    InterpolatingKernel,
    OrderedKernel,
    Uniform,
)
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement, factor
from ppl_diffusion.testing.anchored_toys import measured_toy
from ppl_diffusion.testing.dense import all_states, prior_law, state_index, state_matrix
from ppl_diffusion.testing.oracles import (
    ExactChain,
    chi_square_p_value,
    total_variation,
    z_score,
)

TOY = measured_toy()
PRIOR, GAIN, POSTERIOR = TOY.log_prior.exp(), TOY.log_g, TOY.posterior
SIZE, LENGTH = 4, 4
MASKED = torch.full((LENGTH,), SIZE)
UNIFORM = Uniform(SIZE)


def masked_chain(num_steps=4, kappa=1.0):
    return ReverseChain(
        InterpolatingKernel(TOY.process, TOY.denoiser, num_steps=num_steps, kappa=kappa), LENGTH
    )


def ordered_chain():
    return ReverseChain(OrderedKernel(TOY.process, TOY.denoiser, length=LENGTH), LENGTH)


def uniform_chain(num_steps=4, kappa=1.0):
    denoiser = MarkovDenoiser(TOY.denoiser.initial, TOY.denoiser.transition, UNIFORM)
    kernel = InterpolatingKernel(UNIFORM, denoiser, num_steps=num_steps, kappa=kappa)
    return ReverseChain(kernel, LENGTH)


def counts_of(posterior):
    return torch.bincount(TOY.index(posterior.x0).flatten(), minlength=len(PRIOR))


def require_law(chain, method, law, *, draws=20_000, seed=0, potential=TOY.potential):
    """Hold unweighted draws to a law, by chi-square."""
    runner = SMC(chain, potential, method=method, num_particles=draws, store_path=False)
    posterior = runner.run(seed=seed)
    assert not posterior.exact
    assert chi_square_p_value(counts_of(posterior), law) > 1e-4
    return posterior


# Star-shaped chains.

FACTORISED = {
    0.0: {1: 0.6093, 2: 0.3083, 4: 0.170, 8: 0.106, 16: 0.069, 32: 0.047, 64: 0.032},
    1.0: {1: 0.6093, 2: 0.3083, 4: 0.154, 8: 0.078, 16: 0.039, 32: 0.020, 64: 0.010},
}
"""Total variation to the prior by the number of steps: star (kappa 0) and Markov (kappa 1)."""


@pytest.mark.parametrize("kappa", FACTORISED, ids=["star", "markov"])
def test_factorised_chains_are_as_far_from_the_prior_as_the_table_says(kappa):
    """The star chain of a masked prior is the Psi kernel with kappa = 0; no data, exact tables."""
    for steps, expected in FACTORISED[kappa].items():
        kernel = masked_chain(steps, kappa).kernel
        law = prior_law(TOY.process, LENGTH)
        for k in range(steps):
            law = law @ state_matrix(kernel, k, LENGTH)
        clean = (all_states(SIZE + 1, LENGTH) < SIZE).all(-1)
        digits = 5e-5 if steps <= 2 else 6e-4
        assert total_variation(law[clean], PRIOR) == pytest.approx(expected, abs=digits)


def noised(alpha):
    """Return ``q(z | x)`` of masking, ``(256, 625)``."""
    states = all_states(SIZE + 1, LENGTH)
    same, hidden = TOY.states[:, None] == states, states == SIZE
    return torch.where(hidden, 1 - alpha, alpha * same.double()).prod(-1)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_a_star_chain_of_the_joint_law_returns_the_posterior(num_steps):
    """By induction every state is a noised draw of the posterior, whatever the number of steps."""
    law = prior_law(TOY.process, LENGTH)
    for k in range(num_steps):
        weight = (POSTERIOR[:, None] * noised(k / num_steps)).T  # (z, x)
        total = weight.sum(-1, keepdim=True)
        joint = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        law = law @ joint @ noised((k + 1) / num_steps)
    clean = (all_states(SIZE + 1, LENGTH) < SIZE).all(-1)
    torch.testing.assert_close(law[clean], POSTERIOR, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class OfTheJoint(G2D2):
    """Draws clean tokens from their true joint law given the state and the data."""

    def _drawn(self, logits, log_d, generator):
        known = torch.where((log_d == 0).any(-1), log_d.argmax(-1), SIZE)[0]
        fits = ((known[:, None] == TOY.states) | (known[:, None] == SIZE)).all(-1)
        weight = torch.where(fits, POSTERIOR, 0.0)
        return TOY.states[torch.multinomial(weight, 1)[:, 0]][None]


class Stubborn(OfTheJoint):
    """Never masks the first site again: no noised draw of the posterior."""

    def _noised(self, site, kernel, carry, x0, k, generator):
        tokens = super()._noised(site, kernel, carry, x0, k, generator)
        first = torch.arange(LENGTH) == 0
        return torch.where(first & (x0 > 1), x0, tokens)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_star_form_of_the_method_returns_the_posterior_of_the_joint_law(num_steps):
    method = OfTheJoint(num_iterations=0, forget=1.0)
    require_law(masked_chain(num_steps), method, POSTERIOR, draws=8000)


def test_masks_that_depend_on_the_tokens_are_found_out():
    runner = SMC(
        masked_chain(3), TOY.potential, method=Stubborn(num_iterations=0), num_particles=8000
    )
    assert chi_square_p_value(counts_of(runner.run(seed=0)), POSTERIOR) < 1e-6


AS_PREDICTED = {"num_iterations": 0, "forget": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("form", "chain", "kappa"),
    [("markov", masked_chain, 1.0), ("markov", uniform_chain, 1.0), ("star", uniform_chain, 0.0)],
)
def test_without_a_fit_the_method_is_the_chain_of_its_form(form, chain, kappa):
    law = ExactChain.of(chain(3, kappa)).x0_law()
    require_law(chain(3), G2D2(transition=form, **AS_PREDICTED), law)


def test_a_fitted_table_sees_the_data():
    """The mode of the posterior is found more often than by the chain alone, in either form."""
    mode = int(POSTERIOR.argmax())
    alone = SMC(masked_chain(8), TOY.potential, method=G2D2(**AS_PREDICTED), num_particles=2000)
    chance = counts_of(alone.run(seed=0))[mode] / 2000
    for form in ("star", "markov"):
        fitted = SMC(masked_chain(8), TOY.potential, method="g2d2", transition=form)
        assert counts_of(fitted.run(seed=0))[mode] / 256 > 2 * chance


# Split Gibbs.

APART = (TOY.states[:, None] != TOY.states).sum(-1).double()
SIGMAS = {
    0.5: (0.405, 0.502, 0.52),
    0.1: (0.164, 0.322, 0.89),
    0.02: (0.041, 0.272, 0.977),
    0.005: (0.011, 0.262, 0.994),
}
"""Noise of the copy: TV of its law to the posterior, that of the published factor, |lambda_2|."""


def published_odds(alpha, size):
    """``log(beta / (1 - beta))``, without the share of each of the ``K - 1`` other tokens."""
    return mismatch_log_odds(alpha, size) + math.log(size - 1)


def split_laws(log_prior, log_g, apart, alpha, size, odds):
    """Return the transition matrix of copies by exact conditionals, and the joint's marginal."""
    paid = mismatch_log_odds(alpha, size)
    of_x = torch.softmax(log_prior + paid * apart, 1)  # rows are copies
    of_w = torch.softmax(log_g + odds(alpha, size) * apart, 1)  # rows are sequences
    marginal = torch.softmax(log_g + torch.logsumexp(log_prior + paid * apart, 1), 0)
    return of_x @ of_w, marginal


def stationary(matrix):
    """Return the law that a transition matrix leaves alone."""
    system = torch.cat([matrix.T - torch.eye(len(matrix)), torch.ones(1, len(matrix))]).double()
    right = torch.zeros(len(system)).double()
    right[-1] = 1.0
    return torch.linalg.lstsq(system, right[:, None]).solution[:, 0]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_copies_have_the_marginal_of_the_joint_law(sigma):
    correct, published, second = SIGMAS[sigma]
    alpha = math.exp(-sigma)
    right, marginal = split_laws(TOY.log_prior, GAIN, APART, alpha, SIZE, mismatch_log_odds)
    torch.testing.assert_close(stationary(right), marginal, rtol=0, atol=1e-10)
    assert total_variation(marginal, POSTERIOR) == pytest.approx(correct, abs=6e-4)
    values = torch.linalg.eigvals(right).abs().sort(descending=True).values
    assert float(values[1]) == pytest.approx(second, abs=6e-3)
    wrong, _ = split_laws(TOY.log_prior, GAIN, APART, alpha, SIZE, published_odds)
    assert total_variation(stationary(wrong), POSTERIOR) == pytest.approx(published, abs=6e-4)
    assert total_variation(stationary(wrong), marginal) > 0.09  # the control is another law


def test_with_two_tokens_the_published_factor_is_the_right_one():
    assert published_odds(0.7, 2) == mismatch_log_odds(0.7, 2)
    assert published_odds(0.7, 3) != pytest.approx(mismatch_log_odds(0.7, 3))


SITES = torch.cartesian_prod(torch.arange(LENGTH), torch.arange(SIZE))
NEXT = TOY.states[:, None].repeat(1, len(SITES), 1)
NEXT[:, torch.arange(len(SITES)), SITES[:, 0]] = SITES[:, 1]
NEXT = TOY.index(NEXT)  # (256, 16): every proposal of a copy, each as likely as the others


def metropolis(law, alpha, odds=mismatch_log_odds):
    """Return the law of copies after a Metropolis step, for every sequence, ``(256 x, 256 w)``."""
    apart = APART[:, NEXT] - APART[:, :, None]
    ratio = log_accept(GAIN[None, :, None], GAIN[NEXT], apart, odds(alpha, SIZE)).exp()
    flow = law[..., None] * ratio.clamp_max(1) / len(SITES)
    return (law - flow.sum(-1)).index_add(1, NEXT.flatten(), flow.flatten(1))


def test_metropolis_steps_leave_the_law_of_the_copy_alone():
    alpha = math.exp(-0.1)
    law = torch.softmax(GAIN + mismatch_log_odds(alpha, SIZE) * APART, 1)
    torch.testing.assert_close(metropolis(law, alpha), law, rtol=0, atol=1e-14)
    wrong = metropolis(law, alpha, published_odds)
    assert float((wrong - law).abs().sum(-1).max()) > 1e-2


def annealed_law(method, output):
    """Return the law of a run, step by step, by matrices that share no code with it."""
    times = [*torch.linspace(1.0, method.last_time, method.num_sweeps).tolist()]
    law, x_law = torch.full((256,), 1 / 256).double(), None
    for t in times:
        inner = torch.linspace(t, 0.0, method.num_prior_steps + 1, dtype=torch.float64)
        grid = [1.0, *inner.tolist()]
        kernel = InterpolatingKernel(UNIFORM, uniform_chain().kernel.denoiser, times=grid)
        prior = torch.eye(256).double()
        for k in range(1, len(grid) - 1):
            prior = prior @ state_matrix(kernel, k, LENGTH)
        joint = (law[:, None] * prior).T  # (x, w)
        x_law = joint.sum(1)
        for _ in range(method.num_moves):
            joint = metropolis(joint, 1 - t)
        law = joint.sum(0)
    return law if output == "copy" else x_law


@pytest.mark.parametrize("output", ["copy", "sequence"])
def test_a_run_of_split_gibbs_has_the_law_of_its_sweeps(output):
    method = SplitGibbs(num_sweeps=3, num_prior_steps=2, num_moves=4, last_time=0.2, output=output)
    law = annealed_law(method, output)
    require_law(uniform_chain(), method, law)


def test_a_run_with_the_published_factor_is_found_out(monkeypatch):
    method = SplitGibbs(num_sweeps=3, num_prior_steps=2, num_moves=4, last_time=0.2)
    law = annealed_law(method, "copy")
    module = "ppl_diffusion.inference.split_gibbs.mismatch_log_odds"
    monkeypatch.setattr(module, published_odds)
    runner = SMC(uniform_chain(), TOY.potential, method=method, num_particles=20_000)
    assert chi_square_p_value(counts_of(runner.run(seed=0)), law) < 1e-6


def test_split_gibbs_takes_programs_and_prompts():
    prompt = torch.tensor([0, -1, -1, -1])
    kernel = uniform_chain().kernel
    chain = ReverseChain(kernel, LENGTH, prompt=prompt)

    def program():
        factor("y", TOY.potential, chain.x0(pyro.sample("path", chain)))

    method = SplitGibbs(num_sweeps=3, num_prior_steps=2, num_moves=8, last_time=0.1)
    posterior = SMC(program, method=method, num_particles=64).run(seed=0)
    assert bool((posterior.x0[..., 0] == 0).all())
    assert posterior.path.shape[-2] == method.num_sweeps + 1


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

CODES = TOY.potential.codebook


def operator():
    """Return ``A`` as a matrix of sites, ``(m, L, b)``, by its definition."""
    rows = torch.zeros(4, LENGTH, 2).double()
    for coordinate in range(2):
        for pair in range(2):
            rows[coordinate * 2 + pair, 2 * pair : 2 * pair + 2, coordinate] = 0.5
    return rows


def prediction():
    return torch.softmax(
        torch.randn(LENGTH, SIZE, generator=torch.Generator().manual_seed(5)).double(), -1
    )


def tilted_table(**options):
    d = prediction()
    return torch.softmax(d.log() + AtMean(TOY.potential, **options).tilt(d @ CODES), -1)


def test_the_cheap_form_is_one_step_of_exponentiated_gradient():
    """``r ~ d exp(-dl/dr)``, the derivative being that in the table."""
    d = prediction().requires_grad_()
    (slope,) = torch.autograd.grad(-TOY.potential.embedded(d @ CODES), d)
    step = torch.softmax(d.detach().log() - 0.7 * slope, -1)
    torch.testing.assert_close(tilted_table(zeta=0.7), step, rtol=0, atol=1e-12)


def sweep(d):
    """Return the table of every site given the others at their means: mean-field, all at once."""
    rows, y, sigma = operator(), TOY.potential.y, TOY.potential.sigma
    parts = torch.einsum("mlb,lb->lm", rows, d @ CODES)
    rest = y - parts.sum(0) + parts  # (L, m)
    misfit = rest[:, None] - torch.einsum("mlb,vb->lvm", rows, CODES)
    return torch.softmax(d.log() - misfit.square().sum(-1) / (2 * sigma**2), -1)


def test_with_the_second_order_term_it_is_the_first_mean_field_sweep():
    expected = sweep(prediction())
    torch.testing.assert_close(tilted_table(second_order=True), expected, rtol=0, atol=1e-12)
    assert float((tilted_table() - expected).abs().max()) > 0.05  # without it it is not


def test_rescaled_it_follows_the_norm_and_not_its_square():
    d = prediction()
    point = (d @ CODES).requires_grad_()
    norm = TOY.potential.residual(point).norm() / TOY.potential.sigma
    (slope,) = torch.autograd.grad(norm, point)
    expected = torch.softmax(d.log() - 1.3 * slope @ CODES.mT, -1)
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


# Soft-value guidance without weights, as published.

FEW = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
VALUES = torch.tensor([[0.3], [-0.2], [1.1], [0.6]], dtype=torch.float64)


def one_site():
    """A single token with four values, which a child is chosen by at once."""
    process = Absorbing(4)
    denoiser = MarkovDenoiser(FEW, torch.eye(4).double(), process)
    chain = ReverseChain(InterpolatingKernel(process, denoiser, num_steps=1), 1)
    return chain, EmbeddedPotential(lambda e: e[..., 0, 0], VALUES, name="values")


def chosen_law(num_children, alpha):
    """Return the law of the child that is kept, by one integral for each token.

    ``P(v) = M b_v s_v E[1 / (s_v + rest)]`` with ``1 / S = int exp(-u S) du`` over the others.
    """
    score = (VALUES[:, 0] / alpha).exp()
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    u = x.exp()
    rest = (FEW * torch.exp(-u[:, None] * score)).sum(-1) ** (num_children - 1)
    each = torch.exp(-u[:, None] * score) * (u * rest)[:, None]
    return num_children * FEW * score * torch.trapezoid(each, x, dim=0)


def tilt_law(alpha):
    weight = FEW * (VALUES[:, 0] / alpha).exp()
    return weight / weight.sum()


@pytest.mark.parametrize("num_children", [2, 16])
def test_a_kept_child_has_the_self_normalised_law(num_children):
    """And the tilt of the kernel only in the limit; the gap falls like one over the children."""
    chain, potential = one_site()
    method = SoftValueGuidance(num_children=num_children, alpha=0.5, weighted=False)
    law = chosen_law(num_children, 0.5)
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    runner = SMC(chain, potential, method=method, num_particles=20_000)
    counts = torch.bincount(runner.run(seed=0).x0.flatten(), minlength=4)
    assert chi_square_p_value(counts, law) > 1e-4
    assert chi_square_p_value(counts, tilt_law(0.5)) < 1e-6


def test_many_children_are_the_tilt():
    gaps = [total_variation(chosen_law(m, 0.5), tilt_law(0.5)) for m in (2, 16, 256)]
    assert gaps == pytest.approx([0.2745, 0.0376, 0.0023], abs=5e-4)


def test_soft_value_guidance_runs_on_a_measurement():
    method = SoftValueGuidance(num_children=16, alpha=0.0, weighted=False)
    posterior = SMC(masked_chain(), TOY.potential, method=method, num_particles=64).run(seed=0)
    assert not posterior.exact
    chance = (PRIOR * GAIN).sum()
    assert float(posterior.log_potential.mean()) > float(chance)


# What does not fit is refused in a sentence.


def test_methods_that_need_a_guide_say_so():
    def program():
        factor("y", TOY.potential, masked_chain().x0(pyro.sample("path", masked_chain())))

    for method in ("g2d2", "d-cbg", "relaxed-dps"):
        with pytest.raises(CapabilityError, match=r"follows gradients through a codebook; make"):
            SMC(program, method=method).run(seed=0)
        with pytest.raises(CapabilityError, match="has 3 codes, and the chain 4 tokens"):
            guide = EmbeddedPotential(lambda e: e.sum((-2, -1)), CODES[:3])
            SMC(masked_chain(), TOY.potential, method=method, guide=guide).run(seed=0)


def test_split_gibbs_needs_uniform_noise():
    with pytest.raises(CapabilityError, match=r"differs from its sequence by uniform noise"):
        SMC(masked_chain(), TOY.potential, method="split-gibbs").run(seed=0)


def test_tables_are_fitted_on_a_grid_of_times_alone():
    with pytest.raises(CapabilityError, match=r"which OrderedKernel does not have"):
        SMC(ordered_chain(), TOY.potential, method="g2d2").run(seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rescale": True}, "divides by a residual, and bare is no GaussianMeasurement"),
        ({"second_order": True}, "needs a linear GaussianMeasurement, which bare is not"),
        ({"form": "full"}, "MarkovDenoiser of .* reads no mixtures of states"),
    ],
)
def test_relaxed_sampling_refuses_what_a_guide_lacks(options, words):
    bare = EmbeddedPotential(TOY.potential.embedded, CODES, name="bare")
    with pytest.raises(CapabilityError, match=words):
        SMC(masked_chain(), bare, method="relaxed-dps", **options).run(seed=0)


def test_a_bent_measurement_has_no_second_order_term():
    bent = GaussianMeasurement(lambda e: e.flatten(-2).tanh(), torch.zeros(8), 1.0, CODES)
    with pytest.raises(CapabilityError, match="needs a linear GaussianMeasurement"):
        SMC(masked_chain(), bent, method=RelaxedDPS(second_order=True)).run(seed=0)


def test_state_index_is_that_of_the_toy():
    assert torch.equal(state_index(TOY.states, SIZE), TOY.index(TOY.states))
