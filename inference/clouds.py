"""What a cloud of particles says about the moves that suit it; arrays of any backend."""

from __future__ import annotations

import math

from ppl_diffusion.arrays import Array, array_namespace, device_of

FIRST_MOVES, STAY = 10, 0.1
"""Moves at most that acceptance alone asks for, and share of particles that may stay."""

BLIND_MOVES = 2
"""Sweeps over discrete latents alone, each of which draws them from their law."""


def root_of(flat: Array, weights: Array) -> Array:
    """Return roots of covariances of clouds, drawn towards round ones where they are small.

    :param flat: coordinates, ``(R, N, d)``.
    :param weights: normalised, ``(R, N)``.
    :returns: ``(R, d, d)``.
    """
    xp, size = array_namespace(flat), flat.shape[-1]
    usable = xp.all(xp.isfinite(flat), axis=-1)
    weights = xp.where(usable, weights, 0.0)
    weights = weights / _positive(xp.sum(weights, axis=1, keepdims=True))
    points = xp.where(usable[..., None], flat, 0.0)
    centred = points - xp.sum(weights[..., None] * points, axis=1, keepdims=True)
    cov = xp.matmul(xp.matrix_transpose(weights[..., None] * centred), centred)
    ordered = xp.sort(points[..., 0], axis=1)
    # Copies show no spread.
    distinct = 1 + xp.sum(xp.astype(ordered[:, 1:] != ordered[:, :-1], flat.dtype), axis=1)
    effective = xp.minimum(distinct, 1 / _positive(xp.sum(weights**2, axis=1)))
    share = (size / (size + effective))[:, None, None]
    one = xp.eye(size, dtype=flat.dtype, device=device_of(flat))
    spread = (xp.sum(cov * one, axis=(-2, -1)) / size)[:, None, None]
    shrunk = (1 - share) * cov + (share * spread + 1e-12) * one
    return xp.linalg.cholesky(xp.where(spread > 1e-10, shrunk, one))


def _positive(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.where(x > 0, x, 1e-30)


def number_of(share: Array) -> Array:
    """Return how many moves leave a tenth of the particles where they are, a whole number.

    :param share: share of particles that one move moved.
    """
    xp = array_namespace(share)
    stay = xp.clip(1 - share, 1e-6, 1 - 1e-6)
    return xp.clip(xp.ceil(math.log(STAY) / xp.log(stay)), 1, FIRST_MOVES)


def clinging(before: Array, after: Array, weights: Array) -> Array:
    """Return the correlation of coordinates before and after, over particles and coordinates.

    :param before: coordinates, ``(R, N, d)``.
    :param after: the same particles later.
    :param weights: normalised, ``(R, N)``.
    """
    xp, w = array_namespace(before), weights[..., None]
    here, there = (xp.where(xp.isfinite(x), x, 0.0) for x in (before, after))
    a, b = (x - xp.sum(w * x, axis=1, keepdims=True) for x in (here, there))
    both, own, other = (xp.sum(w * x, axis=1) for x in (a * b, a * a, b * b))
    product = own * other
    apart = product > 0
    # All at one place: go on.
    found = xp.where(apart, both / xp.sqrt(xp.where(apart, product, 1.0)), 1.0)
    return xp.mean(found)
