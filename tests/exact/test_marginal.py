"""Bounds and estimates of ``log p(x0)`` against the exact marginal."""

import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ChainMarginal, ReverseChain
from ppl_diffusion.errors import IntractableLogProb
from ppl_diffusion.kernels import Absorbing, Interpolating, InterpolatingKernel, psi
from ppl_diffusion.processes import step_kl
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import (
    PROCESSES,
    ExactChain,
    all_states,
    chi_square_p_value,
    counted,
    forward_law,
    random_joint,
    toy_chain,
    toy_markov_chain,
    toy_process,
    z_score,
)

each_process = pytest.mark.parametrize("name", PROCESSES)
MAX_Z = 4.0  # false alarm rate 6e-5 per comparison


def exact_bound(chain, x0):
    """Return the ELBO of a clean sequence by summing over every noised state."""
    kernel, process = chain.kernel, chain.kernel.process
    states = all_states(process.num_states, chain.length)
    point = torch.zeros(process.vocab_size**chain.length, dtype=torch.float64)
    point[int((x0 * process.vocab_size ** torch.arange(chain.length - 1, -1, -1)).sum())] = 1
    total = torch.zeros((), dtype=torch.float64)
    for k in range(kernel.num_steps):
        a, b, kappa = (float(v) for v in (kernel.alphas[k], kernel.alphas[k + 1], kernel.kappa[k]))
        law = forward_law(process, point, a, chain.length)
        log_c = kernel.cavity_log_probs({"tokens": states}, k)
        site = step_kl(process, x0.expand_as(states), states, log_c, a, b, kappa)
        total -= (law * torch.where(law[:, None] > 0, site, 0.0).sum(-1)).sum()
    return float(total)


@each_process
@pytest.mark.parametrize("kappa", [1.0, 0.7])
def test_bound_is_below_the_log_probability(name, kappa):
    chain = toy_chain(name, num_steps=4, kappa=kappa)
    for x0 in all_states(3, 2):
        exact = float(chain.marginal().log_prob(x0))
        assert exact_bound(chain, x0) <= exact + 1e-12
    gaps = [float(chain.marginal().log_prob(x)) - exact_bound(chain, x) for x in all_states(3, 2)]
    assert max(gaps) > 1e-4


@each_process
@pytest.mark.parametrize("num_samples", [1, 3, 4, 8])
def test_bound_estimate_is_unbiased(name, num_samples):
    """For any number of samples, multiples of ``T`` or not (stratified grid points)."""
    chain, x0 = toy_chain(name, num_steps=4), torch.tensor([0, 2])
    if num_samples % 4 == 0:
        batch = x0.expand(6000, -1)
        values = chain.marginal().log_prob_bound(batch, num_samples=num_samples)
    else:  # one offset is shared by a call, so calls are what is independent
        marginal, batch = chain.marginal(), x0.expand(4, -1)
        calls = [marginal.log_prob_bound(batch, num_samples=num_samples) for _ in range(600)]
        values = torch.stack(calls).mean(-1)
    assert abs(z_score(values, exact_bound(chain, x0))) < MAX_Z


@each_process
def test_bound_samples_average_to_the_bound(name):
    chain, x0 = toy_chain(name), all_states(3, 2)
    terms = chain.marginal().bound_samples(
        x0, num_samples=6, generator=torch.Generator().manual_seed(1)
    )
    bound = chain.marginal().log_prob_bound(
        x0, num_samples=6, generator=torch.Generator().manual_seed(1)
    )
    assert terms.shape == (6, 9)
    torch.testing.assert_close(terms.mean(0), bound)
    assert bool((terms <= 1e-12).all())


@each_process
@pytest.mark.parametrize("num_particles", [1, 4])
def test_likelihood_estimate_is_unbiased(name, num_particles):
    chain = toy_chain(name, num_steps=3)
    for x0 in ([0, 1], [2, 2]):
        batch = torch.tensor(x0).expand(6000, -1)
        ratio = (
            chain.marginal().log_prob_estimate(batch, num_particles=num_particles)
            - chain.marginal().log_prob(batch)
        ).exp()
        assert abs(z_score(ratio, 1.0)) < MAX_Z


def test_likelihood_estimate_lies_between_the_bound_and_the_truth():
    """In the mean of logarithms, and closer to the truth for more particles."""
    chain, x0 = toy_markov_chain("uniform", length=4), torch.tensor([0, 1, 2, 0])
    batch = x0.expand(2000, -1)
    means = [
        float(chain.marginal().log_prob_estimate(batch, num_particles=n).mean()) for n in (1, 8, 64)
    ]
    truth = float(chain.marginal().log_prob(x0))
    assert means[0] < means[1] < means[2] < truth + 0.01


@each_process
def test_marginal_is_the_law_of_samples(name):
    chain = toy_chain(name)
    drawn = chain.marginal().sample((5,))
    assert drawn.shape == (5, 2)
    law = chain.marginal().log_prob(all_states(3, 2)).exp()
    torch.testing.assert_close(law, ExactChain.of(chain).x0_law(), rtol=0, atol=1e-12)


@each_process
def test_prompt_in_the_bounds(name):
    """Sequences that contradict the prompt are impossible, the others keep a valid bound."""
    prompt = torch.tensor([1, -1])
    chain = toy_chain(name, prompt=prompt)
    marginal, x0 = chain.marginal(), all_states(3, 2)
    agree = x0[:, 0] == 1
    for values in (
        marginal.log_prob(x0),
        marginal.log_prob_bound(x0, num_samples=3),
        marginal.log_prob_estimate(x0, num_particles=2),
    ):
        assert bool((values[~agree] == -torch.inf).all())
        assert bool(torch.isfinite(values[agree]).all())
    many = marginal.log_prob_bound(x0[agree].expand(3000, 3, 2), num_samples=3)
    error = many.std(0) / 3000**0.5
    assert bool((many.mean(0) - 4 * error <= marginal.log_prob(x0[agree])).all())
    estimate = marginal.log_prob_estimate(x0[agree].expand(3000, 3, 2), num_particles=2)
    ratio = (estimate - marginal.log_prob(x0[agree])).exp()
    assert all(abs(z_score(ratio[:, i], 1.0)) < MAX_Z for i in range(3))


@pytest.mark.parametrize("num_steps", [1, 4])
def test_prompt_of_an_exact_denoiser_conditions_from_the_first_step(num_steps):
    """One free mask: the chain is the conditional of the table, and the engine agrees."""
    prompt = torch.tensor([2, -1])
    chain = toy_chain("absorbing", num_steps=num_steps, sharpness=2.0, prompt=prompt)
    row = chain.kernel.denoiser.joint[2]
    x0 = torch.stack([torch.full((3,), 2), torch.arange(3)], -1)
    exact = chain.marginal().log_prob(x0).exp()
    torch.testing.assert_close(exact, row / row.sum(), rtol=0, atol=1e-12)
    flat = FeynmanKac(chain, lambda x: torch.zeros(x.shape[:-1]), twist=None)
    posterior = run_smc(flat, 20_000)
    counts = torch.bincount(posterior.x0[0, :, 1], minlength=3)
    assert chi_square_p_value(counts, exact) > 1e-4  # the false alarm rate


def test_costs_are_what_they_say():
    """``num_samples`` network rows per sequence for the bound, at most ``T`` calls."""
    chain, counter = counted(toy_markov_chain("uniform", length=5, num_steps=8))
    x0 = torch.zeros(7, 5, dtype=torch.int64)
    chain.marginal().log_prob_bound(x0, num_samples=16)
    assert (counter.calls, counter.rows) == (8, 7 * 16)
    counter.calls = counter.rows = 0
    chain.marginal().log_prob_bound(x0, num_samples=3)
    assert (counter.calls, counter.rows) == (3, 7 * 3)


def test_large_chains_refuse_and_say_what_to_call():
    chain = toy_markov_chain(length=40)
    with pytest.raises(IntractableLogProb, match=r"log_prob_bound .* or log_prob_estimate"):
        chain.marginal().log_prob(torch.zeros(40, dtype=torch.int64))
    assert bool(torch.isfinite(chain.marginal().log_prob_bound(torch.zeros(40).long())))


@pytest.mark.parametrize("method", ["log_prob_bound", "log_prob_estimate"])
def test_bad_numbers(method):
    marginal = toy_chain().marginal()
    option = "num_samples" if method == "log_prob_bound" else "num_particles"
    with pytest.raises(ValueError, match=f"{option} must be >= 1, got 0"):
        getattr(marginal, method)(torch.tensor([0, 1]), **{option: 0})


@pytest.mark.parametrize("method", ["log_prob", "log_prob_bound", "log_prob_estimate"])
def test_wrong_length_is_refused(method):
    with pytest.raises(ValueError, match=r"must end in shape|must match event_shape"):
        getattr(toy_chain().marginal(), method)(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
@pytest.mark.parametrize("token", [-1, 3, 4])
def test_tokens_that_are_not_clean(name, token):
    """Refused by the estimates, as the mask is; impossible for the unvalidated exact law."""
    chain, x0 = toy_chain(name), torch.tensor([[0, 1], [0, token]])
    for method in ("log_prob_bound", "bound_samples", "log_prob_estimate"):
        with pytest.raises(ValueError, match=r"clean token ids, 0\.\.2, got"):
            getattr(chain.marginal(), method)(x0)
    with pytest.raises(ValueError, match="within the support"):
        ChainMarginal(chain, validate_args=True).log_prob(x0)
    log_p = ChainMarginal(chain, validate_args=False).log_prob(x0)
    assert bool(torch.isfinite(log_p[0]))
    assert log_p[1] == -torch.inf


@pytest.mark.parametrize("kappa", [0.0, 0.5])
@pytest.mark.parametrize("process", [Absorbing(3), Interpolating([0.5, 0.0, 0.5])])
def test_likelihood_estimate_takes_the_detours_of_small_kappa(process, kappa):
    """A wrong token can be revealed and masked again: without that, .756 of the mass is found."""
    chain = toy_chain(process, num_steps=4, kappa=kappa)
    estimate = chain.marginal().log_prob_estimate(
        all_states(3, 2).expand(6000, -1, -1), num_particles=2
    )
    assert abs(z_score(estimate.exp().sum(-1), 1.0)) < MAX_Z


def test_likelihood_estimate_where_kappa_leaves_no_room():
    """At the smallest kappa the bridge alone could not stay where the model stays.

    4 s.e. of 4000 estimates: fails by chance in 6e-5.
    """
    process = toy_process("uniform", 2)
    schedule = psi.remdm_cap(process.schedule, 5, eta=0.5).within(process)
    denoiser = TableDenoiser(random_joint(2, 2), process)
    marginal = ReverseChain(InterpolatingKernel(process, denoiser, psi=schedule), 2).marginal()
    x0 = torch.tensor([0, 1])
    truth = float(marginal.log_prob(x0).exp())
    many = x0.expand(4000, 2)
    estimates = marginal.log_prob_estimate(
        many, num_particles=8, generator=torch.Generator().manual_seed(0)
    ).exp()
    assert abs(z_score(estimates, truth)) < 4
