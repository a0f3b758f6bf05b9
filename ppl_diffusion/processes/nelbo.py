"""Variational bounds of interpolating processes, per position and in nats.

``nelbo_terms`` is the continuous-time integrand for any prior; with the absorbing prior it is
MDLM's weighted cross-entropy (arXiv:2406.07524, Eq. 10) and with the uniform prior UDLM's bound
(arXiv:2412.10193, Eq. 14). ``step_kl`` is the same thing for one step of a finite chain.
"""

from ppl_diffusion.arrays import Array, array_namespace, device_of, to_float64
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import three_way


def nelbo_terms(process: Process, x0: Array, z: Array, log_c: Array, t: Array) -> Array:
    """Return the integrand of the continuous-time NELBO at times ``t``.

    With ``Q_j(x) = a 1[j=x] + (1-a) pi_j`` and the rates ``rho_j = Q_j(x)/Q_z(x)``, and the same
    with the denoiser's ``c`` in place of ``x`` (a hat)::

        f = -alpha'/alpha pi_z sum_{j != z} [ rho^_j - rho_j - rho_j log(rho^_j / rho_j) ]

    The mean over ``t ~ U(0, 1)`` and ``z ~ q_t(. | x0)`` of the sum over positions bounds
    ``-log p(x0)`` from above. Every term is non-negative.

    :param x0: clean tokens, shape ``(*batch, L)``.
    :param z: noised states, shape ``(*batch, L)``.
    :param log_c: cavity log-probabilities at ``(z, t)``, shape ``(*batch, L, V)``.
    :param t: times in ``(0, 1)``, broadcastable to ``(*batch, L)``, usually ``(*batch, 1)``.
    :returns: nats, float64, shape ``(*batch, L)``; differentiable in ``log_c``.
    """
    a, slope = process.schedule.alpha(t), process.schedule.alpha_prime(t)
    if process.absorbing:
        xp = array_namespace(log_c)
        noise = xp.exp(process.schedule.log1m_alpha(t))
        hidden, entropy = z == process.mask_id, _cross_entropy(x0, log_c)
        # Both, so that no zero meets an infinity: what is never hidden is never guessed either.
        entropy = xp.where(hidden, entropy, xp.zeros_like(entropy))
        return xp.where(hidden, -slope / noise, 0.0 * a) * entropy
    return -slope / a * process.prior_prob(z) * _rate_divergence(process, x0, z, log_c, a)


def _cross_entropy(x0: Array, log_c: Array) -> Array:
    picked = array_namespace(log_c).take_along_axis(log_c, x0[..., None], axis=-1)[..., 0]
    return -to_float64(picked)


def _rate_divergence(process: Process, x0: Array, z: Array, log_c: Array, a: Array) -> Array:
    """Return the sum over ``j != z`` above, using that both ``Q`` sum to one over states."""
    xp = array_namespace(log_c)
    prior = process.prior_array(log_c)
    level = a[..., None] if getattr(a, "ndim", 0) else a
    states = xp.arange(process.vocab_size, device=device_of(z))
    noise = (1 - level) * prior
    q_x = level * xp.astype(x0[..., None] == states, prior.dtype) + noise
    q_c = level * xp.exp(to_float64(log_c)) + noise
    here = xp.astype(z[..., None] == states, prior.dtype)
    x_here, c_here = xp.sum(q_x * here, axis=-1), xp.sum(q_c * here, axis=-1)
    positive = q_x > 0
    log_ratio = xp.log(xp.where(positive, q_x, xp.ones_like(q_x))) - xp.log(
        xp.where(positive, q_c, xp.ones_like(q_c))
    )
    cross = xp.sum(xp.where(positive, q_x * log_ratio, xp.zeros_like(q_x)) * (1 - here), axis=-1)
    moved = 1 - x_here
    log_scale = xp.log(c_here) - xp.log(x_here)
    return 1 / c_here - 1 / x_here + (cross + moved * log_scale) / x_here


def step_kl(
    process: Process, x0: Array, z: Array, log_c: Array, a: Array, b: Array, kappa: Array = 1.0
) -> Array:
    """Return ``KL(p(z_s | z_t, x0) || p(z_s | z_t))`` per site, for one step of a finite chain.

    Summed over the steps of a chain and averaged over ``z_t ~ q_t(. | x0)`` it is the negative
    ELBO of that chain (for any ``kappa``: Psi-posteriors preserve the marginals ``q_t``).

    :param x0: clean tokens, shape ``(*batch, L)``.
    :param z: current states, shape ``(*batch, L)``.
    :param log_c: cavity log-probabilities at ``z``, shape ``(*batch, L, V)``.
    :param a: ``alpha(t)``, broadcastable to ``(*batch, L)``.
    :param b: ``alpha(s)``.
    :param kappa: Psi parameter.
    :returns: nats, float64, shape ``(*batch, L)``.
    """
    xp = array_namespace(log_c)
    if process.absorbing:
        hidden = to_float64(z == process.mask_id)
        _, w_den, _ = three_way(a, b, kappa, 0 * hidden, hidden)
        return xp.where(w_den > 0, w_den * _cross_entropy(x0, log_c), xp.zeros_like(w_den))
    exact = to_float64(x0[..., None] == xp.arange(process.vocab_size, device=device_of(z)))
    p = _dense_row(process, z, exact, a, b, kappa)
    q = _dense_row(process, z, xp.exp(to_float64(log_c)), a, b, kappa)
    positive = p > 0
    ratio = xp.where(positive, p, xp.ones_like(p)) / xp.where(positive, q, xp.ones_like(q))
    return xp.sum(xp.where(positive, p * xp.log(ratio), xp.zeros_like(p)), axis=-1)


def _dense_row(process: Process, z: Array, c: Array, a: Array, b: Array, kappa: Array) -> Array:
    """Return the mixture over all states of a prior on clean tokens, shape ``(*batch, L, V)``."""
    xp = array_namespace(c)
    here = to_float64(z[..., None] == xp.arange(process.vocab_size, device=device_of(z)))
    weights = three_way(a, b, kappa, xp.sum(c * here, axis=-1), process.prior_prob(z))
    stay, den, prior = (w[..., None] for w in weights)
    return stay * here + den * c + prior * process.prior_array(c)
