"""What a restoration is asked: which image, seen through what, and how hard to look."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ppl_diffusion.jobs.checks import InputError, positive
from ppl_diffusion.jobs.search import Search

OPERATOR, NOISE = "sr4", 0.05
QUIETEST, LOUDEST = 1e-6, 1e3
"""The noise that is taken seriously: float32 tells no less, and more hides every image."""


@dataclass(frozen=True)
class Question:
    """An image and its measurement.

    :param image: an image file, ``SET:NUMBER`` for a test image of a set (``digits:3``), or with
        ``measured`` a measurement that was saved.
    :param operator: name of the operator; super-resolution by four if nothing is said.
    :param noise: standard deviation of the noise, for images in [-1, 1]; 0.05 if nothing is said.
    :param measured: whether the image is the measurement, of a truth that nobody knows.
    :param codec_error: whether what the codec leaves out of an image is a part of the model
        (:mod:`ppl_diffusion.imaging.codec_error`); None counts it where the codec knows it.
    :param resize: whether an image of another size is brought to the right one.
    :raises InputError: if a number cannot be used, or a measurement is told what it holds.
    """

    image: str
    operator: str | None = None
    noise: float | None = None
    measured: bool = False
    resize: bool = False
    codec_error: bool | None = None

    def __post_init__(self) -> None:
        positive("the noise", self.noise)
        if self.noise is not None and not QUIETEST <= self.noise <= LOUDEST:
            raise InputError(
                f"The noise of pixels from -1 to 1 must lie between {QUIETEST:g} and {LOUDEST:g}, "
                f"not at {self.noise:g}: give another --noise."
            )
        told = {
            "operator": self.operator is not None,
            "noise": self.noise is not None,
            "resize": self.resize,
        }
        for name in (name for name, said in told.items() if said and self.measured):
            raise InputError(
                f"A saved measurement says itself what it is: drop --{name}, or --measured."
            )


@dataclass(frozen=True)
class Job:
    """A prior by name, its codec, a question, and a search.

    :param name: of a shipped prior, or a folder that holds one.
    :param codec: of a shipped codec, or a folder that holds one; None for the one that the prior
        was trained on.
    :param data: folder of the sets of images that are not bundled; ``PPL_DIFFUSION_DATA`` if None.
    """

    name: str
    question: Question
    search: Search = field(default_factory=lambda: Search(method="smc"))
    codec: str | None = None
    data: Path | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, ready for JSON: not where its data lie."""
        return {
            "prior": self.name,
            "codec": self.codec,
            "question": asdict(self.question),
            "search": self.search.settings(),
        }
