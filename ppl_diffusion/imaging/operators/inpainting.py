"""Pixels that are not seen.

Only kept pixels are measured: what a dropped one would contribute is a constant, whatever the
image, and would only blur what the residual says (its expectation is one per *measured* number).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.imaging.operators.base import Operator, Parameters, Shape, register


class Inpainting(Operator):
    """Some pixels are kept, in all channels alike; ``parameters["mask"]`` is true there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, kept pixels)``."""
        return self.image_shape[0], int(self.parameters["mask"].sum())

    def measure(self, images: Tensor) -> Tensor:
        """Return the kept pixels, row by row."""
        return images[..., self.parameters["mask"].to(images.device)]

    def invert(self, measured: Tensor) -> Tensor:
        """Return them in their places, and their mean elsewhere."""
        return self._placed(measured, measured.mean(-1)[..., None, None])

    def picture(self, y: Tensor) -> Tensor:
        """Return the kept pixels in their places, NaN elsewhere."""
        return self._placed(self._unflattened(y), torch.tensor(math.nan))[0]

    def _placed(self, measured: Tensor, elsewhere: Tensor) -> Tensor:
        images = elsewhere.to(measured).expand(len(measured), *self.image_shape).clone()
        images[..., self.parameters["mask"].to(measured.device)] = measured
        return images


@register
class RandomInpainting(Inpainting):
    """A random share of the pixels is kept."""

    name = "rinp"

    @classmethod
    def draw_parameters(
        cls, image_shape: Shape, rng: np.random.Generator, keep: float = 0.3
    ) -> Parameters:
        """Draw which.

        :param keep: share that is kept.
        :raises ValueError: if that is no pixel, or no share.
        """
        _, height, width = image_shape
        kept = round(keep * height * width) if 0.0 < keep <= 1.0 else 0
        if not kept:
            raise ValueError(
                f"The operator {cls.name} cannot keep a share of {keep}: give one above 0 and at "
                "most 1, large enough for a pixel."
            )
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[torch.from_numpy(rng.permutation(height * width)[:kept])] = True
        return {"mask": mask.reshape(height, width)}


@register
class BoxInpainting(Inpainting):
    """A hole in the middle, half as high and half as wide as the image."""

    name = "box"

    @classmethod
    def draw_parameters(
        cls, image_shape: Shape, rng: np.random.Generator, height: int = 0, width: int = 0
    ) -> Parameters:
        """Return the mask; nothing is random.

        :param height: of the hole in pixels, half of the image if 0.
        :param width: likewise.
        :raises ValueError: if nothing is left beside it.
        """
        _, rows, columns = image_shape
        height, width = height or rows // 2, width or columns // 2
        if not (0 < height <= rows and 0 < width <= columns and height * width < rows * columns):
            raise ValueError(
                f"The operator {cls.name} cannot cut {height} x {width} pixels out of "
                f"{rows} x {columns}: give a hole that leaves some."
            )
        mask = torch.ones(rows, columns, dtype=torch.bool)
        top, left = (rows - height) // 2, (columns - width) // 2
        mask[top : top + height, left : left + width] = False
        return {"mask": mask}
