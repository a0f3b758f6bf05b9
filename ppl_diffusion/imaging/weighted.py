"""Weighted draws of images, pixel by pixel: moments, quantiles, and scores against a truth.

Weights ``(N,)`` sum to one; draws are ``(N, ...)``. Nothing here says whether draws are posterior
draws: particles that share an ancestor are no independent ones, and few of them know no tails.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVEL = 0.9
"""Of central intervals."""


def mean(draws: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean, ``(...)``."""
    return torch.einsum("n...,n->...", draws, weights.to(draws))


def sd(draws: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted standard deviation, ``(...)``; zero for a single draw."""
    return mean((draws - mean(draws, weights)).square(), weights).sqrt()


def quantile(draws: Tensor, weights: Tensor, level: float) -> Tensor:
    """Return the smallest draw that has at least a share of the weight at or below it, ``(...)``.

    :param draws: ``(N, ...)``.
    :param weights: ``(N,)``.
    :param level: the share, in [0, 1].
    """
    values, order = draws.sort(0)
    reached = weights.to(draws.device)[order].cumsum(0) >= level - 1e-9
    reached[-1] = True
    first = reached.to(torch.uint8).argmax(0, keepdim=True)
    return values.gather(0, first)[0]


def interval(draws: Tensor, weights: Tensor, level: float = LEVEL) -> tuple[Tensor, Tensor]:
    """Return the ends of the central interval of the weighted draws, each ``(...)``.

    The ends are draws, so that those of few are too close to each other: :func:`attainable`.
    """
    tail = (1 - level) / 2
    return quantile(draws, weights, tail), quantile(draws, weights, 1 - tail)


def attainable(num_draws: int, level: float = LEVEL) -> float:
    """Return how often such an interval of independent, equal draws holds one more draw of the law.

    :param num_draws: ``N``.
    :param level: what it is called.
    """
    tail = (1 - level) / 2
    low, high = (max(1, math.ceil(share * num_draws - 1e-9)) for share in (tail, 1 - tail))
    return (high - low) / (num_draws + 1)


def ranks(
    truth: Tensor, draws: Tensor, weights: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return where the truth stands among the draws, in [0, 1], ``(...)``.

    Uniform if the truth is one more draw of the same law, however few draws there are: the truth
    gets the weight of a draw, one of ``ESS + 1``, and stands at random inside of it and its ties.
    Exact for independent draws of equal weight, close to it for others.

    :param truth: ``(...)``.
    :param draws: ``(N, ...)``.
    :param weights: ``(N,)``.
    """
    weights = weights.double()
    own = 1 / (1 + 1 / weights.square().sum())
    shared = (1 - own) * weights
    below = torch.einsum("n...,n->...", (draws < truth).double(), shared)
    tied = torch.einsum("n...,n->...", (draws == truth).double(), shared)
    uniform = torch.rand(truth.shape, generator=generator, dtype=torch.float64)
    return below + uniform * (own + tied)


def coverage(
    truth: Tensor,
    draws: Tensor,
    weights: Tensor,
    level: float = LEVEL,
    *,
    randomised: bool = False,
    generator: torch.Generator | None = None,
) -> float:
    """Return the share of pixels whose truth lies in the central :func:`interval`.

    Few draws cover too little even if they are right: compare with :func:`attainable`. The
    randomised form asks whether :func:`ranks` are central, and is right for few draws; it also
    excuses few draws that are wrong (a single one always covers its share), so that it judges
    samplers with many draws, not optimisers.

    :param truth: ``(...)``.
    :param draws: ``(N, ...)``.
    :param weights: ``(N,)``.
    :param level: what the share should be.
    :param randomised: by ranks.
    """
    if randomised:
        rank = ranks(truth, draws, weights, generator=generator)
        return float(((rank - 0.5).abs() <= level / 2).double().mean())
    low, high = interval(draws, weights, level)
    return float(((low <= truth) & (truth <= high)).double().mean())


def crps(truth: Tensor, draws: Tensor, weights: Tensor, *, fair: bool = False) -> Tensor:
    """Return the continuous ranked probability score of each pixel, ``(...)``; lower is better.

    ``sum_i w_i |x_i - y| - 1/2 sum_ij w_i w_j |x_i - x_j|``: that of the weighted draws as they are
    (plain), where a single draw scores its absolute error. The fair form (Ferro 2014) divides the
    second sum by ``1 - sum_i w_i^2``, and does not punish an ensemble for being small.

    :param truth: ``(...)``.
    :param draws: ``(N, ...)``.
    :param weights: ``(N,)``.
    :raises ValueError: if it shall be fair to a single draw, which has no spread to be judged by.
    """
    weights = weights.to(draws)
    spare = 1 - float(weights.square().sum()) if fair else 1.0
    if spare <= 1e-9:
        raise ValueError("crps: a single draw has no fair score; use fair=False.")
    error = mean((draws - truth).abs(), weights)
    # sum_ij w_i w_j |x_i - x_j| = 2 sum_k w_k x_k (W_k + W_{k-1} - 1), sorted.
    values, order = draws.sort(0)
    sorted_weights = weights[order]
    total = sorted_weights.cumsum(0)
    spread = (sorted_weights * values * (2 * total - sorted_weights - 1)).sum(0)
    return error - spread / spare


def diversity(draws: Tensor, weights: Tensor) -> float:
    """Return the root mean squared difference of two draws, over pairs and pixels."""
    return float((2 * sd(draws, weights).square().mean()).sqrt())
