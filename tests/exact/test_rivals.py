"""Star-shaped chains and soft-value guidance by enumeration: what each samples, and what not.

Samples are held to an enumerated law by chi-square at a false-alarm rate of 1e-4 each, evidences at
four standard errors over independent runs (6e-5 each); closed forms to round-off. Constants are
those of the specification, printed there to the digits that are compared here.
"""

from dataclasses import dataclass

import pyro
import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import G2D2, SMC, RelaxedDPS, SoftValueGuidance
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, OrderedKernel
from ppl_diffusion.potentials import EmbeddedPotential, GaussianMeasurement, factor
from ppl_diffusion.testing.dense import all_states, prior_law, state_index, state_matrix
from ppl_diffusion.testing.oracles import ExactChain, chi_square_p_value, total_variation
from tests.helpers.rival_toy import (
    CODES,
    GAIN,
    LENGTH,
    POSTERIOR,
    PRIOR,
    SIZE,
    TOY,
    counts_of,
    masked_chain,
    ordered_chain,
    require_law,
    uniform_chain,
)

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
    law = ExactChain.of(chain(6, kappa)).x0_law()
    require_law(chain(6), G2D2(transition=form, **AS_PREDICTED), law, draws=60_000)


def test_in_order_both_forms_keep_the_law_they_have_in_time():
    """With exact tables one reveal at a time is the prior; of the joint, any star is the target."""
    require_law(ordered_chain(), G2D2(transition="markov", **AS_PREDICTED), PRIOR, draws=8000)
    joint = OfTheJoint(num_iterations=0, forget=1.0)
    require_law(ordered_chain(), joint, POSTERIOR, draws=8000)


def test_a_fitted_table_sees_the_data():
    """The mode of the posterior is found more often than by the chain alone, in either form."""
    mode = int(POSTERIOR.argmax())
    alone = SMC(masked_chain(8), TOY.potential, method=G2D2(**AS_PREDICTED), num_particles=2000)
    chance = counts_of(alone.run(seed=0))[mode] / 2000
    for form in ("star", "markov"):
        fitted = SMC(masked_chain(8), TOY.potential, method="g2d2", transition=form)
        assert counts_of(fitted.run(seed=0))[mode] / 256 > 2 * chance


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

    guide = EmbeddedPotential(lambda e: e.sum((-2, -1)), CODES[:3])
    for method in ("g2d2", "d-cbg", "relaxed-dps"):
        with pytest.raises(CapabilityError, match=r"follows gradients through a codebook; make"):
            SMC(program, method=method).run(seed=0)
        with pytest.raises(CapabilityError, match="has 3 codes, and the chain 4 tokens"):
            SMC(masked_chain(), TOY.potential, method=method, guide=guide).run(seed=0)


def test_split_gibbs_needs_uniform_noise():
    with pytest.raises(CapabilityError, match=r"differs from its sequence by uniform noise"):
        SMC(masked_chain(), TOY.potential, method="split-gibbs").run(seed=0)


def test_tables_are_fitted_where_every_step_has_a_level_of_noise():
    blocks = OrderedKernel(TOY.process, TOY.denoiser, length=LENGTH, block=2)
    with pytest.raises(CapabilityError, match=r"G2D2: it noises whole sequences to a level"):
        SMC(ReverseChain(blocks, LENGTH), TOY.potential, method="g2d2").run(seed=0)


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
