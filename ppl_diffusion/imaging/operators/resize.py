"""Fewer pixels: super-resolution is what undoes it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ppl_diffusion.imaging.operators.base import Operator, Parameters, Shape, register


@register
class SuperResolution(Operator):
    """Bicubic resize with antialiasing: the kernel is stretched by the factor.

    The convention of Pillow, and of the code of DAPS and G2D2.
    """

    name = "sr"
    number = "factor"

    @classmethod
    def draw_parameters(
        cls, image_shape: Shape, rng: np.random.Generator, factor: int = 4
    ) -> Parameters:
        """Return the factor; nothing is random.

        :param factor: by which height and width shrink.
        :raises ValueError: if it does not divide them.
        """
        _, height, width = image_shape
        if factor < 1 or height % factor or width % factor:
            common = math.gcd(height, width)
            fitting = (f"{cls.name}{n}" for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"The factor {factor} of the operator {cls.name} does not divide height and width "
                f"of {height} x {width} pixels: choose one of {', '.join(fitting)}."
            )
        return {"factor": torch.tensor(factor)}

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H / factor, W / factor)``."""
        channels, height, width = self.image_shape
        factor = int(self.parameters["factor"])
        return channels, height // factor, width // factor

    def measure(self, images: Tensor) -> Tensor:
        """Return small images."""
        return interpolate(images, size=self.shape[1:], mode="bicubic", antialias=True)

    def invert(self, measured: Tensor) -> Tensor:
        """Return them enlarged, bicubically."""
        return interpolate(measured, size=self.image_shape[1:], mode="bicubic")
