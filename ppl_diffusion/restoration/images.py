"""The distinct images of a result, with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.imaging import weighted
from ppl_diffusion.restoration.target import Target

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior

_ROWS = 256
"""Images decoded at a time."""


@dataclass(frozen=True)
class Images:
    """The distinct images of a result, heaviest first.

    :param images: ``(M, C, H, W)``, clipped to [-1, 1].
    :param tokens: their sequences, int64 ``(M, L)``.
    :param weights: pooled over the runs, float64 ``(M,)``; they sum to one.
    :param log_likelihood: of the data, ``(M,)``.
    """

    images: Tensor
    tokens: Tensor
    weights: Tensor
    log_likelihood: Tensor

    @property
    def restored(self) -> Tensor:
        """The heaviest image, ``(C, H, W)``; of equally heavy ones that of the best likelihood."""
        return self.images[0]

    @property
    def mean(self) -> Tensor:
        """The posterior mean, ``(C, H, W)``."""
        return weighted.mean(self.images, self.weights)

    @property
    def sd(self) -> Tensor:
        """The standard deviation of every pixel, ``(C, H, W)``."""
        return weighted.sd(self.images, self.weights)

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """The ends of the central 90 % interval of every pixel, each ``(C, H, W)``."""
        return weighted.interval(self.images, self.weights)


def decode(target: Target, posterior: ParticlePosterior) -> Images:
    """Return the distinct images of a result.

    :raises ParticleCollapse: if no run is alive.
    """
    each = posterior.pooled_log_weights.exp().flatten()
    rows = posterior.x0.flatten(0, 1)
    tokens, inverse = rows.unique(dim=0, return_inverse=True)
    weights = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, inverse, each)
    log_g = torch.zeros(len(tokens), dtype=torch.float64)
    log_g[inverse] = posterior.log_potential.flatten().double()
    # Equal weights differ by rounding: those of an unweighted method are to tie.
    order = sorted(range(len(tokens)), key=lambda m: (-round(float(weights[m]), 9), -log_g[m]))
    kept = [m for m in order if weights[m] > 0]
    images = decoded(target, tokens[kept])
    return Images(images, tokens[kept], weights[kept], log_g[kept])


@torch.no_grad()
def decoded(target: Target, tokens: Tensor) -> Tensor:
    """Return the images of sequences, ``(n, C, H, W)``, clipped to [-1, 1].

    :param tokens: int64 ``(n, L)``.
    """
    device = target.codec.codebook.device
    parts = [target.codec.decode(rows.to(device)).cpu() for rows in tokens.split(_ROWS)]
    return torch.cat(parts).clamp(-1.0, 1.0)
