"""The run folder of a restoration: same seed, same bytes, but for the seconds in the summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ppl_diffusion.imaging.files import write_image
from ppl_diffusion.jobs.folder import MARKER, whole_folder
from ppl_diffusion.jobs.writing import json_text, reason, save_arviz, timeless
from ppl_diffusion.restoration.figure import restoration_figure
from ppl_diffusion.restoration.run import Result

SIDE = 256
"""Pixels that the side of a written picture has at least; images are enlarged without smoothing."""


def write_run(result: Result, folder: Path, *, replace: bool) -> str | None:
    """Write the run folder, whole or not at all.

    ``restored.png``, ``mean.png``, ``uncertainty.png`` and ``samples/`` are pictures;
    ``pixels.npz`` holds ``mean``, ``sd``, ``low`` and ``high`` (of 90 % intervals) as numbers, all
    of the same draws, clipped to [-1, 1]; ``measurement.npz`` is what was known. The ArviZ file and
    the figure come last, and decide nothing: what cannot be made is left out.

    :returns: what is left out and why, None if nothing is.
    :raises InputError: if the place cannot be taken.
    """
    images = result.images
    with whole_folder(folder, replace=replace) as place:
        result.target.measurement.save(place / "measurement.npz")
        low, high = images.interval
        mean, sd = images.mean.numpy(), images.sd.numpy()
        np.savez(place / "pixels.npz", mean=mean, sd=sd, low=low.numpy(), high=high.numpy())
        _write_pictures(result, place)
        kept = timeless(result.posterior)
        kept.save(place / "particles")
        (place / MARKER).write_text(json_text(result.summary), encoding="utf-8")
        left_out = (
            save_arviz(kept, place, result.target.prior.vocabulary),
            _save_figure(result, place / "figure.png"),
        )
    return " ".join(filter(None, left_out)) or None


def _write_pictures(result: Result, place: Path) -> None:
    images = result.images
    # The largest uncertainty is white: its size stands in pixels.npz, and beside the figure.
    relative = 2 * images.sd / images.sd.max().clamp_min(1e-12) - 1
    shown = {"restored": images.restored, "mean": images.mean, "uncertainty": relative}
    for name, image in shown.items():
        _write(place / f"{name}.png", image)
    (place / "samples").mkdir()
    for number, sample in enumerate(result.samples, 1):
        _write(place / "samples" / f"{number}.png", sample)


def _write(path: Path, image: Tensor) -> None:
    write_image(path, image, scale=max(1, SIDE // min(image.shape[1:])))


def _save_figure(result: Result, path: Path) -> str | None:
    try:
        restoration_figure(result).savefig(path, dpi=150)
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"The figure {path.name} could not be drawn ({reason(error)})."
    return None
