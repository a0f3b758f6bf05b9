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
DRAWS = 512
"""Draws of the image, where the error of the codec is one more thing that is random."""
DRAW, EXPECTED = "heaviest draw", "expected, heaviest tokens"
"""What the restored image is: without the error of the codec, and with it."""


@dataclass(frozen=True)
class Images:
    """The distinct images of a result, heaviest first.

    :param images: ``(M, C, H, W)``, clipped to [-1, 1].
    :param tokens: their sequences, int64 ``(M, L)``.
    :param weights: pooled over the runs, float64 ``(M,)``; they sum to one.
    :param log_likelihood: of the data, ``(M,)``.
    :param draws: of the law of the image, ``(D, C, H, W)``, by ``draw_weights``: the same images,
        or where the error of the codec is counted draws with it, of equal weight.
    :param kind: what one of ``images`` is: a draw, or where the error of the codec is counted the
        image that is expected given the tokens.
    """

    images: Tensor
    tokens: Tensor
    weights: Tensor
    log_likelihood: Tensor
    draws: Tensor
    draw_weights: Tensor
    kind: str

    @property
    def restored(self) -> Tensor:
        """The image of the heaviest tokens, ``(C, H, W)``; of equally heavy ones the likeliest.

        A draw, or where the error of the codec is counted the expected image given the tokens.
        """
        return self.images[0]

    @property
    def mean(self) -> Tensor:
        """The posterior mean, ``(C, H, W)``: of the clipped draws, as :attr:`sd` and the ends of
        :attr:`interval`.
        """
        return weighted.mean(self.draws, self.draw_weights)

    @property
    def sd(self) -> Tensor:
        """The standard deviation of every pixel, ``(C, H, W)``."""
        return weighted.sd(self.draws, self.draw_weights)

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """The ends of the central 90 % interval of every pixel, each ``(C, H, W)``."""
        return weighted.interval(self.draws, self.draw_weights)


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
    tokens, weights = tokens[kept], weights[kept]
    images = expected(target, tokens)
    draws, draw_weights, kind = images, weights, DRAW
    if target.error is not None:
        generator = torch.Generator().manual_seed(target.job.search.seed)
        draws = sampled(target, tokens[_shares(weights, generator)], generator)
        draw_weights = torch.full((DRAWS,), 1.0 / DRAWS, dtype=torch.float64)
        kind = EXPECTED
    return Images(images, tokens, weights, log_g[kept], draws, draw_weights, kind)


def _shares(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return a row for each draw: every row as often as its weight says, give or take one."""
    points = torch.arange(DRAWS) + torch.rand(1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(weights.cumsum(0), points / DRAWS).clamp_max(len(weights) - 1)


def expected(target: Target, tokens: Tensor) -> Tensor:
    """Return the images that sequences stand for, ``(n, C, H, W)``, clipped to [-1, 1].

    :param tokens: int64 ``(n, L)``.
    """
    images = decoded(target, tokens)
    return images if target.error is None else target.error.expected(images).clamp(-1.0, 1.0)


def sampled(target: Target, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return a draw of the image for each sequence, with the error of the codec if it counts.

    :param tokens: int64 ``(n, L)``.
    """
    images = decoded(target, tokens)
    if target.error is None:
        return images
    return target.error.sample(images, generator=generator).clamp(-1.0, 1.0)


@torch.no_grad()
def decoded(target: Target, tokens: Tensor) -> Tensor:
    """Return the decoded images of sequences, ``(n, C, H, W)``, clipped to [-1, 1].

    :param tokens: int64 ``(n, L)``.
    """
    device = target.codec.codebook.device
    parts = [target.codec.decode(rows.to(device)).cpu() for rows in tokens.split(_ROWS)]
    return torch.cat(parts).clamp(-1.0, 1.0)
