"""What restored images are worth, and how methods compare image by image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks._restore_methods import Restored
from ppl_diffusion.imaging import weighted
from ppl_diffusion.imaging.classifier import ImageClassifier
from ppl_diffusion.imaging.files import fitted
from ppl_diffusion.imaging.measurement import Measurement
from ppl_diffusion.imaging.metrics import perceptual, psnr, ssim, unit


@dataclass(frozen=True)
class Scores:
    """Figures of one image restored by one method.

    :param psnr: of the image that a method stands by, in decibels: the single one, or the weighted
        mean of its draws.
    :param sample_psnr: of one draw, on average.
    :param ssim: of the same image as ``psnr``, as are ``perceptual`` and ``residual``.
    :param residual: ``||y - A(u)||^2 / (m sigma^2)``: below one the noise is fitted.
    :param coverage: share of pixels whose truth lies in the central 90 % interval of the draws.
    :param crps: mean over pixels, on [0, 1].
    :param diversity: root mean squared difference of two draws, on [0, 1].
    """

    psnr: float
    sample_psnr: float
    ssim: float
    perceptual: float
    residual: float
    coverage: float
    crps: float
    diversity: float
    denoiser_rows: float
    decoder_forward: float
    decoder_backward: float
    seconds: float


def score(
    restored: Restored, truth: Tensor, measurement: Measurement, network: ImageClassifier
) -> Scores:
    """Return the figures of a restored image.

    :param truth: ``(C, H, W)``.
    :param network: by whose features images are compared, in its own size and colours.
    """
    images, weights = restored.images.clamp(-1.0, 1.0), restored.weights.double()
    best = restored.mean.clamp(-1.0, 1.0)
    draws, real = unit(images), unit(truth)
    each = psnr(images, truth).double()
    return Scores(
        psnr=float(psnr(best, truth)),
        sample_psnr=float((weights * each).sum()),
        ssim=float(ssim(best, truth)),
        perceptual=float(perceptual(*_as_read_by(network, best, truth), network)),
        residual=float(measurement.residual(best)),
        coverage=weighted.coverage(real, draws, weights),
        crps=float(weighted.crps(real, draws, weights).mean()),
        diversity=weighted.diversity(draws, weights),
        denoiser_rows=restored.denoiser_rows,
        decoder_forward=restored.decoder_forward,
        decoder_backward=restored.decoder_backward,
        seconds=restored.seconds,
    )


def _as_read_by(network: ImageClassifier, *images: Tensor) -> Iterator[Tensor]:
    for image in images:
        yield fitted(image, network.image_shape, name="an image", resize=True)


def mean_of(scores: Sequence[Scores]) -> dict[str, float]:
    """Return the mean of each figure."""
    names = asdict(scores[0])
    return {name: sum(getattr(s, name) for s in scores) / len(scores) for name in names}


def paired(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of two methods on the same images, and its standard error."""
    gap = torch.tensor(left, dtype=torch.float64) - torch.tensor(right, dtype=torch.float64)
    error = float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return float(gap.mean()), error


def wins(values: Mapping[str, Mapping[str, float]], ours: str, rival: str) -> int:
    """Return on how many tasks one method has the higher mean.

    :param values: means by task and method.
    """
    return sum(by[ours] > by[rival] for by in values.values())
