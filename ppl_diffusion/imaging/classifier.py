"""A small convolutional classifier of images, for its features as much as for its classes.

Distances between its feature maps stand in for perceptual distances where a network trained on
photographs (LPIPS, Zhang et al. 2018, arXiv 1801.03924) has no meaning, and their statistics are a
style. Such numbers compare methods on one data set; they are not LPIPS.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.files import read_network, write_network


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Shape of an :class:`ImageClassifier`.

    :param height: of the images in pixels, as ``width``; at least 4, for two halvings.
    :param channels: 1 for grey, 3 for colour.
    :param num_classes: classes, ids ``0..num_classes - 1``.
    :param features: channels of the first layer, twice as many in each of the next two.
    :param dropout: share of the pooled features left out in training.
    """

    height: int
    width: int
    channels: int = 1
    num_classes: int = 10
    features: int = 16
    dropout: float = 0.2


class ImageClassifier(nn.Module):
    """Three convolutions with two halvings between them, a mean over pixels, a linear layer.

    :param config: shape of images and network.

    :ivar image_shape: ``(C, H, W)``.
    :ivar num_classes: number of classes.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (config.channels, config.height, config.width)
        self.num_classes = config.num_classes
        widths = [config.channels, *(config.features * 2**level for level in range(3))]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.head = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(widths[-1], config.num_classes)
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of all layers, finest first, differentiable in the images.

        :param images: ``(*n, C, H, W)`` in [-1, 1].
        :returns: maps ``(*n, c, h, w)``; ``c`` doubles and ``h, w`` halve from layer to layer.
        :raises ValueError: if the images have another shape.
        """
        if tuple(images.shape[-3:]) != self.image_shape:
            raise ValueError(
                f"ImageClassifier: images of shape {tuple(images.shape)}, but it reads (*n, "
                f"{', '.join(map(str, self.image_shape))}); resize or pad them."
            )
        batch, x = images.shape[:-3], images.reshape(-1, *self.image_shape)
        maps = []
        for level, layer in enumerate(self.layers):
            x = F.relu(layer(F.avg_pool2d(x, 2) if level else x))
            maps.append(x.reshape(*batch, *x.shape[1:]))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the classes, ``(*n, num_classes)``."""
        logits: Tensor = self.head(self.features(images)[-1].mean((-1, -2)))
        return logits

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``.

        :param folder: made if it is absent.
        """
        write_network(self, self.config, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote, in evaluation mode and without gradients of the weights.

        :raises FileNotFoundError: if a file is absent.
        :raises ValueError: if one is damaged, or they do not belong together.
        """
        return read_network(cls, ClassifierConfig, folder).requires_grad_(False)
