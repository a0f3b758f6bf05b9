"""Images as short sequences of tokens, and back: a convolutional autoencoder with sign codes.

Every patch of 4 x 4 pixels becomes one of ``K = 2**b`` tokens (:mod:`ppl_diffusion.denoisers.lfq`),
row by row::

    encode:  image -> tanh of b numbers a patch -> their signs -> ids      (no gradient)
    decode:  ids -> rows of the codebook in {-1, +1}^b -> image            (smooth in the rows)

A prior over the tokens with the decoder on top is a prior over images. The decoder is defined at
every point between the codes, which guides of measurements differentiate through; nothing is
normalised over the batch and nothing is clipped, so that rows do not see each other and no gradient
is cut off.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.files import read_network, write_network
from ppl_diffusion.denoisers.lfq import lfq_codebook, lfq_ids

STRIDE = 4
"""Pixels along one side of the patch that a token stands for."""


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Shape of an :class:`ImageCodec`.

    :param height: of the images in pixels, a multiple of :data:`STRIDE`, as ``width`` is.
    :param channels: 1 for grey, 3 for colour.
    :param num_bits: bits ``b`` of a token.
    :param features: channels of the convolutions at full resolution; twice as many below.
    :raises ValueError: if a number is too small, or a side is no multiple of the stride.
    """

    height: int
    width: int
    channels: int = 1
    num_bits: int = 6
    features: int = 32

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        if min(sides) < STRIDE or any(side % STRIDE for side in sides):
            raise ValueError(
                f"CodecConfig: images of {self.height} x {self.width} pixels; pad or resize the "
                f"sides to multiples of {STRIDE}."
            )
        if self.channels < 1 or self.features < 1 or not 1 <= self.num_bits <= 16:
            raise ValueError(
                f"CodecConfig: {self.channels} channels, {self.features} features and "
                f"{self.num_bits} bits; give at least one of each, and at most 16 bits."
            )


class ImageCodec(nn.Module):
    """An autoencoder of images in [-1, 1] whose code is one token for every 4 x 4 pixels.

    :param config: shape of images, tokens and network.

    :ivar codebook: what the decoder reads of each token, ``(K, b)`` in {-1, +1}.
    :ivar length: tokens ``L`` of an image.
    :ivar image_shape: ``(C, H, W)``.
    """

    codebook: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (config.channels, config.height, config.width)
        self.grid = (config.height // STRIDE, config.width // STRIDE)
        self.length = self.grid[0] * self.grid[1]
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.register_buffer("codebook", lfq_codebook(config.num_bits), persistent=False)

    @property
    def vocab_size(self) -> int:
        """Number ``K`` of tokens."""
        return len(self.codebook)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens of images.

        :param images: ``(*n, C, H, W)`` in [-1, 1].
        :returns: int64 ``(*n, L)``.
        :raises ValueError: if the images have another shape.
        """
        return lfq_ids(self.latents(images))

    def latents(self, images: Tensor) -> Tensor:
        """Return what the signs are taken of, ``(*n, L, b)`` in (-1, 1), with gradient."""
        if tuple(images.shape[-3:]) != self.image_shape:
            raise ValueError(
                f"ImageCodec: images of shape {tuple(images.shape)}, but it reads (*n, "
                f"{', '.join(map(str, self.image_shape))}); resize or pad them."
            )
        flat = images.to(self.codebook.dtype).reshape(-1, *self.image_shape)
        maps = torch.tanh(self.encoder(flat))
        return maps.flatten(2).transpose(1, 2).reshape(*images.shape[:-3], self.length, -1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens.

        :param tokens: int64 ``(*n, L)``, ids below ``K``.
        :returns: ``(*n, C, H, W)``, about in [-1, 1].
        :raises ValueError: if the number of tokens is another one.
        """
        return self.decode_embedded(self.codebook[tokens])

    def decode_embedded(self, embeddings: Tensor) -> Tensor:
        """Return the images of points of the embedding space, differentiable in them.

        :param embeddings: ``(*n, L, b)``.
        :returns: ``(*n, C, H, W)``.
        :raises ValueError: if the last two sides are others.
        """
        wanted = (self.length, self.config.num_bits)
        if tuple(embeddings.shape[-2:]) != wanted:
            raise ValueError(
                f"ImageCodec: embeddings of shape {tuple(embeddings.shape)}, but it decodes (*n, "
                f"{wanted[0]}, {wanted[1]}): {wanted[0]} tokens an image."
            )
        flat = embeddings.reshape(-1, *wanted).transpose(1, 2)
        images: Tensor = self.decoder(flat.unflatten(-1, self.grid))
        return images.reshape(*embeddings.shape[:-2], *self.image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images that the tokens of images stand for."""
        return self.decode(self.encode(images))

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; reading them back gives the same bits.

        :param folder: made if it is absent.
        """
        write_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote, in evaluation mode and without gradients of the weights.

        :raises FileNotFoundError: if a file is absent.
        :raises ValueError: if one is damaged, or they do not belong together.
        """
        return read_network(cls, CodecConfig, folder).requires_grad_(False)


class _Residual(nn.Module):
    """``x + conv(silu(conv(silu(x))))``, same shape."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(features, features, 3, padding=1)
        self.second = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(F.silu(self.first(F.silu(x))))
        return x + inner


def _encoder(config: CodecConfig) -> nn.Sequential:
    few, many = config.features, 2 * config.features
    return nn.Sequential(
        nn.Conv2d(config.channels, few, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(few, many, 4, stride=2, padding=1),
        _Residual(many),
        nn.SiLU(),
        nn.Conv2d(many, many, 4, stride=2, padding=1),
        _Residual(many),
        nn.SiLU(),
        nn.Conv2d(many, config.num_bits, 1),
    )


def _decoder(config: CodecConfig) -> nn.Sequential:
    few, many = config.features, 2 * config.features
    return nn.Sequential(
        nn.Conv2d(config.num_bits, many, 3, padding=1),
        _Residual(many),
        nn.SiLU(),
        nn.ConvTranspose2d(many, few, 4, stride=2, padding=1),
        _Residual(few),
        nn.SiLU(),
        nn.ConvTranspose2d(few, few, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(few, config.channels, 3, padding=1),
    )
