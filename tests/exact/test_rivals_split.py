"""Split Gibbs by enumeration: the joint law of a sequence and its copy, and the wrong factor.

Samples are held to an enumerated law by chi-square at a false-alarm rate of 1e-4 each, evidences at
four standard errors over independent runs (6e-5 each); closed forms to round-off. Constants are
those of the specification, printed there to the digits that are compared here.
"""

import math

import pyro
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, SplitGibbs
from ppl_diffusion.inference.split_gibbs import log_accept, mismatch_log_odds
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.potentials import factor
from ppl_diffusion.testing.dense import state_matrix
from ppl_diffusion.testing.oracles import chi_square_p_value, total_variation
from tests.helpers.rival_toy import (
    GAIN,
    LENGTH,
    POSTERIOR,
    SIZE,
    TOY,
    UNIFORM,
    counts_of,
    require_law,
    uniform_chain,
)

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
