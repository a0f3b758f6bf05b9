"""Rewards at a temperature, and Gaussian observations of a predicted quantity."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Unpack

import torch
from torch import Tensor

from ppl_diffusion.potentials.base import (
    FORBIDDEN_GUESS,
    AbstractPotential,
    check_log_potential,
)
from ppl_diffusion.potentials.calls import RowFunction
from ppl_diffusion.potentials.evaluation import SequenceFunction
from ppl_diffusion.potentials.function_options import FunctionOptions
from ppl_diffusion.potentials.transforms import Shape, Slope, Transform


class FunctionPotential(AbstractPotential):
    """A log-potential computed from a :class:`SequenceFunction`; rejected sequences get -inf."""

    function: SequenceFunction
    _known, _total = 0, 0.0
    """Look-aheads so far, and their sum."""

    @property
    def num_calls(self) -> int:
        return self.function.num_calls

    @property
    def num_failures(self) -> int:
        """Sequences rejected so far because the function failed on them."""
        return self.function.num_failures

    @property
    def num_sequences(self) -> int:
        """Distinct sequences that got an answer so far, rejections included."""
        return self.function.num_sequences

    @property
    def first_failure(self) -> str | None:
        """The first rejected sequence and the reason, in words; None while there is none."""
        return self.function.first_failure

    @property
    def failures(self) -> dict[str, int]:
        """How many sequences failed so far, by cause."""
        return dict(self.function.tally.counts)

    def prefetch(self, x0: Tensor) -> None:
        self.function.prefetch(x0)

    def keep_back(self, num_sequences: int) -> None:
        self.function.keep_back(num_sequences)

    def log_potential(self, x0: Tensor) -> Tensor:
        return self._log_g(self.function(x0))

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return a finite surrogate, where the budget allows to ask; elsewhere the mean so far.

        The mean is neutral: what is not known is neither preferred to what is, nor avoided.
        """
        if self.function.budget is None:
            return super().lookahead(x0)
        value, asked = self.function.guess(x0)
        found = check_log_potential(torch.where(asked, self._log_g(value), 0.0), x0, self.name)
        found = torch.where(found == -math.inf, FORBIDDEN_GUESS, found)
        self._known += int(asked.sum())
        self._total += float(found[asked].sum())
        return torch.where(asked, found, self._total / max(self._known, 1))

    def _log_g(self, value: Tensor) -> Tensor:
        return torch.where(value.isnan(), -math.inf, self._transform(value))

    @abstractmethod
    def _transform(self, value: Tensor) -> Tensor:
        """Return the log-potential of the function's values."""


class Reward(FunctionPotential):
    """A reward at a temperature: ``log G = reward / temperature``.

    Distinct sequences are evaluated once; the options that concern slow and failing rewards are
    those of :class:`SequenceFunction`. A rejected sequence gets ``-inf`` and is counted.

    :param fn: reward in its own units, ``x0 (B, L) int64 -> (B,)``.
    :param temperature: reward units per nat; the lower, the stronger the tilt.
    :param maximise: whether high values are good (docking scores are minimised).
    :param transform: what the reward goes through before, onto ``[0, 1]``, such as
        :class:`~ppl_diffusion.potentials.transforms.Sigmoid`; an impossible sequence stays one.
    :param shape: the whole tilt, in place of a temperature and a direction:
        :func:`~ppl_diffusion.potentials.transforms.minimise` or ``between``.
    :raises PotentialError: when called, if the reward fails and ``on_error="raise"``.
    :raises ValueError: if a shape comes with a temperature, a direction or a transform.

    :ivar tilt: what the density is multiplied by, in words.

    Example::

        Reward(oracle, temperature=0.5)
        Reward(dock, 0.3, maximise=False, executor=pool, timeout=600, on_error="reject")
        Reward(weight, shape=between(300, 450, sd=20))
    """

    def __init__(
        self,
        fn: RowFunction,
        temperature: float = 1.0,
        *,
        maximise: bool = True,
        transform: Transform | None = None,
        shape: Shape | None = None,
        **options: Unpack[FunctionOptions],
    ) -> None:
        slope = Slope(1.0, 1 if maximise else -1)
        self.function = SequenceFunction(fn, worst=(shape or slope).worst, **options)
        name = str(self.function.name)
        _require_positive(f"{name}: temperature", temperature)
        if shape is not None and (temperature, maximise, transform) != (1.0, True, None):
            raise ValueError(
                f"{name}: a shape is the whole tilt; leave out temperature, maximise and transform."
            )
        self.transform, self.maximise, self.temperature = transform, maximise, float(temperature)
        self.shape = shape or Slope(float(temperature), 1 if maximise else -1)
        score = name if transform is None else transform.describe(name)
        self.tilt = self.shape.describe(score)
        sign = "" if maximise else "-"
        self.name = f"{sign}{score} / {temperature:g}" if shape is None else f"log {self.tilt}"

    def _transform(self, value: Tensor) -> Tensor:
        if self.transform is None:
            return self.shape(value)
        return torch.where(value.isinf(), -math.inf, self.shape(self.transform(value)))

    def __repr__(self) -> str:
        return f"Reward({self.name}, temperature={self.temperature:g})"


class Likelihood(FunctionPotential):
    """A Gaussian observation of a predicted quantity: ``log N(observed; fn(x0), sd)``.

    :param fn: the prediction in its own units, ``x0 (B, L) int64 -> (B,)``.
    :param observed: the measurement, same units.
    :param sd: its standard deviation, same units.
    :param options: those of :class:`SequenceFunction`; a rejected sequence gets ``-inf``.
    :raises PotentialError: when called, if the prediction fails and ``on_error="raise"``.
    """

    def __init__(
        self, fn: RowFunction, observed: float, sd: float, **options: Unpack[FunctionOptions]
    ) -> None:
        self.function = SequenceFunction(fn, worst=None, **options)
        prediction = self.function.name
        _require_positive(f"{prediction}: sd", sd)
        if not math.isfinite(observed):
            raise ValueError(f"{prediction}: observed must be a finite number, got {observed}.")
        self.name = f"log Normal({observed:g} | {prediction}, {sd:g})"
        self.observed, self.sd = float(observed), float(sd)

    def _transform(self, value: Tensor) -> Tensor:
        z = (self.observed - value) / self.sd
        return -0.5 * z.square() - math.log(self.sd * math.sqrt(2 * math.pi))

    def __repr__(self) -> str:
        return f"Likelihood({self.name}, observed={self.observed:g}, sd={self.sd:g})"


def _require_positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive, finite number, got {value}.")
