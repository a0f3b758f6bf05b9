"""How each shipped codec and classifier of images is trained, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ImageTaskName = Literal["codec", "classifier"]


@dataclass(frozen=True)
class ImageRecipe:
    """A training run of a network of images, all of it but the seed.

    :param task: what is trained, a codec or a classifier.
    :param dataset: a key of :data:`ppl_diffusion.models.image_data.IMAGE_READERS`.
    :param shape: fields of :class:`~ppl_diffusion.imaging.CodecConfig` or
        :class:`~ppl_diffusion.imaging.ClassifierConfig` that the images do not decide.
    :param steps: optimiser steps, of ``batch_size`` images each.
    :param learning_rate: peak of the cosine schedule (AdamW), after ``warmup`` linear steps.
    :param shift: images move by up to so many pixels either way.
    :param commitment: weight of the distance of latents to their codes, of a codec.
    :param balance: weight of what its bits lack of full entropy.
    :param validate_every: steps between validations; the best network is kept.
    """

    task: ImageTaskName
    dataset: str
    shape: dict[str, Any] = field(default_factory=dict)
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    shift: int = 1
    commitment: float = 0.02
    balance: float = 0.02
    validate_every: int = 250


# Where most of an image is one colour the bits need more balance: with 0.02 all of them froze.
_EIGHT_BITS = {"num_bits": 8, "features": 24}

IMAGE_RECIPES: dict[str, ImageRecipe] = {
    "digits-codec": ImageRecipe("codec", "digits", {"num_bits": 6}, steps=2500),
    "digits-classifier": ImageRecipe("classifier", "digits", steps=4000),
    "mnist-codec": ImageRecipe(
        "codec", "mnist", _EIGHT_BITS, steps=1500, batch_size=32, balance=0.2
    ),
    "faces-codec": ImageRecipe(
        "codec", "faces", _EIGHT_BITS, steps=1500, batch_size=32, balance=0.2, shift=2
    ),
}
