"""Image files, and what is wrong with them in one sentence.

Images are tensors ``(C, H, W)`` in [-1, 1], grey (one channel) or RGB (three).
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_diffusion.imaging.metrics import unit

ARRAYS = (".npy", ".npz")
PICTURES = (".png", ".jpg", ".jpeg")
_COLOURS = {1: "L", 3: "RGB"}


def read_image(
    path: str | Path, image_shape: tuple[int, int, int], *, resize: bool = False
) -> Tensor:
    """Read an image from a PNG, JPEG, ``.npy`` or ``.npz`` file.

    Colours become what the shape asks for. Arrays are ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``:
    whole numbers from 0 to 255, or real ones from -1 to 1.

    :param path: the file.
    :param image_shape: ``(C, H, W)`` with one or three channels.
    :param resize: bring an image of another size to this one, bicubically; otherwise refuse it.
    :returns: ``(C, H, W)`` in [-1, 1], float32.
    :raises FileNotFoundError: if there is no such file.
    :raises ModuleNotFoundError: without Pillow, where it is needed.
    :raises ValueError: if the file holds no such image.
    """
    return fitted(read_as_it_is(path), image_shape, name=str(path), resize=resize)


def read_as_it_is(path: str | Path) -> Tensor:
    """Read an image in its own size and colours, as :func:`read_image` would.

    :param path: the file.
    :returns: ``(C, H, W)`` in [-1, 1], float32, with one or three channels.
    :raises FileNotFoundError: if there is no such file.
    :raises ModuleNotFoundError: without Pillow, where it is needed.
    :raises ValueError: if the file holds no image.
    """
    place = Path(path)
    if place.is_dir():
        raise ValueError(f"The path {str(path)!r} is a folder: give the file of one image.")
    if not place.is_file():
        raise FileNotFoundError(f"There is no image {str(path)!r}: check the path.")
    ending = place.suffix.lower()
    if ending not in (*ARRAYS, *PICTURES):
        known = ", ".join((*PICTURES, *ARRAYS))
        raise ValueError(f"The image {str(path)!r} ends in none of {known}: convert it.")
    return _from_array(place) if ending in ARRAYS else _from_picture(place)


def fitted(
    image: Tensor, image_shape: tuple[int, int, int], *, name: str, resize: bool = False
) -> Tensor:
    """Return an image in the colours and, if asked, the size of a shape.

    :param image: ``(C, H, W)`` with one or three channels.
    :param image_shape: ``(C, H, W)`` likewise.
    :param name: what an error calls it.
    :param resize: bring an image of another size to this one, bicubically; otherwise refuse it.
    :raises ValueError: if the size is another one, and not to be changed.
    """
    found, wanted = tuple(image.shape[1:]), tuple(image_shape[1:])
    if found != wanted and not resize:
        raise ValueError(
            f"The image {name!r} has {_size(found)} pixels, and {_size(wanted)} are needed: "
            "resize it, or say so (--resize)."
        )
    coloured = _coloured(image, image_shape[0])
    return coloured if found == wanted else resized(coloured, wanted)


def what_is_lost(image: Tensor, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Return a sentence about each thing that an image loses where it is brought to a shape.

    :param image: ``(C, H, W)``, of its own size and colours.
    :param image_shape: ``(C, H, W)`` that it is brought to.
    """
    said = []
    if len(image) > image_shape[0] and bool((image != image[:1]).any()):
        said.append("The image has colours and the prior is grey: its grey values were taken.")
    (height, width), (rows, columns) = image.shape[1:], image_shape[1:]
    if height * columns != width * rows:
        said.append(
            f"The image of {_size((height, width))} pixels was brought to "
            f"{_size((rows, columns))}, which have other proportions: crop it first to keep them."
        )
    return tuple(said)


def what_is_doubtful(path: str | Path, image: Tensor) -> tuple[str, ...]:
    """Return a sentence if an array looks like one of numbers from 0 to 1.

    :param path: the file that the image was read from.
    :param image: ``(C, H, W)`` in [-1, 1].
    """
    if Path(path).suffix.lower() not in ARRAYS or bool((image < 0).any()):
        return ()
    return (
        f"No pixel of {str(path)!r} is below 0, and black is -1: if its numbers go from 0 to 1, "
        "save 2 x - 1.",
    )


def resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return an image in another size, bicubically and with antialiasing.

    :param image: ``(C, H, W)``.
    :param size: ``(H, W)``.
    """
    options: dict[str, Any] = {"size": size, "mode": "bicubic", "antialias": True}
    return torch.nn.functional.interpolate(image[None], **options)[0].clamp(-1.0, 1.0)


def write_image(path: str | Path, image: Tensor, *, scale: int = 1) -> None:
    """Write a PNG.

    :param image: ``(C, H, W)`` in [-1, 1], one or three channels; NaN is grey.
    :param scale: pixels of the file per pixel of the image.
    :raises ModuleNotFoundError: without Pillow.
    """
    pixels = (unit(image.nan_to_num(0.0)) * 255).round().to(torch.uint8).cpu()
    large = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    array = large[0].numpy() if len(large) == 1 else large.permute(1, 2, 0).contiguous().numpy()
    _pillow().fromarray(array).save(path, format="PNG")


def _from_picture(path: Path) -> Tensor:
    pillow = _pillow()
    try:
        with pillow.open(path) as file:
            picture = file.convert("RGBA") if "transparency" in file.info else file.copy()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"The file {str(path)!r} is no readable image: save it again as PNG or JPEG."
        ) from error
    if picture.mode.startswith(("I", "F")):  # 16 bits a pixel
        deep = torch.from_numpy(np.asarray(picture, dtype=np.float32))[None]
        return 2 * deep / 65535 - 1
    if picture.mode in ("RGBA", "LA") and picture.getchannel("A").getextrema()[0] < 255:
        raise ValueError(f"The image {str(path)!r} is partly transparent: flatten it first.")
    grey = picture.mode in ("1", "L", "LA")
    pixels = np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.float32)
    return _channels_first(2 * torch.from_numpy(pixels / 255) - 1)


def _from_array(path: Path) -> Tensor:
    array = _read_array(path)
    whole = np.issubdtype(array.dtype, np.integer)
    wrong = _wrong(array, whole=whole)
    if wrong is not None:
        raise ValueError(f"The array in {str(path)!r} {wrong}.")
    image = torch.from_numpy(array.astype(np.float32))
    image = 2 * image / 255 - 1 if whole else image
    channels_first = array.ndim == 3 and array.shape[0] in _COLOURS
    if not (array.ndim == 2 or channels_first or (array.ndim == 3 and array.shape[2] in _COLOURS)):
        raise ValueError(
            f"The array in {str(path)!r} has the shape {array.shape}: an image is (H, W), "
            "(C, H, W) or (H, W, C), with one or three channels."
        )
    return image if channels_first else _channels_first(image)


def _wrong(array: NDArray[Any], *, whole: bool) -> str | None:
    """Return why numbers are those of no image, and what to give, or None."""
    wanted = "give whole numbers from 0 to 255, or real ones from -1 to 1"
    if not (whole or np.issubdtype(array.dtype, np.floating)):
        return f"has the type {array.dtype}: {wanted}"
    if not array.size:
        return f"has the shape {array.shape}, without a pixel: give the array of an image"
    if not np.isfinite(array).all():
        return "holds NaN or infinity: fill in those pixels"
    low, high = (0, 255) if whole else (-1, 1)
    if low <= array.min() and array.max() <= high:
        return None
    kind = "whole" if whole else "real"
    return f"holds {kind} numbers from {array.min():g} to {array.max():g}: {wanted}"


def _read_array(path: Path) -> NDArray[Any]:
    if not path.stat().st_size:
        raise ValueError(f"The file {str(path)!r} is empty: save the array again.")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found as archive:
            names = archive.files
            array: NDArray[Any] | None = archive[names[0]] if len(names) == 1 else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        why = "is no archive of one array that can be read: save it with numpy.save or numpy.savez"
        if "Object arrays" in str(error):
            why = "holds Python objects, which are not read: save an array of numbers"
        raise ValueError(f"The file {str(path)!r} {why}.") from error
    if array is None:
        raise ValueError(
            f"The file {str(path)!r} is no archive of one array, it holds "
            f"{', '.join(names) or 'nothing'}: save the image alone, or say that it is a "
            "measurement (--measured)."
        )
    return array


def _channels_first(image: Tensor) -> Tensor:
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1).contiguous()


def _coloured(image: Tensor, channels: int) -> Tensor:
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1).contiguous()
    luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow
    return torch.einsum("chw,c->hw", image, luma)[None]


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Image files are read and written with Pillow: install it with "
            "`pip install ppl-diffusion[imaging]`."
        ) from error
    return Image
