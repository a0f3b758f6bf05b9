"""The images that the shipped codecs, classifiers and priors are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.models.sequences import find_data

_DIGITS_SEED, _DIGITS_TEST, _DIGITS_VALID = 20_251_002, 297, 150


@dataclass(frozen=True)
class Images:
    """Images of one size in three parts, with a class each.

    :param train: float32 ``(n, C, H, W)`` in [-1, 1].
    :param valid: images for early stopping.
    :param test: images for quoted figures.
    :param labels: classes of the images of ``train``, ``valid`` and ``test``, int64 ``(n,)`` each.
    :param num_classes: number of classes.
    :param noun: what the images are; ``source`` and ``licence`` are sentences of a card.
    :param edge: what is moved into a shifted image: the value -1 or, as ``None``, its border.
    :param bundled: whether the images come with an installed package, so that no folder is needed.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    labels: tuple[Tensor, Tensor, Tensor]
    num_classes: int
    noun: str
    source: str
    licence: str
    edge: float | None = -1.0
    bundled: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def load_images(name: str, folder: str | Path | None = None) -> Images:
    """Read a data set of images.

    :param name: a key of :data:`IMAGE_READERS`.
    :param folder: the data folder, where it is needed.
    """
    if name not in IMAGE_READERS:
        known = ", ".join(IMAGE_READERS)
        raise ValueError(f"There is no set of images {name!r}: choose one of {known}.")
    return IMAGE_READERS[name](folder)


def shifted(images: Tensor, moves: Tensor, edge: float | None) -> Tensor:
    """Move each image by its own number of pixels.

    :param images: ``(n, C, H, W)``.
    :param moves: int64 ``(n, 2)``, pixels down and to the right.
    :param edge: the value of pixels that come in, or None for those of the border.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height) - moves[:, :1]
    columns = torch.arange(width) - moves[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None
    ]
    each = torch.arange(len(images))[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        each, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ].permute(0, 3, 1, 2)
    return moved if edge is None else torch.where(inside[:, None], moved, edge)


def _digits(folder: str | Path | None) -> Images:
    """Handwritten digits of scikit-learn, 8 x 8 resized to 16 x 16."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The digits come with scikit-learn, but {error.name} is not installed; run "
            "`pip install 'ppl-diffusion[imaging]'`."
        ) from error
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 8.0 - 1.0
    images = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SEED))
    sizes = [len(images) - _DIGITS_TEST - _DIGITS_VALID, _DIGITS_VALID, _DIGITS_TEST]
    train, valid, test = order.split(sizes)
    return Images(
        images[train],
        images[valid],
        images[test],
        (labels[train], labels[valid], labels[test]),
        num_classes=10,
        noun="handwritten digits of 16 x 16 pixels",
        source="Optical recognition of handwritten digits (Alpaydin and Kaynak 1998), the 1797 "
        "images of 8 x 8 pixels bundled with scikit-learn, resized to 16 x 16 (bilinear); 1500 for "
        "training, 150 of them for validation, and 297 for the test, drawn once.",
        licence="Data: CC BY 4.0 (UCI Machine Learning Repository); scikit-learn is BSD-3-Clause.",
        bundled=True,
    )


def _mnist(folder: str | Path | None) -> Images:
    """Handwritten digits of MNIST, 28 x 28 padded to 32 x 32."""
    parts, labels = _arrays(find_data(folder, "images/mnist.npz"))
    train, valid, test = (
        F.pad(part[:, None] / 127.5 - 1.0, (2, 2, 2, 2), value=-1.0) for part in parts
    )
    return Images(
        train,
        valid,
        test,
        labels,
        num_classes=10,
        noun="handwritten digits of 32 x 32 pixels",
        source="MNIST (LeCun et al. 1998), the first 22,000 training images, 2,000 of them for "
        "validation, and the first 4,000 test images, padded to 32 x 32 pixels.",
        licence="Data: repository karpathy/convnetjs is MIT; that of MNIST is not stated.",
    )


def _faces(folder: str | Path | None) -> Images:
    """Photographs of faces, 64 x 64 averaged to 32 x 32; training images also mirrored."""
    parts, labels = _arrays(find_data(folder, "images/olivetti_faces.npz"))
    train, valid, test = (F.avg_pool2d(part[:, None] / 127.5 - 1.0, 2) for part in parts)
    return Images(
        torch.cat([train, train.flip(-1)]),
        valid,
        test,
        (labels[0].repeat(2), labels[1], labels[2]),
        num_classes=40,
        noun="photographs of faces of 32 x 32 pixels",
        source="Olivetti faces (AT&T Laboratories Cambridge), ten photographs of each person, "
        "averaged to 32 x 32 pixels: persons 0 to 29 for training, also mirrored, 30 to 32 for "
        "validation, 33 to 35 for the test.",
        licence="Data: not stated; real faces, not to be used for identification.",
        edge=None,
    )


def _arrays(file: Path) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    with np.load(file, allow_pickle=False) as z:
        images, labels = (
            [torch.from_numpy(z[f"{letter}_{part}"]) for part in ("train", "valid", "test")]
            for letter in "xy"
        )
    train, valid, test = (label.to(torch.int64) for label in labels)
    return [x.to(torch.float32) for x in images], (train, valid, test)


IMAGE_READERS: dict[str, Callable[[str | Path | None], Images]] = {
    "digits": _digits,
    "mnist": _mnist,
    "faces": _faces,
}
