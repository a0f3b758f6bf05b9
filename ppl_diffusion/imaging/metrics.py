"""How good a restored image is. Images are in [-1, 1]; figures are on [0, 1], after clamping.

Fidelity and residual cannot tell an optimiser from a sampler: see
:mod:`ppl_diffusion.imaging.weighted` for what weighted draws are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

WINDOW, SMALL = 7, 32
"""Window of the similarity, uniform, of images below 32 pixels; larger ones have a Gaussian."""


class Features(Protocol):
    """A network by whose features images are compared."""

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Return one tensor per layer, each ``(n, channels, h, w)``."""


def unit(images: Tensor) -> Tensor:
    """Return images on [0, 1], clamped."""
    return ((images + 1) / 2).clamp(0.0, 1.0)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in decibels, ``(*n)``; infinite where all is right.

    :param images: ``(*n, C, H, W)``.
    :param truth: ``(C, H, W)``, or one for each.
    """
    error = (unit(images) - unit(truth)).square().mean((-3, -2, -1))
    return -10 * error.log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of scikit-image, ``(*n)``.

    Images below 32 pixels have uniform windows of 7 x 7, others Gaussian ones of 11 x 11.

    :param images: ``(*n, C, H, W)``, at least 7 pixels high and wide.
    :param truth: ``(C, H, W)``, or one for each.
    :raises ModuleNotFoundError: without scikit-image.
    """
    from skimage.metrics import structural_similarity

    side = min(images.shape[-2:])
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    window = {"win_size": WINDOW} if side < SMALL else gaussian
    found, wanted = (unit(x).double().cpu().flatten(0, -4).numpy() for x in _alike(images, truth))
    values = [
        structural_similarity(b, a, data_range=1, channel_axis=0, **window)
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(images.shape[:-3])


def perceptual(images: Tensor, truth: Tensor, network: Features) -> Tensor:
    """Return a distance of features, ``(*n)``: a stand-in for LPIPS, and not LPIPS.

    The mean over layers of squared distances of features that have unit length over their channels,
    each averaged over positions. LPIPS has weights fitted to people's judgements, and a network
    that knows photographs.

    :param images: ``(*n, C, H, W)``.
    :param truth: ``(C, H, W)``, or one for each.
    :param network: has ``features(images)``, one tensor per layer, channels second.
    """
    batch = images.shape[:-3]
    with torch.no_grad():
        found, wanted = (network.features(x.flatten(0, -4)) for x in _alike(images, truth))
    layers = [
        (_normalised(a) - _normalised(b)).square().sum(1).flatten(1).mean(1)
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.stack(layers).mean(0).reshape(batch)


def _alike(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with one leading dimension at least, one truth for each image."""
    one = images[None] if images.ndim == 3 else images
    return one, truth.expand_as(one)


def _normalised(features: Tensor) -> Tensor:
    return features / features.norm(dim=1, keepdim=True).clamp_min(1e-10)
