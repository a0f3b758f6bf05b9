"""What a measurement operator is: a differentiable map from images to numbers.

An operator is an image shape and a dictionary of tensors, nothing else: whatever is random in it
(a mask, a path of motion) was drawn once, from a seed, and is saved with the data. To add one,
subclass :class:`Operator`, write the three methods that differ, and register it::

    @register
    class Invert(Operator):
        "y = -u."

        name = "invert"

        @classmethod
        def draw_parameters(cls, image_shape, rng):
            return {}

        def measure(self, images):
            return -images

        def invert(self, measured):
            return -measured

The command line, the benchmark and the tests read the registry.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]
Parameters = dict[str, Tensor]
_STREAM = 1
"""First number of the seeds of operators; noise draws from another stream."""


class Operator(ABC):
    """A measurement operator ``A``: ``y = A(u) + noise``.

    :param image_shape: ``(C, H, W)`` of the images.
    :param parameters: what was drawn or chosen, by name; tensors, so that they can be saved.
    :raises ValueError: if the shape is none of an image.

    :cvar name: its name in the registry.
    :cvar linear: whether it is affine in the image.
    :cvar number: option that a number behind the name gives (``sr4``), if there is one.
    :ivar image_shape: ``(C, H, W)``.
    :ivar parameters: the tensors.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = True
    number: ClassVar[str | None] = None

    def __init__(self, image_shape: tuple[int, ...], parameters: Mapping[str, Tensor]) -> None:
        self.image_shape = _image_shape(self.name, image_shape)
        self.parameters: Parameters = dict(parameters)

    @classmethod
    def draw(cls, image_shape: tuple[int, ...], *, seed: int = 0, **options: Any) -> Self:
        """Return an operator whose random parameters are drawn from a seed.

        :param image_shape: ``(C, H, W)``.
        :param seed: the same one gives the same operator, on every machine.
        :param options: those of the operator's :meth:`draw_parameters`.
        :raises ValueError: if the images do not suit it, or an option is not its own.
        """
        shape = _image_shape(cls.name, image_shape)
        known = list(inspect.signature(cls.draw_parameters).parameters)[2:]
        unknown = [name for name in options if name not in known]
        if unknown:
            remedy = f"give one of {', '.join(known)}" if known else "drop it"
            raise ValueError(f"The operator {cls.name} has no option {unknown[0]!r}: {remedy}.")
        rng = np.random.default_rng((_STREAM, seed))
        return cls(shape, cls.draw_parameters(shape, rng, **options))

    @classmethod
    @abstractmethod
    def draw_parameters(cls, image_shape: Shape, rng: np.random.Generator) -> Parameters:
        """Draw the parameters; further arguments, with defaults, are options.

        :param image_shape: ``(C, H, W)``.
        :param rng: where random numbers come from.
        """

    @abstractmethod
    def measure(self, images: Tensor) -> Tensor:
        """Return what is measured, without noise.

        :param images: ``(n, C, H, W)``.
        :returns: ``(n, *shape)``.
        """

    @abstractmethod
    def invert(self, measured: Tensor) -> Tensor:
        """Return a simple reconstruction.

        :param measured: ``(n, *shape)``.
        :returns: ``(n, C, H, W)``.
        """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a measurement as the operator sees it; its product is :attr:`size`."""
        return self.image_shape

    @property
    def label(self) -> str:
        """The name by which :func:`make_operator` knows it, with its number: ``sr4``."""
        return self.name if self.number is None else f"{self.name}{self.parameters[self.number]}"

    @property
    def size(self) -> int:
        """Number ``m`` of numbers that are measured."""
        return math.prod(self.shape)

    def __call__(self, images: Tensor) -> Tensor:
        """Measure images, without noise.

        :param images: ``(*n, C, H, W)`` in [-1, 1].
        :returns: ``(*n, m)``, differentiable.
        :raises ValueError: if the images are of another shape.
        """
        if tuple(images.shape[-3:]) != self.image_shape:
            raise ValueError(
                f"The operator {self.name} measures images of shape {self.image_shape}, got "
                f"{tuple(images.shape)}: make one for these with make_operator."
            )
        batch = images.shape[:-3]
        measured = self.measure(images.reshape(-1, *self.image_shape))
        return measured.reshape(*batch, self.size)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Return a simple reconstruction that knows no prior, clipped to [-1, 1].

        :param y: ``(*n, m)``.
        :returns: ``(*n, C, H, W)``.
        """
        with torch.no_grad():
            images = self.invert(self._unflattened(y))
        return images.reshape(*y.shape[:-1], *self.image_shape).clamp(-1.0, 1.0)

    def picture(self, y: Tensor) -> Tensor:
        """Return a measurement as a picture to look at, NaN where nothing was measured.

        :param y: ``(m,)``.
        :returns: ``(C, h, w)``.
        """
        return self._unflattened(y)[0]

    def _unflattened(self, y: Tensor) -> Tensor:
        if y.shape[-1:] != (self.size,):
            raise ValueError(
                f"The operator {self.name} measures {self.size} numbers, got a y of shape "
                f"{tuple(y.shape)}: give what it measured."
            )
        return y.reshape(-1, *self.shape)

    def __eq__(self, other: object) -> bool:
        """Whether both measure the same: class, shape and parameters."""
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Operator)
        mine, theirs = self.parameters, other.parameters
        alike = self.image_shape == other.image_shape and mine.keys() == theirs.keys()
        return alike and all(torch.equal(mine[name], theirs[name]) for name in mine)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        return f"{type(self).__name__}({channels} x {height} x {width} -> {self.size})"


OPERATORS: dict[str, type[Operator]] = {}
"""Every operator by name: the only list there is."""

AnyOperator = TypeVar("AnyOperator", bound=type[Operator])


def register(cls: AnyOperator) -> AnyOperator:
    """Add an operator to the registry.

    :param cls: the class, with a ``name``.
    :raises ValueError: if the name is taken by another class.
    """
    known = OPERATORS.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(
            f"The operator name {cls.name!r} is taken by {known.__name__}: choose another."
        )
    OPERATORS[cls.name] = cls
    return cls


def operators() -> dict[str, type[Operator]]:
    """Return all registered operators by name."""
    return dict(OPERATORS)


def make_operator(
    name: str, image_shape: tuple[int, ...], *, seed: int = 0, **options: Any
) -> Operator:
    """Return an operator by its name, with random parameters drawn from a seed.

    :param name: one of :func:`operators`; a number behind it gives the option that the operator
        names for it: ``sr4`` is ``sr`` with ``factor=4``.
    :param image_shape: ``(C, H, W)``.
    :param seed: the same one gives the same operator.
    :param options: those of the operator.
    :raises ValueError: if there is no such operator, or the images do not suit it.
    """
    stem, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()  # type: ignore[union-attr]
    cls = OPERATORS.get(name)
    if cls is None and digits and getattr(OPERATORS.get(stem), "number", None) is not None:
        cls = OPERATORS[stem]
        assert cls.number is not None
        options = {cls.number: int(digits), **options}
    if cls is None:
        known = ", ".join(_spelt(n, c.number) for n, c in OPERATORS.items())
        raise ValueError(f"There is no operator {name!r}: choose one of {known}.")
    return cls.draw(image_shape, seed=seed, **options)


def _spelt(name: str, number: str | None) -> str:
    return name if number is None else f"{name}2, {name}4 (or another {number})"


def _image_shape(name: str, shape: tuple[int, ...]) -> Shape:
    whole = tuple(map(int, shape))
    if len(whole) != 3 or min(whole) < 1:
        raise ValueError(
            f"The operator {name} needs the shape (C, H, W) of images, got {tuple(shape)}: give "
            "three numbers, each at least 1."
        )
    channels, height, width = whole
    return channels, height, width
