"""Drift and weight rate of Gaussian correctors, against the equation they come from.

The reverse-time law ``pi`` must solve ``d pi = -div(u pi) + c s2/2 laplace(pi) + g pi``. Here the
``q_i`` are Gaussian mixtures under the Ornstein-Uhlenbeck process ``dx = -x dt + sqrt(2) dW``, in
closed form, and all derivatives are automatic: residuals are round-off, and no test is random.
"""

import jax.numpy as jnp
import pytest
import torch

from ppl_diffusion.kernels.gaussian_rates import RewardTilt, corrected_drift, weight_rate

S2 = 2.0
END = 1.5  # forward time at which the reverse chains start
X = torch.linspace(-3, 3, 41, dtype=torch.float64)
CASES = {
    "anneal": [2.0],
    "flatten": [0.5],
    "product": [1.0, 1.0],
    "geometric": [0.4, 0.6],
    "cfg": [-1.0, 2.0],
    "odd": [0.7, 1.9, -0.3],
}
MIXTURES = [
    ([0.3, 0.7], [-1.0, 1.2], [0.2, 0.4]),
    ([0.5, 0.5], [0.4, -0.8], [0.5, 0.3]),
    ([1.0], [0.3], [1.7]),
]


def log_q(mixture, x, tau):
    """Return the log-density of a mixture at reverse time ``tau``."""
    weights, means, variances = (torch.tensor(v, dtype=torch.float64) for v in mixture)
    shrink = torch.exp(-(END - tau))
    variances = variances * shrink**2 + 1 - shrink**2
    z = -((x[..., None] - means * shrink) ** 2) / (2 * variances) - 0.5 * variances.log()
    return torch.logsumexp(weights.log() + z, -1)


def derivative(values, x):
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


def reward(x):
    return 0.8 * x - 0.3 * x**2


def residual(exponents, noise, tilted):
    """Return the residual of the equation divided by ``pi``, and the weight rate."""
    x, tau = X.clone().requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    each = [log_q(m, x, tau) for m in MIXTURES[: len(exponents)]]
    level = tau**2  # any increasing level will do
    log_pi = sum(b * q for b, q in zip(exponents, each, strict=True))
    tilt = None
    if tilted:
        log_pi = log_pi + level * reward(x)
        r = reward(x)
        tilt = RewardTilt(r, derivative(r, x)[:, None], level, 2 * tau)
    scores = [derivative(q, x)[:, None] for q in each]
    drift = -x[:, None]
    u = corrected_drift(scores, exponents, drift, S2, noise=noise, tilt=tilt)[:, 0]
    g = weight_rate(scores, exponents, drift, -1.0, S2, tilt=tilt)
    slope = derivative(log_pi, x)
    # d log pi / d tau at every x: one row of the Jacobian per point.
    in_time = torch.stack([torch.autograd.grad(v, tau, retain_graph=True)[0] for v in log_pi])
    flow = -derivative(u, x) - u * slope
    spread = noise * S2 / 2 * (derivative(slope, x) + slope**2)
    return (in_time - flow - spread - g).detach(), g.detach()


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_law_solves_its_equation(case, noise, tilted):
    """T2.1: the weighted Fokker-Planck equation; the rates themselves are of order 10."""
    left, g = residual(CASES[case], noise, tilted)
    assert float(left.abs().max()) < 1e-10
    assert float(g.abs().max()) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_an_unweighted_chain_does_not(case):
    """The failing twin: without the weight rate the equation is off by the rate itself."""
    left, g = residual(CASES[case], 1.0, False)
    torch.testing.assert_close((left + g).abs().max(), g.abs().max(), rtol=1e-9, atol=0)


def test_the_rate_does_not_depend_on_the_noise():
    """T2.3: it has no such argument; the drift does, and the residual is zero for each."""
    drifts = [
        corrected_drift([X[:, None]], [2.0], -X[:, None], S2, noise=c) for c in (0.0, 1.0, 2.0)
    ]
    assert not torch.equal(drifts[0], drifts[1])
    torch.testing.assert_close(drifts[1] - drifts[0], drifts[2] - drifts[1])


def test_one_expert_as_it_is_has_no_weight():
    """T2.4: exactly zero, not up to round-off."""
    score = torch.randn(50, 3, dtype=torch.float64)
    rate = weight_rate([score], [1.0], -score, -3.0, S2)
    assert bool((rate == 0).all())


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_closed_forms_of_annealing_guidance_and_product(noise):
    a, b = torch.randn(2, 20, 3, dtype=torch.float64)
    f = torch.randn(20, 3, dtype=torch.float64)
    beta, scale = 2.5, 3.0
    anneal = weight_rate([a], [beta], f, 0.0, S2)
    torch.testing.assert_close(anneal, S2 * beta * (beta - 1) / 2 * (a**2).sum(-1))
    guided = weight_rate([a, b], [1 - scale, scale], f, 5.0, S2)
    expected = S2 * scale * (scale - 1) / 2 * ((a - b) ** 2).sum(-1)
    torch.testing.assert_close(guided, expected)
    product = weight_rate([a, b], [1.0, 1.0], f, 0.0, S2)
    torch.testing.assert_close(product, S2 * (a * b).sum(-1))
    drift = corrected_drift([a], [1.0], f, S2, noise=noise)
    torch.testing.assert_close(drift, -f + (1 + noise) / 2 * S2 * a)


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match=r"corrected_drift: noise must be >= 0, got -1."):
        corrected_drift([X[:, None]], [1.0], X[:, None], S2, noise=-1)


def test_jax_gives_the_same_numbers():
    a, f = torch.randn(2, 20, 3)
    tilt = RewardTilt(a[:, 0], f, 0.4, 1.0)
    on_jax = RewardTilt(jnp.asarray(a[:, 0].numpy()), jnp.asarray(f.numpy()), 0.4, 1.0)
    ours = weight_rate([a, f], [0.3, 1.2], f, 2.0, S2, tilt=tilt)
    first, second = jnp.asarray(a.numpy()), jnp.asarray(f.numpy())
    theirs = weight_rate([first, second], [0.3, 1.2], second, 2.0, S2, tilt=on_jax)
    torch.testing.assert_close(ours, torch.tensor(theirs.tolist()), rtol=1e-4, atol=1e-4)
