"""Variational bounds: positivity, special cases, finite-difference KL, exact integrals."""

import math

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.kernels import Cosine, Linear, LogLinear
from ppl_diffusion.processes import nelbo_terms, step_kl
from ppl_diffusion.testing import PROCESSES, random_joint, site_rows, toy_process

SCHEDULES = [Linear(), LogLinear(eps=0.0), Cosine()]
each_process = pytest.mark.parametrize("name", PROCESSES)


def random_batch(process, n=200, seed=0):
    """Return ``(x0, z, log_c, t)`` with ``z`` possible given ``x0``; three sites."""
    rng = np.random.default_rng(seed)
    t = torch.tensor(rng.uniform(0.02, 0.98, size=(n, 1)))
    x0 = torch.tensor(rng.integers(process.vocab_size, size=(n, 3)))
    uniforms = torch.tensor(rng.uniform(size=(2, n, 3)))
    z = process.corrupt(x0, process.schedule.alpha(t), *uniforms)
    c = torch.tensor(rng.dirichlet(np.full(process.vocab_size, 0.7), size=(n, 3)))
    return x0, z, c.log(), t


@each_process
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_term_is_non_negative(name, schedule):
    process = toy_process(name, schedule=schedule)
    terms = nelbo_terms(process, *random_batch(process))
    assert terms.shape == (200, 3)
    assert terms.dtype == torch.float64
    assert float(terms.min()) > -1e-12
    assert float(terms.max()) > 0.1


@each_process
def test_knowing_the_answer_costs_nothing(name):
    process = toy_process(name)
    x0, z, _, t = random_batch(process)
    known = torch.nn.functional.one_hot(x0, 3).double().log()
    torch.testing.assert_close(
        nelbo_terms(process, x0, z, known, t), torch.zeros(200, 3).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_absorbing_is_the_weighted_cross_entropy(schedule):
    """MDLM: ``-alpha' / (1 - alpha)`` times the cross-entropy of masked positions."""
    process = toy_process("absorbing", schedule=schedule)
    x0, z, log_c, t = random_batch(process)
    weight = -schedule.alpha_prime(t) / (1 - schedule.alpha(t))
    entropy = -log_c.gather(-1, x0[..., None])[..., 0]
    expected = torch.where(z == 3, weight * entropy, 0.0)
    torch.testing.assert_close(nelbo_terms(process, x0, z, log_c, t), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_uniform_is_the_published_bound(schedule):
    """UDLM, Eq. 14, with ``Y = K a c + 1 - a`` and ``X`` the same for the one-hot of ``x0``."""
    process = toy_process("uniform", schedule=schedule)
    x0, z, log_c, t = random_batch(process)
    size, a = 3, schedule.alpha(t)[..., None]
    x_bar = size * a * torch.nn.functional.one_hot(x0, size) + 1 - a
    y_bar = size * a * log_c.exp() + 1 - a
    x_z, y_z = x_bar.gather(-1, z[..., None]), y_bar.gather(-1, z[..., None])
    inner = (x_bar / x_z * torch.log((y_z * x_bar) / (y_bar * x_z))).sum(-1)
    slope, a = schedule.alpha_prime(t), a[..., 0]
    expected = slope / (size * a) * (size / x_z[..., 0] - size / y_z[..., 0] - inner)
    torch.testing.assert_close(
        nelbo_terms(process, x0, z, log_c, t), expected, rtol=1e-9, atol=1e-12
    )


@each_process
def test_general_formula_by_explicit_sum(name):
    """Summand by summand; the mask's own row included."""
    process = toy_process(name)
    x0, z, log_c, t = random_batch(process, n=50)
    a = process.schedule.alpha(t)
    prior, size = torch.as_tensor(process.prior), process.num_states
    if process.absorbing:  # SUBS: a revealed token is known
        visible = torch.nn.functional.one_hot(z.clamp_max(2), 3).double().log()
        log_c = torch.where((z < 3)[..., None], visible, log_c)
    pad = (0, size - 3)
    q_x = a[..., None] * torch.nn.functional.pad(torch.nn.functional.one_hot(x0, 3), pad)
    q_c = a[..., None] * torch.nn.functional.pad(log_c.exp(), pad)
    q_x, q_c = (q + (1 - a[..., None]) * prior for q in (q_x, q_c))
    rho = q_x / q_x.gather(-1, z[..., None])
    rho_hat = q_c / q_c.gather(-1, z[..., None])
    terms = rho_hat - rho - torch.where(rho > 0, rho * torch.log(rho_hat / rho), 0.0)
    away = torch.arange(size) != z[..., None]
    rate = -process.schedule.alpha_prime(t) / a * prior[z]
    expected = rate * torch.where(away, terms, 0.0).sum(-1)
    torch.testing.assert_close(
        nelbo_terms(process, x0, z, log_c, t), expected, rtol=1e-9, atol=1e-12
    )


@each_process
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_limit_of_the_one_step_divergence(name, schedule):
    """``step_kl / dt`` tends to the integrand."""
    process, dt = toy_process(name, schedule=schedule), 1e-6
    x0, z, log_c, t = random_batch(process)
    rate = step_kl(process, x0, z, log_c, schedule.alpha(t), schedule.alpha(t - dt)) / dt
    terms = nelbo_terms(process, x0, z, log_c, t)
    torch.testing.assert_close(rate, terms, rtol=2e-4, atol=1e-4)


@each_process
@pytest.mark.parametrize("kappa", [1.0, 0.7, 0.0])
def test_step_divergence_is_that_of_the_dense_rows(name, kappa):
    process, (a, b) = toy_process(name), (0.35, 0.6)
    x0, z, log_c, _ = random_batch(process, n=60)
    known = torch.nn.functional.one_hot(x0, 3).double()
    p = site_rows(process, z, known, a, b, kappa)
    q = site_rows(process, z, log_c.exp(), a, b, kappa)
    expected = torch.where(p > 0, p * torch.log(p / q.clamp_min(1e-300)), 0.0).sum(-1)
    torch.testing.assert_close(
        step_kl(process, x0, z, log_c, a, b, kappa), expected, rtol=1e-9, atol=1e-12
    )


def exact_nelbo(process, denoiser, x0, nodes=60):
    """Return the NELBO of a sequence by Gauss-Legendre and a sum over all ``z``.

    The nodes are graded, ``t = u ** 4``: the integrand has a logarithm at ``t = 0``.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    grid = torch.cartesian_prod(*[torch.arange(process.num_states)] * len(x0))
    states, total = grid.reshape(-1, len(x0)), 0.0
    u = (points + 1) / 2
    for t, w in zip(u**4, weights / 2 * 4 * u**3, strict=True):
        a = float(process.schedule.alpha(t))
        law = (a * (states == x0) + (1 - a) * process.prior_prob(states)).prod(-1)
        time = torch.full((len(states), 1), t, dtype=torch.float64)
        terms = nelbo_terms(process, x0.expand_as(states), states, denoiser(states, t), time)
        total += w * float((law * terms.sum(-1)).sum())
    return total


@each_process
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=repr)
def test_one_site_bound_is_tight(name, schedule):
    """For ``L = 1`` and the exact cavity the NELBO is ``-log p(x)``, for any schedule."""
    process = toy_process(name, schedule=schedule)
    law = random_joint(3, 1, seed=3)
    denoiser = TableDenoiser(law, process)
    for x in range(3):
        nelbo = exact_nelbo(process, denoiser, torch.tensor([x]))
        assert nelbo == pytest.approx(-math.log(float(law[x])), abs=1e-8)


@each_process
def test_two_site_bound_is_attained_whatever_the_schedule(name):
    """Two sites, exact cavities, continuous time: every sequence attains its bound."""
    law = random_joint(3, 2, seed=4)
    sequences = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    values = []
    for schedule in (Linear(), Cosine()):
        process = toy_process(name, schedule=schedule)
        denoiser = TableDenoiser(law, process)
        values.append([exact_nelbo(process, denoiser, x) for x in sequences])
    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-7)
    truth = -law.flatten().log().numpy()
    np.testing.assert_allclose(values[0], truth, rtol=0, atol=1e-7)


def test_bound_has_power():
    """The posterior mean in place of the cavity is not optimal: the bound is loose by > 0.01."""
    process, law = toy_process("uniform"), random_joint(3, 1, seed=3)
    posterior = TableDenoiser(law, process, kind="posterior")
    gap = [
        exact_nelbo(process, posterior, torch.tensor([x])) + math.log(float(law[x]))
        for x in range(3)
    ]
    assert float(np.dot(gap, law.numpy())) > 0.01


@each_process
def test_gradient_in_the_denoiser(name):
    process = toy_process(name)
    x0, z, log_c, t = random_batch(process, n=3)
    logits = log_c.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: nelbo_terms(process, x0, z, c.log_softmax(-1), t), logits
    )
