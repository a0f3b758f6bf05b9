"""How far two samples of sequences are apart, by a kernel that counts the letters that differ.

The kernel of two sequences is ``kappa`` to the power of the number of positions at which they
differ: a product over positions, so that its mean sees how letters go together, whole sequences
included. The squared distance of the mean embeddings of two laws (maximum mean discrepancy) is zero
only if they are one law, and its estimate from pairs of different sequences is unbiased: around
zero, and at times below it, where the laws agree. A few sequences that are repeated are close to
themselves, which is what such an estimate charges for low entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

KAPPA = 0.7
"""What a differing letter leaves of the kernel."""


def hamming_kernel(x: Tensor, y: Tensor, kappa: float = KAPPA) -> Tensor:
    """Return the kernel of all pairs, float64 ``(n, m)``.

    :param x: token ids, int64 ``(n, L)``.
    :param y: the same, ``(m, L)``.
    :param kappa: in (0, 1).
    """
    size = 1 + int(torch.maximum(x.max(), y.max()))
    # Whole numbers, which float32 holds exactly.
    equal = one_hot(x, size).flatten(1).float() @ one_hot(y, size).flatten(1).float().T
    return kappa ** (x.shape[-1] - equal).double()


def kernel_distance(x: Tensor, y: Tensor, kappa: float = KAPPA) -> float:
    """Return the unbiased estimate of the squared distance of two laws.

    :param x: a sample of one, int64 ``(n, L)``, ``n >= 2``.
    :param y: a sample of the other.
    :param kappa: see :func:`hamming_kernel`.
    """
    across = float(hamming_kernel(x, y, kappa).mean())
    return _within(x, kappa) + _within(y, kappa) - 2.0 * across


def _within(x: Tensor, kappa: float) -> float:
    """Return the mean over pairs of different rows; a row's kernel with itself is one."""
    total = float(hamming_kernel(x, x, kappa).sum())
    return (total - len(x)) / (len(x) * (len(x) - 1))
