"""Stopwatches around a potential and a denoiser, and what a run costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, Kind, forward_parameters
from ppl_diffusion.denoisers.filters import forward_optional
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.base import AbstractPotential


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    :param rows: network rows.
    :param calls: sequences the potential is asked about.
    :param seconds: wall time.
    """

    rows: float = 0.0
    calls: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.rows + other.rows, self.calls + other.calls, self.seconds + other.seconds)

    def __sub__(self, other: Cost) -> Cost:
        return self + other.times(-1.0)

    def times(self, factor: float) -> Cost:
        """Return a multiple; what is unlimited stays so.

        :param factor: the factor.
        """
        return Cost(self.rows * factor, self.calls * factor, self.seconds * factor)

    def within(self, limit: Cost) -> bool:
        """Return whether nothing exceeds a limit.

        :param limit: the limit, ``inf`` where there is none.
        """
        return (
            self.rows <= limit.rows and self.calls <= limit.calls and self.seconds <= limit.seconds
        )


class Meter:
    """A stopwatch and a counter.

    :ivar rows: rows asked about.
    :ivar batches: calls, each for any number of rows.
    :ivar seconds: time the calls took.
    """

    def __init__(self) -> None:
        self.rows = self.batches = 0
        self.seconds = 0.0

    @property
    def seconds_per_row(self) -> float:
        """Mean time of a row; zero before the first."""
        return self.seconds / self.rows if self.rows else 0.0

    def __call__(self, ask: Callable[..., Tensor], rows: Tensor, *rest: Any) -> Tensor:
        """Return ``ask(rows, *rest)``, timed.

        :param ask: the function.
        :param rows: its first argument, ``(*batch, L)``.
        :param rest: its other arguments.
        """
        started = time.perf_counter()
        value = ask(rows, *rest)
        self.seconds += time.perf_counter() - started
        self.rows += rows[..., 0].numel()
        self.batches += 1
        return value


class MeteredPotential(AbstractPotential):
    """A potential with a stopwatch, whose every failure is a :class:`PotentialError`.

    :param potential: the potential.

    :ivar meter: its stopwatch.
    """

    def __init__(self, potential: AbstractPotential) -> None:
        self.potential, self.name, self.meter = potential, potential.name, Meter()

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return the potential's answer."""
        return self._ask(self.potential, x0)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the potential's look-ahead."""
        return self._ask(self.potential.lookahead, x0)

    def _ask(self, ask: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
        try:
            return self.meter(ask, x0)
        except PotentialError:
            raise
        except Exception as error:
            raise PotentialError(
                f"check: {self.name} raised {type(error).__name__} ({error}) when asked about "
                f"{x0[..., 0].numel()} sequences of length {x0.shape[-1]}; a potential takes int64 "
                "(batch, L) and returns (batch,)."
            ) from error


class MeteredDenoiser:
    """A denoiser with a stopwatch.

    :param denoiser: the denoiser.

    :ivar meter: its stopwatch.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.meter = denoiser, Meter()
        self.vocab_size: int = denoiser.vocab_size
        self.kind: Kind = denoiser.kind
        self.time_free: bool = denoiser.time_free
        forward_parameters(self, denoiser)
        forward_optional(
            self,
            denoiser,
            "changes",
            "conditions",
            "excludes_tokens",
            "output_size",
            "network_rows",
        )
        if has_head(denoiser):
            forward_optional(self, denoiser, "head", "hidden_size")
            vars(self)["hidden"] = self._hidden

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return the denoiser's answer.

        :param tokens: states, int64 ``(*batch, L)``.
        :param t: time.
        """
        return self.meter(lambda *x: self.denoiser(*x, **given), tokens, t)

    def _hidden(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        ask = self.denoiser.hidden  # type: ignore[attr-defined]
        return self.meter(lambda *x: ask(*x, **given), tokens, t)
