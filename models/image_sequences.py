"""Images as the sequences of a prior: the tokens of a shipped codec, with the classes as labels."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ppl_diffusion.imaging.codec import ImageCodec
from ppl_diffusion.models.image_data import Images, load_images, shifted
from ppl_diffusion.models.image_files import load_codec
from ppl_diffusion.models.sequences import Sequences, unrelated

_FIRST_SYMBOL = 0x2800  # braille patterns: 256 symbols with eight dots for eight bits


def code_symbols(size: int) -> str:
    """Return one symbol for each token of a codec, the braille patterns in their order."""
    if size > 256:
        raise ValueError(f"code_symbols: {size} tokens, but there are 256 braille patterns.")
    return "".join(chr(_FIRST_SYMBOL + code) for code in range(size))


def image_sequences(name: str, folder: str | Path | None = None, *, shift: int = 0) -> Sequences:
    """Read a set of images as tokens of its codec, ``NAME-codec``.

    :param name: a key of :data:`~ppl_diffusion.models.image_data.IMAGE_READERS`.
    :param folder: the data folder, where it is needed.
    :param shift: training images are taken at every shift by up to so many pixels either way.
    """
    images, codec = load_images(name, folder), load_codec(f"{name}-codec")
    return encoded(images, codec, f"{name}-codec", shift=shift)


def encoded(images: Images, codec: ImageCodec, name: str, *, shift: int = 0) -> Sequences:
    """Return the tokens of images.

    :param name: what the codec is called.
    """
    moves = torch.tensor(list(product(range(-shift, shift + 1), repeat=2)))
    train = torch.cat([_tokens(codec, _moved(images, move)) for move in moves])
    return unrelated(
        [train, *(_tokens(codec, part) for part in (images.valid, images.test))],
        licence=images.licence,
        source=f"{images.source} Tokens of the codec {name}.",
        vocabulary=code_symbols(codec.vocab_size),
        noun=f"tokens of {images.noun}",
        unit="token",
        labels=(images.labels[0].repeat(len(moves)), *images.labels[1:]),
        codec=name,
        bundled=images.bundled,
    )


def _moved(images: Images, move: Tensor) -> Tensor:
    return shifted(images.train, move.expand(len(images.train), 2), images.edge)


def _tokens(codec: ImageCodec, images: Tensor) -> Tensor:
    return torch.cat([codec.encode(part) for part in images.split(512)])
