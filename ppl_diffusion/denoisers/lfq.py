"""Lookup-free quantisation: a code is the signs of ``b`` numbers, and its id is their bits.

Yu et al. 2024 (MAGVIT-v2, arXiv 2310.05737), without its entropy over codes: here the bits alone
are kept in balance. The id is binary, most significant bit first, and bit 1 stands for +1::

    e = (.3, -.2, 0)  ->  (+1, -1, -1)  ->  100 in binary  ->  4
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lfq_codebook(num_bits: int, device: torch.device | str | None = None) -> Tensor:
    """Return the codes in the order of their ids, float32 ``(2**num_bits, num_bits)``."""
    ids = torch.arange(2**num_bits, device=device)[:, None]
    return 2.0 * (ids >> _places(num_bits, device) & 1).to(torch.float32) - 1.0


def signs(e: Tensor) -> Tensor:
    """Return +1 where ``e > 0`` and -1 elsewhere (zeros are -1, as in MMaDA's quantiser)."""
    return 2.0 * (e > 0).to(e.dtype) - 1.0


def lfq_ids(e: Tensor) -> Tensor:
    """Return the ids of the nearest codes of ``e (..., b)``, int64 ``(...)``."""
    return ((e > 0).to(torch.int64) << _places(e.shape[-1], e.device)).sum(-1)


def straight_through(e: Tensor) -> Tensor:
    """Return the signs, exactly, with the gradient of ``e`` itself (arXiv 1308.3432)."""
    return signs(e).detach() + (e - e.detach())


def commitment(e: Tensor) -> Tensor:
    """Return the mean squared distance to the codes, which keeps an encoder near them."""
    return (e - signs(e).detach()).square().mean()


def imbalance(e: Tensor) -> Tensor:
    """Return what the bits lack of one bit of entropy each, mean over them, in nats.

    :param e: numbers in (-1, 1), ``(..., b)``; ``(1 + e) / 2`` is read as the probability of +1.
    """
    p = (0.5 + 0.5 * e.flatten(0, -2).mean(0)).clamp(1e-6, 1.0 - 1e-6)
    return math.log(2.0) + (p * p.log() + (1.0 - p) * (-p).log1p()).mean()


def _places(num_bits: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(num_bits - 1, -1, -1, device=device)
