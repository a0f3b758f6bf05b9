"""Shapes of scores: onto the unit interval, and as log-densities.

A *transform* takes a score to ``[0, 1]``, where scores of several kinds can be added; a *shape*
says what the tilt is for a score in its own units. Both say in words what they do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_STEEP = 2 * math.log(19)
"""A logistic curve climbs from .05 to .95 within this many of its units."""


class Transform(ABC):
    """A function of a score, onto ``[0, 1]``; :class:`AtMost` alone keeps its units."""

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """Return float64 of the same shape.

        :param value: scores, float64.
        """

    @abstractmethod
    def describe(self, name: str = "score") -> str:
        """Return what it does, in words.

        :param name: of the score.
        """


@dataclass(frozen=True)
class Linear(Transform):
    """From 0 at ``low`` to 1 at ``high``, and flat beyond; it falls where ``low`` is the larger.

    :param low: score worth nothing.
    :param high: score worth 1.
    :raises ValueError: if they are equal or not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_apart("Linear", self.low, self.high)

    def __call__(self, value: Tensor) -> Tensor:
        share: Tensor = (value.double() - self.low) / (self.high - self.low)
        return share.clamp(0.0, 1.0)

    def describe(self, name: str = "score") -> str:
        return f"linear({name}; {self.low:g} to {self.high:g})"


@dataclass(frozen=True)
class Sigmoid(Transform):
    """A logistic curve, .05 at ``low`` and .95 at ``high``; it falls where ``low`` is the larger.

    :param low: score worth .05.
    :param high: score worth .95.
    :raises ValueError: if they are equal or not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_apart("Sigmoid", self.low, self.high)

    def __call__(self, value: Tensor) -> Tensor:
        middle = (self.low + self.high) / 2
        return torch.sigmoid(_STEEP * (value.double() - middle) / (self.high - self.low))

    def describe(self, name: str = "score") -> str:
        return f"sigmoid({name}; {self.low:g} to {self.high:g})"


@dataclass(frozen=True)
class DoubleSigmoid(Transform):
    """Near 1 from ``low`` to ``high`` and near 0 outside: two logistic curves, multiplied.

    :param low: where the first climbs through .5.
    :param high: where the second falls through .5, above ``low``.
    :param width: of each, from .05 to .95; a quarter of the interval by default.
    :raises ValueError: if the interval is empty, or a number not usable.
    """

    low: float
    high: float
    width: float | None = None

    def __post_init__(self) -> None:
        _check_apart("DoubleSigmoid", self.low, self.high)
        _check_rising("DoubleSigmoid", self.low, self.high)
        if self.width is not None:
            _check_positive("DoubleSigmoid: width", self.width)

    def __call__(self, value: Tensor) -> Tensor:
        scale = _STEEP / self._width
        value = value.double()
        return torch.sigmoid(scale * (value - self.low)) * torch.sigmoid(
            scale * (self.high - value)
        )

    @property
    def _width(self) -> float:
        return (self.high - self.low) / 4 if self.width is None else self.width

    def describe(self, name: str = "score") -> str:
        return f"double sigmoid({name}; {self.low:g} to {self.high:g}, width {self._width:g})"


@dataclass(frozen=True)
class Steps(Transform):
    """The value of the last step that a score has reached, 0 below the first.

    :param steps: ``(score, value)``, scores ascending, values from 0 to 1.
    :raises ValueError: if there are none, or they are not so.
    """

    steps: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        steps = tuple((float(score), float(value)) for score, value in self.steps)
        object.__setattr__(self, "steps", steps)
        scores = [score for score, _ in steps]
        rising = all(a < b for a, b in pairwise(scores))
        inside = all(0 <= value <= 1 for _, value in steps)
        if not (steps and rising and inside and all(map(math.isfinite, scores))):
            raise ValueError(
                "Steps: give (score, value) with ascending, finite scores and values from 0 to 1, "
                f"got {list(steps)}."
            )

    def __call__(self, value: Tensor) -> Tensor:
        scores, values = zip(*self.steps, strict=True)
        reached = torch.tensor([0.0, *values], dtype=torch.float64, device=value.device)
        edges = torch.tensor(scores, dtype=torch.float64, device=value.device)
        return reached[torch.searchsorted(edges, value.double().contiguous(), right=True)]

    def describe(self, name: str = "score") -> str:
        told = ", ".join(f"{value:g} from {score:g}" for score, value in self.steps)
        return f"steps({name}; {told})"


@dataclass(frozen=True)
class AtMost(Transform):
    """A score in its own units, but for those beyond the top of its scale, which count as that.

    :param top: the largest score that is believed.
    :raises ValueError: if it is not finite.
    """

    top: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.top):
            raise ValueError(f"AtMost: top must be finite, got {self.top}.")

    def __call__(self, value: Tensor) -> Tensor:
        return value.double().clamp_max(self.top)

    def describe(self, name: str = "score") -> str:
        return f"min({name}, {self.top:g})"


TRANSFORMS: dict[str, type[Transform]] = {
    "linear": Linear,
    "sigmoid": Sigmoid,
    "double-sigmoid": DoubleSigmoid,
    "steps": Steps,
}
"""Transforms by the names that briefs know."""


class Shape(ABC):
    """A log-density of a score, up to a constant.

    :ivar worst: the one infinite score that is legal, if any: that of an impossible sequence.
    """

    worst: float | None

    @abstractmethod
    def __call__(self, value: Tensor) -> Tensor:
        """Return nats, float64 of the same shape.

        :param value: scores, float64.
        """

    @abstractmethod
    def describe(self, name: str = "score") -> str:
        """Return the tilt itself, in words.

        :param name: of the score.
        """


@dataclass(frozen=True)
class Slope(Shape):
    """``sign * score / temperature``; made by :func:`maximise` and :func:`minimise`."""

    temperature: float
    sign: int

    def __post_init__(self) -> None:
        _check_positive("temperature", self.temperature)

    @property
    def worst(self) -> float:  # type: ignore[override]
        return -self.sign * math.inf

    def __call__(self, value: Tensor) -> Tensor:
        return self.sign * value.double() / self.temperature

    def describe(self, name: str = "score") -> str:
        return f"exp({'-' * (self.sign < 0)}{name} / {self.temperature:g})"


@dataclass(frozen=True)
class Window(Shape):
    """Flat from ``low`` to ``high`` with Gaussian sides; made by :func:`between`."""

    low: float
    high: float
    sd: float
    worst = None

    def __post_init__(self) -> None:
        _check_rising("between", self.low, self.high)
        _check_positive("between: sd", self.sd)

    def __call__(self, value: Tensor) -> Tensor:
        value = value.double()
        outside = value - value.clamp(self.low, self.high)
        return -0.5 * (outside / self.sd).square()

    def describe(self, name: str = "score") -> str:
        where = f"[{self.low:g}, {self.high:g}]"
        return f"exp(-distance({name}, {where})^2 / (2 * {self.sd:g}^2))"


def maximise(temperature: float) -> Slope:
    """Return ``exp(score / temperature)``.

    :param temperature: units of the score per nat.
    """
    return Slope(temperature, 1)


def minimise(temperature: float) -> Slope:
    """Return ``exp(-score / temperature)``.

    :param temperature: units of the score per nat.
    """
    return Slope(temperature, -1)


def between(low: float, high: float, sd: float) -> Window:
    """Return a tilt that is flat from ``low`` to ``high``, and Gaussian outside.

    :param low: units of the score.
    :param high: the same, not below ``low``.
    :param sd: standard deviation of the sides, the same.
    """
    return Window(low, high, sd)


def _check_apart(owner: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low != high):
        raise ValueError(f"{owner}: low and high must be finite and differ, got {low} and {high}.")


def _check_rising(owner: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(
            f"{owner}: low must not be above high, and both finite, got {low} and {high}."
        )


def _check_positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive, finite number, got {value}.")
