"""Products of powers of reverse kernels: what a composition of several chains books at each site.

For exact reverse kernels ``K(x'|x) / q(x|x') = p_{k-1}(x') / p_k(x)``, so that along a path::

    m(x_K)**B  prod_k { prod_m K_m(x_{k-1}|x_k)**b_m } q(x_k|x_{k-1})**(1 - B),   B = sum_m b_m

telescopes to ``prod_m P_m(x0)**b_m`` times forward kernels, which sum to one. With factorised or
learned kernels the same expression is a law in its own right: the *path-power* target, whose
factors split over sites. The limit of many steps is the rate form of discrete Feynman-Kac
correctors (arXiv:2601.10403).

All functions are pure array-API code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_diffusion.arrays import Array, array_namespace, device_of, to_float64
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import gather_clean


def log_product(log_probs: Sequence[Array], exponents: Sequence[float]) -> Array:
    """Return ``sum_m b_m log p_m``, not normalised.

    What any law excludes is excluded: ``0**b`` is 0 for negative exponents too, so that the
    supports are intersected.

    :param log_probs: log-probabilities of each expert, arrays of one shape ``(..., n)``.
    :param exponents: ``b_m``, as many, none of them zero.
    :returns: float64 ``(..., n)``.
    """
    xp = array_namespace(log_probs[0])
    if len(exponents) == 1 and exponents[0] == 1:
        return to_float64(log_probs[0])
    total, excluded = xp.zeros_like(to_float64(log_probs[0])), log_probs[0] == -math.inf
    for log_p, exponent in zip(log_probs, exponents, strict=True):
        none = log_p == -math.inf
        total = total + exponent * xp.where(none, xp.zeros_like(total), to_float64(log_p))
        excluded = excluded | none
    return xp.where(excluded, xp.full_like(total, -math.inf), total)


def log_forward_table(process: Process, z: Array, a: float, b: float) -> Array:
    """Return ``log q(z_t = z | z_s = v)`` for every state ``v``.

    :param z: current states, int64 ``(..., L)``.
    :param a: signal level ``alpha(t)``.
    :param b: signal level ``alpha(s) >= a``.
    :returns: float64 ``(..., L, S)``.
    """
    keep = a / b if b > 0 else 1.0
    here = _one_hot(z, process.num_states)
    return _safe_log(keep * here + (1 - keep) * process.prior_prob(z)[..., None])


def log_path_factor(
    log_kernels: Sequence[Array], exponents: Sequence[float], log_forward: Array
) -> Array:
    """Return ``log G_l(v) = sum_m b_m log K_{m,l}(v|x) + (1 - B) log q_l(x_l|v)``.

    :param log_kernels: log-probabilities of the next state under each expert, ``(..., L, S)``.
    :param exponents: ``b_m``.
    :param log_forward: from :func:`log_forward_table`.
    :returns: float64 ``(..., L, S)``; its log-sum-exp over states is the site's log-weight.
    """
    xp = array_namespace(log_forward)
    log_g, rest = log_product(log_kernels, exponents), 1 - sum(exponents)
    if rest == 0:
        return log_g
    # A reverse kernel cannot move against the forward one, so K = 0 wherever q = 0.
    excluded = (log_g == -math.inf) | (log_forward == -math.inf)
    zero = xp.zeros_like(log_g)
    value = xp.where(excluded, zero, log_g) + rest * xp.where(excluded, zero, log_forward)
    return xp.where(excluded, xp.full_like(zero, -math.inf), value)


def jump_rates(
    process: Process,
    z: Array,
    log_cavities: Sequence[Array],
    exponents: Sequence[float],
    alpha: float,
) -> tuple[Array, Array]:
    """Return the rates of single-site jumps, and of the log-weight, in continuous time.

    The target ``pi = prod_m p_m**b_m`` of the law at signal level ``alpha`` has reverse rates
    ``B F(j->i) pi(j)/pi(i)``, with ``F`` the forward rates; the log-weight grows by the sum of
    these rates minus ``sum_m b_m F(j->i) p_m(j)/p_m(i)``. Both in units of the forward rate
    ``-alpha'/alpha`` of a site.

    :param z: current states, int64 ``(..., L)``.
    :param log_cavities: cavity log-probabilities of each expert, ``(..., L, V)``.
    :param exponents: ``b_m``.
    :param alpha: signal level, inside ``(0, 1)``.
    :returns: rates to each clean token, float64 ``(..., L, V)``, zero for staying, and the rate
        of the log-weight of each site, ``(..., L)``.
    """
    xp = array_namespace(log_cavities[0])
    prior, total = process.prior_array(log_cavities[0])[: process.vocab_size], sum(exponents)
    pi_z = process.prior_prob(z)
    # Towards the current state there is no jump; from a revealed site (pi_z = 0) none at all.
    forward = pi_z[..., None] * (1 - _one_hot(z, process.num_states)[..., : process.vocab_size])
    log_ratios = []
    for log_c in log_cavities:
        c_z = gather_clean(log_c, z, process.vocab_size)
        here = xp.where(pi_z > 0, alpha * c_z + (1 - alpha) * pi_z, xp.ones_like(c_z))
        there = alpha * xp.exp(to_float64(log_c)) + (1 - alpha) * prior
        log_ratios.append(_safe_log(there) - xp.log(here)[..., None])
    rates = total * forward * xp.exp(log_product(log_ratios, exponents))
    ratios = zip(exponents, log_ratios, strict=True)
    compensation = sum(b * forward * xp.exp(log_ratio) for b, log_ratio in ratios)
    return rates, xp.sum(rates - compensation, axis=-1)


def _one_hot(z: Array, size: int) -> Array:
    return to_float64(z[..., None] == array_namespace(z).arange(size, device=device_of(z)))


def _safe_log(p: Array) -> Array:
    xp = array_namespace(p)
    possible = p > 0
    return xp.where(
        possible, xp.log(xp.where(possible, p, xp.ones_like(p))), xp.full_like(p, -math.inf)
    )
