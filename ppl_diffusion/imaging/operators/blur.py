"""Blurs: each pixel is an average of its neighbours, mirrored at the border.

A border without repetition of its pixel: "reflect" for torch, "mirror" for ``scipy.ndimage``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad, unfold

from ppl_diffusion.imaging.operators.base import Operator, Parameters, Shape, register
from ppl_diffusion.imaging.operators.inverses import damped_least_squares

GAUSSIAN: Mapping[int, tuple[int, float]] = {16: (5, 1.0), 32: (9, 1.5), 256: (61, 3.0)}
"""Width and standard deviation of the Gaussian kernel in pixels, by the side of the image."""
MOTION: Mapping[int, int] = {16: 5, 32: 9, 256: 61}
"""Length of the path of motion in pixels, by the side of the image."""
Entry = TypeVar("Entry")
_GAMMA = 2.2
_DARKEST = 1e-8
"""Of linear light: a root has no slope at zero."""


def for_side(table: Mapping[int, Entry], image_shape: Shape) -> Entry:
    """Return the entry of a table for the size of an image: the nearest in octaves."""
    side = min(image_shape[1:])
    return table[min(table, key=lambda known: abs(math.log2(known / side)))]


class Blur(Operator):
    """The same kernel at every pixel, ``(w, w)`` with ``w`` odd, applied as a correlation."""

    def measure(self, images: Tensor) -> Tensor:
        """Return blurred images."""
        kernel = self.parameters["kernel"].to(images)
        channels, margin = images.shape[1], len(kernel) // 2
        padded = pad(images, (margin,) * 4, mode="reflect")
        return conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)

    def invert(self, measured: Tensor) -> Tensor:
        """Return damped least squares."""
        return damped_least_squares(self, measured)


@register
class GaussianBlur(Blur):
    """Blur with a Gaussian kernel."""

    name = "gblur"

    @classmethod
    def draw_parameters(
        cls,
        image_shape: Shape,
        rng: np.random.Generator,
        width: int | None = None,
        std: float | None = None,
    ) -> Parameters:
        """Return the kernel; nothing is random.

        :param width: of the kernel in pixels, odd; by the size of the image if None.
        :param std: its standard deviation in pixels, likewise.
        """
        usual = for_side(GAUSSIAN, image_shape)
        width = _fitting(cls.name, image_shape, usual[0] if width is None else width)
        return {"kernel": torch.from_numpy(gaussian(width, usual[1] if std is None else std))}


@register
class MotionBlur(Blur):
    """Blur along a random path: a line that bends as it goes."""

    name = "mblur"

    @classmethod
    def draw_parameters(
        cls,
        image_shape: Shape,
        rng: np.random.Generator,
        length: int | None = None,
        intensity: float = 0.5,
    ) -> Parameters:
        """Draw the path.

        :param length: of the path in pixels, and width of the kernel, odd; by the size of the
            image if None.
        :param intensity: standard deviation of the turn over the whole path in radians.
        """
        usual = for_side(MOTION, image_shape)
        width = _fitting(cls.name, image_shape, usual if length is None else length)
        return {"kernel": torch.from_numpy(motion(width, intensity, rng))}


@register
class NonlinearBlur(Operator):
    """Blur of light, not of grey values, stronger in some tiles than in others.

    Grey values are brought to linear light by a gamma of 2.2, blurred there, and brought back; each
    tile of 4 x 4 pixels has a Gaussian of its own, 7 pixels wide. (The published benchmarks have a
    network here, trained on a camera's blurs: this one can be written down.)
    """

    name = "nlblur"
    linear = False

    @classmethod
    def draw_parameters(
        cls,
        image_shape: Shape,
        rng: np.random.Generator,
        tile: int = 4,
        low: float = 0.5,
        high: float = 1.5,
    ) -> Parameters:
        """Draw the standard deviation of every tile.

        :param tile: side of a tile in pixels.
        :param low: smallest standard deviation in pixels.
        :param high: largest one.
        """
        _, height, width = image_shape
        _fitting(cls.name, image_shape, 7)
        std = rng.uniform(low, high, size=(-(-height // tile), -(-width // tile)))
        kernels = np.stack([gaussian(7, s) for s in std.flat]).reshape(*std.shape, 7, 7)
        each = kernels.repeat(tile, 0).repeat(tile, 1)[:height, :width]
        return {"std": torch.from_numpy(std), "kernels": torch.from_numpy(each.copy())}

    def measure(self, images: Tensor) -> Tensor:
        """Return blurred images."""
        light = ((images + 1) / 2).clamp_min(0.0) ** _GAMMA
        grey = self._blurred(light).clamp_min(_DARKEST) ** (1 / _GAMMA)
        return 2 * grey - 1

    def _blurred(self, light: Tensor) -> Tensor:
        batch, channels, height, width = light.shape
        kernels = self.parameters["kernels"].to(light).reshape(height * width, 49)
        padded = pad(light, (3,) * 4, mode="reflect")
        patches = unfold(padded, 7).reshape(batch, channels, 49, height * width)
        return torch.einsum("nckp,pk->ncp", patches, kernels).reshape(light.shape)

    def invert(self, measured: Tensor) -> Tensor:
        """Return what was measured: least squares would ask for a start, and this is a good one."""
        return measured


def gaussian(width: int, std: float) -> NDArray[np.float64]:
    """Return a Gaussian kernel, ``(width, width)``, that sums to one.

    :raises ValueError: if the standard deviation is not positive.
    """
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"The standard deviation of a blur is {std}: give a positive number.")
    line = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * std**2))
    kernel = np.outer(line, line)
    return np.asarray(kernel / kernel.sum())


def motion(width: int, intensity: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the kernel of a random path, ``(width, width)``, that sums to one.

    The path has length ``width - 1``, eight points per pixel, and its centre of mass in the middle;
    each point is shared by the four pixels around it.

    :param intensity: standard deviation of the turn over the whole path in radians.
    """
    points = 8 * (width - 1) + 1
    turns = rng.normal(0.0, intensity / math.sqrt(points), points).cumsum()
    heading = rng.uniform(0.0, 2 * math.pi) + turns
    path = np.stack([np.sin(heading), np.cos(heading)]).cumsum(1) / 8
    path += width // 2 - path.mean(1, keepdims=True)
    kernel = np.zeros((width, width))
    corner = np.clip(np.floor(path).astype(int), 0, max(width - 2, 0))
    share = np.clip(path - corner, 0.0, 1.0)
    for down, right in np.ndindex(min(2, width), min(2, width)):
        weight = np.where(down, share[0], 1 - share[0]) * np.where(right, share[1], 1 - share[1])
        np.add.at(kernel, (corner[0] + down, corner[1] + right), weight)
    return np.asarray(kernel / kernel.sum())


def _fitting(name: str, image_shape: Shape, width: int) -> int:
    """Refuse kernels that have no middle, or reach over the mirrored border."""
    side = min(image_shape[1:])
    if width < 1 or width % 2 == 0 or width // 2 >= side:
        raise ValueError(
            f"The operator {name} cannot blur {image_shape[1]} x {image_shape[2]} pixels with a "
            f"kernel of {width}: give an odd width, less than twice that of the image."
        )
    return width
