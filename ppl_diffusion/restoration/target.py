"""From a question to its target: a prior over tokens, their codec, and a measurement."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.imaging.codec_error import MeasuredWithError
from ppl_diffusion.imaging.files import fitted, read_as_it_is, what_is_doubtful, what_is_lost
from ppl_diffusion.imaging.measurement import Measurement, measure
from ppl_diffusion.imaging.operators import make_operator
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.models import DiffusionProgram, load, load_codec, load_codec_error
from ppl_diffusion.models.cards import find_folder, names, read_card
from ppl_diffusion.models.image_data import IMAGE_READERS, load_images
from ppl_diffusion.potentials import GaussianMeasurement
from ppl_diffusion.restoration.question import NOISE, OPERATOR, Job, Question

if TYPE_CHECKING:
    from ppl_diffusion.imaging.codec import ImageCodec

REVEALS, UNMASKED_STEPS = 2, 64
"""Tokens per step of a masked chain, and steps of any other, if nothing is said."""


@dataclass(frozen=True)
class Target:
    """What a restoration samples from.

    :param job: the job, with every default filled in.
    :param measurement: what is known.
    :param truth: the image that was measured, ``(C, H, W)``, or None.
    :param error: the measurement with what the codec leaves out, where that is counted.
    :param notes: a sentence about each thing that the image lost before it was measured.

    :ivar potential: the likelihood of tokens.
    """

    job: Job
    prior: DiffusionProgram
    codec: ImageCodec
    measurement: Measurement
    truth: Tensor | None
    error: MeasuredWithError | None
    notes: tuple[str, ...] = ()
    potential: GaussianMeasurement = field(init=False)

    def __post_init__(self) -> None:
        known = self.error or self.measurement
        object.__setattr__(self, "potential", known.potential(self.codec))

    def chains(self) -> list[ReverseChain]:
        """Return the chains of the prior that a method may move, the better ones first.

        A masked prior can reveal so many tokens at every step, in a random order, or those whose
        time has come: the first is nearer to what the network learned at equal steps.
        """
        steps, prior = self.job.search.num_steps, self.prior
        assert steps is not None
        plain = prior.chain(num_steps=steps)
        if not prior.process.absorbing:
            return [plain]
        size = -(-prior.length // steps)
        ordered = OrderedKernel(prior.process, prior.denoiser, length=prior.length, group_size=size)
        return [prior.around(ordered), plain]


def build_target(job: Job) -> Target:
    """Load what a job names, and measure the image.

    :raises InputError: if something does not exist, or does not fit.
    """
    with user_input():
        prior = load(job.name)
        named = job.codec or _codec_name(job.name, prior)
        codec = _load_codec(job, named)
        job = dataclasses.replace(job, codec=named)
        for part in (prior, codec):
            part.to(job.search.device or "cpu")
        _require_pair(job, prior, codec)
        truth, measurement, notes = _measured(job, codec)
        error = _error(job, measurement)
    steps = -(-prior.length // REVEALS) if prior.process.absorbing else UNMASKED_STEPS
    search = dataclasses.replace(job.search, num_steps=job.search.num_steps or steps)
    job = dataclasses.replace(job, search=search)
    return Target(job, prior, codec, measurement, truth, error, notes)


def _codec_name(name: str, prior: DiffusionProgram) -> str:
    """Return the codec that the card of a prior names, by default that of its own name."""
    try:
        known = read_card(str(find_folder(name, names(), "prior").resolve())).get("codec")
    except FileNotFoundError:
        known = None
    return known or f"{prior.name}-codec"


def _load_codec(job: Job, named: str) -> ImageCodec:
    try:
        return load_codec(named)
    except ValueError as error:
        if job.codec is not None:
            raise
        raise InputError(
            f"{error} The prior {job.name!r} names none, and may be none of images: choose "
            "another --prior, or give --codec."
        ) from error


def _error(job: Job, measurement: Measurement) -> MeasuredWithError | None:
    """Return the measurement with the error of the codec, if asked for or, unasked, if known."""
    asked = job.question.codec_error
    if asked is False:
        return None
    assert job.codec is not None
    try:
        return MeasuredWithError(measurement, load_codec_error(job.codec))
    except FileNotFoundError:
        if asked:
            raise
        return None


def _require_pair(job: Job, prior: DiffusionProgram, codec: ImageCodec) -> None:
    wanted, found = (prior.length, len(prior.vocabulary)), (codec.length, codec.vocab_size)
    if wanted != found:
        raise InputError(
            f"The prior {job.name!r} writes {wanted[0]} of {wanted[1]} tokens, and the codec "
            f"{job.codec!r} reads {found[0]} of {found[1]}: give the codec it was trained on with "
            "--codec."
        )


def _measured(job: Job, codec: ImageCodec) -> tuple[Tensor | None, Measurement, tuple[str, ...]]:
    question, shape = job.question, codec.image_shape
    if question.measured:
        measurement = Measurement.load(question.image)
        found = measurement.operator.image_shape
        if found != shape:
            raise InputError(
                f"The measurement {question.image!r} is one of an image of {_size(found)}, and the "
                f"prior {job.name!r} draws {_size(shape)}: choose another --prior."
            )
        return None, measurement, ()
    truth, notes = _read(question, shape, job.data)
    operator = make_operator(question.operator or OPERATOR, shape, seed=job.search.seed)
    noise = NOISE if question.noise is None else question.noise
    return truth, measure(operator, truth, noise, job.search.seed), notes


def _read(
    question: Question, shape: tuple[int, int, int], data: Path | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the image, a test image of a set, ``SET:NUMBER``, or a file, and what it lost."""
    named = re.fullmatch(rf"({'|'.join(IMAGE_READERS)}):(.*)", question.image)
    if named is not None:
        return _of_a_set(named[1], named[2], shape, data), ()
    path = Path(question.image)
    image = read_as_it_is(path)
    notes = (*what_is_doubtful(path, image), *what_is_lost(image, shape))
    return fitted(image, shape, name=str(path), resize=question.resize), notes


def _of_a_set(name: str, number: str, shape: tuple[int, int, int], data: Path | None) -> Tensor:
    images = load_images(name, data)
    last = len(images.test) - 1
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) > last:
        raise InputError(
            f"The set {name} has test images 0 to {last}, not {number or 'one without a number'}: "
            f"give one of {name}:0 to {name}:{last}."
        )
    if images.image_shape != shape:
        raise InputError(
            f"Images of {name} are {_size(images.image_shape)}, and the prior draws "
            f"{_size(shape)}: choose another --prior."
        )
    return images.test[int(number)]


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height} x {width} pixels, {'grey' if channels == 1 else f'{channels} channels'}"
