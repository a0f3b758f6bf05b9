"""Editing a block of an image: what lies outside is held, what lies inside is drawn anew.

Outside is held exactly where it is held as tokens (a prompt, or a clamp, which also pays for them):
no step moves them. A decoder sees across the edge of a block, so that pixels beside it may change
with the tokens inside; a likelihood of the outside pixels keeps these, too, within its noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.potentials.embedded import GaussianMeasurement


@dataclass(frozen=True)
class Block:
    """A rectangle of pixels.

    :param top: first row of pixels, as ``left`` is the first column.
    :param height: rows, as ``width`` is the number of columns.
    """

    top: int
    left: int
    height: int
    width: int

    def pixels(self, codec: ImageCodec) -> Tensor:
        """Return which pixels lie inside, bool ``(H, W)``.

        :raises ValueError: if the block is empty, or does not lie in the image.
        """
        _, high, wide = codec.image_shape
        bottom, right = self.top + self.height, self.left + self.width
        whole = 0 <= self.top < bottom <= high and 0 <= self.left < right <= wide
        if not whole:
            raise ValueError(
                f"Block: rows {self.top} to {bottom} and columns {self.left} to {right} are no "
                f"block of an image of {high} x {wide} pixels; choose one that lies inside."
            )
        inside = torch.zeros(high, wide, dtype=torch.bool)
        inside[self.top : bottom, self.left : right] = True
        return inside

    def tokens(self, codec: ImageCodec) -> Tensor:
        """Return which tokens stand for a pixel inside, bool ``(L,)``."""
        rows, columns = codec.grid
        patches = self.pixels(codec).reshape(rows, -1, columns, codec.image_shape[2] // columns)
        return patches.any(3).any(1).flatten()


def block_prompt(codec: ImageCodec, image: Tensor, block: Block) -> Tensor:
    """Return the tokens outside of a block, as a prompt for chains: -1 inside.

    :param image: ``(C, H, W)`` in [-1, 1].
    :returns: int64 ``(L,)``.
    """
    return torch.where(block.tokens(codec), -1, codec.encode(image))


def outside_pixels(
    codec: ImageCodec, image: Tensor, block: Block, sigma: float
) -> GaussianMeasurement:
    """Return the likelihood of the pixels outside of a block.

    :param image: what is to be kept, ``(C, H, W)`` in [-1, 1].
    :param sigma: how far a pixel may go: its standard deviation.
    """
    kept = ~block.pixels(codec)
    return GaussianMeasurement(
        lambda e: codec.decode_embedded(e)[..., kept].flatten(-2),
        image[:, kept].flatten(),
        sigma,
        codec.codebook,
        name="pixels outside of the block",
    )
