"""Tempered softmax of a Gaussian latent, drawn as its ``k`` largest entries (Duo++).

The curriculum of Duo feeds a network ``softmax(w / tau)`` with ``w = A x + sqrt(1 - A^2) eps`` over
``V`` tokens. At the temperatures in use all its mass sits on a few entries, so only those are drawn
(Sahoo et al. 2026, arXiv:2602.21185): the largest ``k`` of the ``V - 1`` normals by their order
statistics, at uniformly chosen places, and the clean token's own entry. What the remaining entries
would add to the normaliser enters as its expectation given the k-th value.

The published sampler calls ``x`` the argmax whenever it is among the largest ``k``, and its places
are not exchangeable; here the joint law of the largest entry and all drawn ones is exact, so the
argmax follows the uniform process at signal level ``diffusion_signal(mu, V)``.
"""

import math
from typing import NamedTuple

from ppl_diffusion.arrays import Array, array_namespace, device_of, int64_of, to_float64
from ppl_diffusion.processes.duality import (
    require_two_tokens,
    skip_token,
    special_functions,
    upper_normal,
)

_LARGEST_MU = 1e8  # an infinite mu (no noise) would meet a scale of zero
_SERIES_FROM = 10.0  # where the asymptotic series of Mills' ratio is good to 1e-8


class LatentMixture(NamedTuple):
    """A tempered softmax by its largest entries.

    :ivar ids: tokens, int64 ``(*batch, L, k + 1)``: the clean one first, then the others by
        decreasing weight. All different.
    :ivar weights: their softmax weights, float64, the same shape. Soft inputs are
        ``sum(weights * embedding[ids])``.
    :ivar tokens: the argmax ``z``, int64 ``(*batch, L)``.
    :ivar tail: expected weight of all entries that were not drawn, float64 ``(*batch, L)``; the
        weights sum to ``1 - tail``.
    """

    ids: Array
    weights: Array
    tokens: Array
    tail: Array


def top_k_latents(
    x0: Array, mu: Array, vocab_size: int, uniforms: Array, *, k: int, tau: float = 1e-3
) -> LatentMixture:
    """Draw the largest entries of ``softmax((A x + sqrt(1 - A^2) eps) / tau)`` per token.

    :param x0: clean tokens, int64 ``(*batch, L)``.
    :param mu: signal-to-noise ratios ``A / sqrt(1 - A^2)``, broadcastable to ``x0``.
    :param vocab_size: number ``V >= 2`` of tokens.
    :param uniforms: numbers in ``[0, 1)``, ``(2 k + 1, *batch, L)``.
    :param k: how many of the other tokens to draw, ``1 <= k <= V - 1``; with ``V - 1`` there is no
        tail and the weights are the full softmax.
    :returns: ids, weights, argmax and tail weight.
    :raises ValueError: if ``k``, ``tau`` or the number of uniforms is not usable.
    """
    others = require_two_tokens(vocab_size)
    _check(others, uniforms, k, tau)
    xp = array_namespace(x0)
    mu = xp.clip(0.0 * to_float64(uniforms[0]) + to_float64(mu), None, _LARGEST_MU)
    own = mu + special_functions(xp).ndtri(to_float64(uniforms[0]))
    values = largest_normals(to_float64(uniforms[1 : k + 1]), others)
    ids = skip_token(distinct_ranks(uniforms[k + 1 :], others), x0[..., None])
    tokens = xp.where(own > values[..., 0], x0, ids[..., 0])
    scale = 1.0 / (tau * xp.sqrt(1.0 + mu**2))
    weights, tail = _soft_weights(xp.concat([own[..., None], values], axis=-1), scale, others)
    return LatentMixture(xp.concat([x0[..., None], ids], axis=-1), weights, tokens, tail)


def dense_latents(
    x0: Array, mu: Array, vocab_size: int, noise: Array, *, tau: float = 1e-3
) -> tuple[Array, Array]:
    """Return the whole ``softmax((A x + sqrt(1 - A^2) eps) / tau)``, for small vocabularies.

    :param x0: clean tokens, int64 ``(*batch, L)``.
    :param mu: signal-to-noise ratios ``A / sqrt(1 - A^2)``, broadcastable to ``x0``.
    :param vocab_size: number ``V >= 2`` of tokens.
    :param noise: standard normals ``eps``, ``(*batch, L, V)``; their dtype is that of the weights.
    :returns: weights ``(*batch, L, V)`` and their argmax, int64 ``(*batch, L)``.
    :raises ValueError: if ``tau`` is not positive.
    """
    require_two_tokens(vocab_size)
    _check_tau(tau)
    xp = array_namespace(x0)
    mu = xp.clip(0.0 * to_float64(x0) + to_float64(mu), None, _LARGEST_MU)
    # In units of the noise; divided by its largest entry before the temperature, so that float32
    # keeps the differences that matter.
    clean = x0[..., None] == xp.arange(vocab_size, device=device_of(x0))
    latent = noise + xp.where(clean, xp.astype(mu, noise.dtype)[..., None], 0.0 * noise)
    below = latent - xp.max(latent, axis=-1, keepdims=True)
    scale = xp.astype(1.0 / (tau * xp.sqrt(1.0 + mu**2)), noise.dtype)
    mass = xp.exp(below * scale[..., None])
    return mass / xp.sum(mass, axis=-1, keepdims=True), xp.argmax(latent, axis=-1)


def largest_normals(uniforms: Array, count: int) -> Array:
    """Draw the ``k`` largest of ``count`` standard normals, in decreasing order.

    :param uniforms: numbers in ``[0, 1)``, ``(k, ...)``.
    :param count: how many normals there are.
    :returns: ``(..., k)``.
    """
    xp = array_namespace(uniforms)
    # Each of the remaining uniforms is below the last one: the next largest is a maximum again.
    logs = [xp.log(uniforms[i]) / (count - i) for i in range(uniforms.shape[0])]
    return upper_normal(xp.cumulative_sum(xp.stack(logs, axis=-1), axis=-1))


def distinct_ranks(uniforms: Array, count: int) -> Array:
    """Draw ``k`` different numbers below ``count``, all ordered choices equally likely.

    :param uniforms: numbers in ``[0, 1)``, ``(k, ...)``.
    :param count: how many numbers there are to choose from, at least ``k``.
    :returns: int64 ``(..., k)``; every entry is uniform, in whatever place.
    """
    xp = array_namespace(uniforms)
    drawn: list[Array] = []
    for i in range(uniforms.shape[0]):
        rank = xp.astype(xp.floor(to_float64(uniforms[i]) * (count - i)), int64_of(xp))
        rank = xp.clip(rank, 0, count - i - 1)
        drawn.append(_skip_drawn(rank, drawn) if drawn else rank)
    return xp.stack(drawn, axis=-1)


def _skip_drawn(rank: Array, drawn: list[Array]) -> Array:
    """Return the number of a rank among those that were not drawn yet."""
    xp = array_namespace(rank)
    taken = xp.sort(xp.stack(drawn, axis=-1), axis=-1)
    free_below = taken - xp.arange(len(drawn), device=device_of(rank))
    return rank + xp.astype(xp.sum(free_below <= rank[..., None], axis=-1), rank.dtype)


def _soft_weights(latents: Array, scale: Array, others: int) -> tuple[Array, Array]:
    """Return the weights of the drawn latents (the clean one first) and that of the tail."""
    xp = array_namespace(latents)
    top = xp.max(latents, axis=-1)
    mass = xp.exp((latents - top[..., None]) * scale[..., None])
    last, left = latents[..., -1], others - (latents.shape[-1] - 1)
    rest = left * xp.exp(log_mean_below(last, scale) + scale * (last - top)) if left else 0.0 * top
    total = xp.sum(mass, axis=-1) + rest
    return mass / total[..., None], rest / total


def log_mean_below(bound: Array, scale: Array) -> Array:
    """Return ``log E[exp(s (X - g)) | X < g]`` of a standard normal, never positive.

    It is ``s^2/2 - s g + log Phi(g - s) - log Phi(g)``, in which terms of order ``s^2`` cancel: for
    ``s`` far above ``g`` by the asymptotic series of Mills' ratio.

    :param bound: ``g``.
    :param scale: ``s >= 0``.
    """
    xp = array_namespace(bound)
    log_cdf = special_functions(xp).log_ndtr
    return log_mills(scale - bound) - 0.5 * bound**2 - log_cdf(bound)


def log_mills(y: Array) -> Array:
    """Return ``log Phi(-y) + y^2 / 2``.

    :param y: numbers, any shape.
    """
    xp = array_namespace(y)
    far = y > _SERIES_FROM
    near = xp.where(far, 0.0 * y, y)
    direct = special_functions(xp).log_ndtr(-near) + 0.5 * near**2
    large = xp.where(far, y, xp.ones_like(y) * _SERIES_FROM)
    r = 1.0 / large**2
    series = -r * (1.0 - r * (3.0 - r * (15.0 - r * (105.0 - 945.0 * r))))
    return xp.where(far, xp.log1p(series) - xp.log(large) - 0.5 * math.log(2.0 * math.pi), direct)


def _check(others: int, uniforms: Array, k: int, tau: float) -> None:
    _check_tau(tau)
    if not 1 <= k <= others:
        raise ValueError(
            f"top_k_latents: k must lie in 1..{others}, the number of other tokens, got {k}."
        )
    if uniforms.shape[0] != 2 * k + 1:
        raise ValueError(
            f"top_k_latents: k = {k} needs {2 * k + 1} uniforms per token along the first axis, "
            f"got {uniforms.shape[0]}."
        )


def _check_tau(tau: float) -> None:
    if not tau > 0.0:
        raise ValueError(f"tau must be positive, got {tau}; for the limit 0 use the argmax itself.")
