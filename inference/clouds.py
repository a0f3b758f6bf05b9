"""What a cloud of particles says about the moves that suit it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST_MOVES, STAY = 10, 0.1
"""Moves at most that acceptance alone asks for, and share of particles that may stay."""


def root_of(flat: Tensor, weights: Tensor) -> Tensor:
    """Return roots of covariances of clouds, drawn towards round ones where they are small.

    :param flat: coordinates, float64 ``(R, N, d)``.
    :param weights: normalised, ``(R, N)``.
    :returns: ``(R, d, d)``.
    """
    size = flat.shape[-1]
    usable = flat.isfinite().all(-1)
    weights = torch.where(usable, weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-300)
    points = torch.where(usable[..., None], flat, 0.0)
    centred = points - (weights[..., None] * points).sum(1, keepdim=True)
    cov = (weights[..., None] * centred).mT @ centred
    ordered = points[..., 0].sort(1).values
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)  # copies show no spread
    effective = torch.minimum(distinct.to(flat), 1 / weights.square().sum(1).clamp_min(1e-300))
    share = (size / (size + effective))[:, None, None]
    spread = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    one = torch.eye(size, dtype=flat.dtype, device=flat.device)
    shrunk = (1 - share) * cov + (share * spread + 1e-12) * one
    return torch.linalg.cholesky(torch.where(spread > 1e-10, shrunk, one))


def number_of(shares: list[Tensor]) -> int:
    """Return how many moves leave a tenth of the particles where they are.

    :param shares: shares of particles that moved so far, a number each; empty if none can.
    """
    share = float(shares[0]) if shares else 0.0
    if not shares:  # discrete latents alone: a sweep draws each from its law
        return 2
    stay = min(max(1 - share, 1e-6), 1 - 1e-6)
    return min(max(math.ceil(math.log(STAY) / math.log(stay)), 1), FIRST_MOVES)


def clinging(before: Tensor, after: Tensor, weights: Tensor) -> float:
    """Return the correlation of coordinates before and after, over particles and coordinates.

    :param before: coordinates, float64 ``(R, N, d)``.
    :param after: the same particles later.
    :param weights: normalised, ``(R, N)``.
    """
    w = weights[..., None]
    here, there = (x.nan_to_num(0.0, 0.0, 0.0) for x in (before, after))
    a, b = (x - (w * x).sum(1, keepdim=True) for x in (here, there))
    both, own, other = ((w * x).sum(1) for x in (a * b, a * a, b * b))
    found: Tensor = both / (own * other).sqrt()
    return float(found.nan_to_num(1.0, 1.0, 1.0).mean())  # all at one place: go on
