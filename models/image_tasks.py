"""What is learnt from images: to come back from their tokens, or their classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.lfq import commitment, imbalance, straight_through
from ppl_diffusion.imaging.classifier import ClassifierConfig, ImageClassifier
from ppl_diffusion.imaging.codec import CodecConfig, ImageCodec
from ppl_diffusion.imaging.metrics import psnr
from ppl_diffusion.models.image_data import Images
from ppl_diffusion.models.image_recipes import ImageRecipe

Network = TypeVar("Network", ImageCodec, ImageClassifier)


class ImageTask(ABC, Generic[Network]):
    """A network of images, what a step of its training minimises, and how it is judged.

    :param recipe: the weights of the loss.
    :cvar score_name: what :meth:`score` is called; higher is better.
    """

    score_name: ClassVar[str]

    def __init__(self, recipe: ImageRecipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def build(self, images: Images) -> Network:
        """Return an untrained network for images of this shape."""

    @abstractmethod
    def load(self, folder: Path) -> Network:
        """Return a network that was saved."""

    @abstractmethod
    def loss(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        """Return what a step minimises, a scalar."""

    @abstractmethod
    def scores(self, network: Network, images: Tensor, labels: Tensor) -> Tensor:
        """Return how good the network is at each image, ``(n,)``."""


class CodecTask(ImageTask[ImageCodec]):
    """Mean squared error, with a little commitment and balanced bits."""

    score_name: ClassVar[str] = "PSNR in dB"

    def build(self, images: Images) -> ImageCodec:
        """Return an untrained codec."""
        return ImageCodec(CodecConfig(**_sides(images), **self.recipe.shape))

    def load(self, folder: Path) -> ImageCodec:
        """Return a saved codec."""
        return ImageCodec.load(folder)

    def loss(self, network: ImageCodec, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss; classes do not matter."""
        e = network.latents(images)
        error = F.mse_loss(network.decode_embedded(straight_through(e)), images)
        recipe = self.recipe
        return error + recipe.commitment * commitment(e) + recipe.balance * imbalance(e)

    def scores(self, network: ImageCodec, images: Tensor, labels: Tensor) -> Tensor:
        """Return the PSNR of each image after encoding and decoding, clipped to [-1, 1]."""
        return psnr(network(images), images)


class ClassifierTask(ImageTask[ImageClassifier]):
    """Cross-entropy of the classes."""

    score_name: ClassVar[str] = "accuracy"

    def build(self, images: Images) -> ImageClassifier:
        """Return an untrained classifier."""
        shape: dict[str, Any] = {"num_classes": images.num_classes, **self.recipe.shape}
        return ImageClassifier(ClassifierConfig(**_sides(images), **shape))

    def load(self, folder: Path) -> ImageClassifier:
        """Return a saved classifier."""
        return ImageClassifier.load(folder)

    def loss(self, network: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(network(images), labels)

    def scores(self, network: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
        """Return 1 where the class is right, 0 elsewhere."""
        return (network(images).argmax(-1) == labels).to(torch.float32)


IMAGE_TASKS: dict[str, type[CodecTask] | type[ClassifierTask]] = {
    "codec": CodecTask,
    "classifier": ClassifierTask,
}


def _sides(images: Images) -> dict[str, int]:
    channels, height, width = images.image_shape
    return {"channels": channels, "height": height, "width": width}
