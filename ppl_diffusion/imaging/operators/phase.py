"""Diffraction: the size of a Fourier transform is seen, its phase is not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ppl_diffusion.imaging.operators.base import Operator, Parameters, Shape, register

_ITERATIONS, _POLISHING, _FEEDBACK = 200, 50, 0.9


@register
class PhaseRetrieval(Operator):
    """Magnitudes of the centred, unitary Fourier transform of an image in [0, 1] with a dark rim.

    A quarter of the side is added at each edge. An image and itself turned upside down are measured
    alike, and so is one that is moved within the dark rim: the posterior has several modes.
    """

    name = "phase"
    linear = False

    @classmethod
    def draw_parameters(cls, image_shape: Shape, rng: np.random.Generator) -> Parameters:
        """Return nothing: there is nothing to choose."""
        return {}

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H + 2 (H // 4), W + 2 (W // 4))``."""
        channels, height, width = self.image_shape
        return channels, height + 2 * (height // 4), width + 2 * (width // 4)

    def measure(self, images: Tensor) -> Tensor:
        """Return magnitudes."""
        transform = torch.fft.fft2(self._padded((images + 1) / 2), norm="ortho")
        return torch.fft.fftshift(transform, dim=(-2, -1)).abs()

    def invert(self, measured: Tensor) -> Tensor:
        """Return what hybrid input-output finds from a grey start (Fienup 1982, section IV).

        One of several images that explain the data, if it finds one at all.
        """
        size = torch.fft.ifftshift(measured.clamp_min(0.0), dim=(-2, -1))
        _, height, width = self.image_shape
        # Slightly uneven: a start that equals itself upside down would stay so.
        ramp = torch.linspace(0.4, 0.6, height * width).to(measured).reshape(height, width)
        inside = self._padded(torch.ones_like(ramp)[None]).bool()
        image = self._padded(ramp[None].expand(len(measured), *self.image_shape))
        for step in range(_ITERATIONS + _POLISHING):
            phase = torch.fft.fft2(image, norm="ortho").angle()
            found = torch.fft.ifft2(torch.polar(size, phase), norm="ortho").real
            kept = inside & (found >= 0) & (found <= 1)
            feedback = image - _FEEDBACK * found if step < _ITERATIONS else 0 * found
            image = torch.where(kept, found, feedback)
        top, left = height // 4, width // 4
        return 2 * image[..., top : top + height, left : left + width] - 1

    def picture(self, y: Tensor) -> Tensor:
        """Return magnitudes on a logarithmic scale, darkest -1 and brightest 1."""
        log = self._unflattened(y)[0].clamp_min(0.0).log1p()
        return 2 * log / log.max().clamp_min(1e-12) - 1

    def _padded(self, images: Tensor) -> Tensor:
        _, height, width = self.image_shape
        return pad(images, (width // 4, width // 4, height // 4, height // 4))
