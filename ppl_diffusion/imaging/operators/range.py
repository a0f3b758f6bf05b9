"""A camera whose range is too small."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.imaging.operators.base import Operator, Parameters, Shape, register


@register
class HighDynamicRange(Operator):
    """Twice the contrast, clipped: ``clip(2 u, -1, 1)``. Clipped pixels have no gradient."""

    name = "hdr"
    linear = False

    @classmethod
    def draw_parameters(
        cls, image_shape: Shape, rng: np.random.Generator, scale: float = 2.0
    ) -> Parameters:
        """Return the scale; nothing is random.

        :param scale: of the contrast, positive.
        """
        if not scale > 0:
            raise ValueError(
                f"The scale of the operator {cls.name} is {scale}: give a positive number."
            )
        return {"scale": torch.tensor(scale, dtype=torch.float64)}

    def measure(self, images: Tensor) -> Tensor:
        """Return clipped images."""
        return (float(self.parameters["scale"]) * images).clamp(-1.0, 1.0)

    def invert(self, measured: Tensor) -> Tensor:
        """Return the contrast taken back; what was clipped stays at the edge of the range."""
        return measured / float(self.parameters["scale"])
