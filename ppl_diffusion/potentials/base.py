"""Log-potentials of clean sequences: what tilts a chain's law.

A potential is ``log G(x0)``. It may be ``-inf`` (a forbidden sequence) and never NaN or ``+inf``.
Potentials add and scale like numbers; a sum multiplies the tilts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_diffusion.deferred import refuse_if
from ppl_diffusion.errors import CapabilityError, PotentialError

FORBIDDEN_GUESS = -2.0
"""Default stand-in for ``-inf`` at an unfinished state (nats).

Small on purpose: a particle whose guess is forbidden may still finish allowed, and then carries
``exp(-FORBIDDEN_GUESS)`` times the weight of the others. At -30 such particles are resampled away
in every run that is ever made, and the evidence, unbiased on paper, is too small in all of them.
"""


class AbstractPotential(ABC):
    """Base of all potentials: checks, arithmetic and the finite look-ahead.

    Subclasses implement :meth:`log_potential`; those that can be ``-inf`` may override
    :meth:`lookahead` with a graded penalty.
    """

    name: str = "potential"
    law_data: Sequence[Tensor] = ()
    """The data that it knows, by which laws tell potentials of one name apart."""

    @abstractmethod
    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``log G`` without checks.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: ``(*batch,)``.
        """

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the checked log-potential.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: float64 ``(*batch,)``, ``-inf`` allowed.
        :raises PotentialError: on NaN, ``+inf`` or a wrong shape.
        """
        return check_log_potential(self.log_potential(x0), x0, self.name)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return a finite surrogate of ``log G`` for guesses of an unfinished sequence.

        A guess that breaks a hard constraint says little about the finished sequence, so it is
        penalised, never excluded: excluding it would remove mass the target has.

        :param x0: guessed clean tokens, int64 ``(*batch, L)``.
        :returns: finite float64 ``(*batch,)``.
        """
        value = self(x0)
        return torch.where(value == -math.inf, FORBIDDEN_GUESS, value)

    def prefetch(self, x0: Tensor) -> None:  # noqa: B027 (most potentials have nothing to start)
        """Start in the background what the look-ahead of sequences will need, if anything can be.

        What is slow and runs in an executor overrides it, and what is made of other potentials
        passes it on. Answers do not change; :meth:`lookahead` waits for what is still missing.

        :param x0: guessed clean tokens, int64 ``(*batch, L)``.
        """

    def keep_back(self, num_sequences: int) -> None:  # noqa: B027 (most potentials cost nothing)
        """Let look-aheads leave enough of a budget for the values that a run needs in the end.

        Whoever runs says so before the first look-ahead. What has a budget overrides it, and what
        is made of other potentials passes it on.

        :param num_sequences: particles times runs.
        """

    def __add__(self, other: AbstractPotential) -> SumPotential:
        if not isinstance(other, AbstractPotential):
            return NotImplemented
        return SumPotential((*_terms(self), *_terms(other)))

    def __mul__(self, scale: float) -> ScaledPotential:
        if not isinstance(scale, int | float):
            return NotImplemented
        return ScaledPotential(self, float(scale))

    __rmul__ = __mul__


class Potential(AbstractPotential):
    """A potential given by a function.

    :param fn: ``x0 (*batch, L) int64 -> log G (*batch,)``.
    :param name: how errors call it (the function's name by default).

    Example::

        likes_g = Potential(lambda x0: (x0 == 2).sum(-1) / 10)
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], *, name: str | None = None) -> None:
        if not callable(fn):
            has = "; its .potential(codec) is one" if hasattr(fn, "potential") else ""
            raise TypeError(f"Potential: fn must be callable, got {type(fn).__name__}{has}.")
        self.fn = fn
        self.name = name or str(getattr(fn, "__name__", type(fn).__name__))

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``fn(x0)``.

        :raises PotentialError: if the function fails.
        """
        try:
            return self.fn(x0)
        except (PotentialError, CapabilityError):
            raise
        except Exception as error:
            raise PotentialError(
                f"{self.name} raised {type(error).__name__} ({error}) when asked about "
                f"{x0[..., 0].numel()} sequences of length {x0.shape[-1]}; a potential takes int64 "
                "(*batch, L) and returns (*batch,)."
            ) from error

    def __repr__(self) -> str:
        return f"Potential({self.name})"


class SumPotential(AbstractPotential):
    """The sum of several log-potentials."""

    def __init__(self, terms: tuple[AbstractPotential, ...]) -> None:
        self.terms = terms
        self.name = " + ".join(term.name for term in terms)
        self.law_data = tuple(tensor for term in terms for tensor in term.law_data)

    def log_potential(self, x0: Tensor) -> Tensor:
        return torch.stack([term(x0) for term in self.terms]).sum(0)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the sum of the terms' look-aheads: one broken constraint hides no other term."""
        return torch.stack([term.lookahead(x0) for term in self.terms]).sum(0)

    def prefetch(self, x0: Tensor) -> None:
        for term in self.terms:
            term.prefetch(x0)

    def keep_back(self, num_sequences: int) -> None:
        for term in self.terms:
            term.keep_back(num_sequences)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


class ScaledPotential(AbstractPotential):
    """``scale`` times a log-potential; a hard exclusion stays one for any positive scale.

    :param scale: a finite, non-negative number; 0 switches the potential off.
    """

    def __init__(self, base: AbstractPotential, scale: float) -> None:
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"a potential is scaled by a finite number >= 0, got {scale}.")
        self.base, self.scale = base, scale
        self.name, self.law_data = f"{scale:g} * {base.name}", base.law_data

    def log_potential(self, x0: Tensor) -> Tensor:
        value = self.base(x0)
        return value * self.scale if self.scale > 0 else torch.zeros_like(value)

    def lookahead(self, x0: Tensor) -> Tensor:
        return self.scale * self.base.lookahead(x0)

    def prefetch(self, x0: Tensor) -> None:
        self.base.prefetch(x0)

    def keep_back(self, num_sequences: int) -> None:
        self.base.keep_back(num_sequences)

    def __repr__(self) -> str:
        return f"{self.scale:g} * {self.base!r}"


def _terms(potential: AbstractPotential) -> tuple[AbstractPotential, ...]:
    return potential.terms if isinstance(potential, SumPotential) else (potential,)


def check_log_potential(value: Tensor, x0: Tensor, name: str) -> Tensor:
    """Return ``value`` in float64 after checking its shape and that it is not NaN or ``+inf``.

    :raises PotentialError: if a check fails.
    """
    try:
        value = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PotentialError(
            f"{name} returned {type(value).__name__}; return a tensor with one number per sequence."
        ) from error
    if value.shape != x0.shape[:-1]:
        raise PotentialError(
            f"{name} returned shape {tuple(value.shape)} for sequences of shape "
            f"{tuple(x0.shape)}; return one number per sequence, shape {tuple(x0.shape[:-1])}."
        )
    if value.is_complex():
        raise PotentialError(f"{name} returned complex numbers; return real log-potentials.")
    value = value.to(torch.float64)
    bad = torch.isnan(value) | (value == math.inf)
    refuse_if(bad.any(), lambda: _unusable(name, bad, x0))
    return value


def _unusable(name: str, bad: Tensor, x0: Tensor) -> PotentialError:
    row = x0.reshape(-1, x0.shape[-1])[bad.reshape(-1)][0].tolist()
    return PotentialError(
        f"{name} returned NaN or +inf for {int(bad.sum())} of {bad.numel()} sequences, first "
        f"{row}; return a finite log-potential, or -inf to exclude a sequence."
    )
