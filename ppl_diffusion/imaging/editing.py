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

_RANGE = 1.5  # a decoder overshoots [-1, 1] a little, and what it drew may be edited


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
        """Return which tokens stand for the pixels inside, bool ``(L,)``.

        :raises ValueError: if the block is empty, does not lie in the image, or cuts through the
            patch of a token, of which a part would not be held.
        """
        inside, (rows, columns) = self.pixels(codec), codec.grid
        high, wide = codec.image_shape[1] // rows, codec.image_shape[2] // columns
        if (fitting := self._on_grid(high, wide)) != self:
            raise ValueError(
                f"{self} cuts through patches of {high} x {wide} pixels, each of which is "
                f"one token; the nearest block of whole patches is {fitting}."
            )
        return inside.reshape(rows, high, columns, wide).any(3).any(1).flatten()

    def _on_grid(self, high: int, wide: int) -> Block:
        top, height = _whole(self.top, self.height, high)
        left, width = _whole(self.left, self.width, wide)
        return Block(top, left, height, width)


def block_prompt(codec: ImageCodec, image: Tensor, block: Block) -> Tensor:
    """Return the tokens outside of a block, as a prompt for chains: -1 inside.

    :param image: ``(C, H, W)`` in [-1, 1].
    :param block: made of whole patches, one for each token.
    :returns: int64 ``(L,)``.
    :raises ValueError: if the block does not fit, or the image has another range.
    """
    if not bool((image.abs() <= _RANGE).all()):
        raise ValueError(
            f"block_prompt: the image has values from {float(image.min()):g} to "
            f"{float(image.max()):g}, but the codec reads -1 to 1; rescale it."
        )
    return torch.where(block.tokens(codec), -1, codec.encode(image))


def outside_pixels(
    codec: ImageCodec, image: Tensor, block: Block, sigma: float
) -> GaussianMeasurement:
    """Return the likelihood of the pixels outside of a block.

    :param image: what is to be kept, ``(C, H, W)`` in [-1, 1].
    :param sigma: how far a pixel may go: its standard deviation.
    :raises ValueError: if the block does not lie in the image, or no pixel is outside.
    """
    kept = ~block.pixels(codec)
    if not bool(kept.any()):
        raise ValueError(
            f"outside_pixels: {block} is the whole image, so that no pixel is kept; choose a "
            "smaller block, or leave the likelihood out."
        )
    return GaussianMeasurement(
        lambda e: codec.decode_embedded(e)[..., kept].flatten(-2),
        image[:, kept].flatten(),
        sigma,
        codec.codebook,
        name="pixels outside of the block",
    )


def _whole(start: int, size: int, patch: int) -> tuple[int, int]:
    """Return start and size of the nearest run of whole patches, at least one."""
    first = (start + (patch - 1) // 2) // patch
    last = (start + size + patch // 2) // patch
    if last <= first:
        first, last = start // patch, start // patch + 1
    return first * patch, (last - first) * patch
