"""Why a function has no number for a sequence: a cause that can be counted, and words."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass, field

from ppl_diffusion.potentials.answers import WrongAnswer

GAVE_UP, DIED, NO_NUMBER, WRONG_ANSWER = "gave up", "died", "not a number", "wrong answer"
"""Causes; the others are ``"raised ValueError"`` and the like."""


class GaveUp(TimeoutError):
    """A call was still running when its time was over."""


class Died(RuntimeError):
    """The process of a call ended before it had answered."""


@dataclass(frozen=True)
class Failure:
    """Stands in place of a number.

    :param cause: what is counted.
    :param message: what happened, in words.
    """

    cause: str
    message: str


@dataclass
class Tally:
    """Failures by cause.

    :ivar counts: how many of each cause.
    :ivar words: what happened when it was met first.
    :ivar first: the first words of all; None while there are none.
    """

    counts: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)
    first: str | None = None

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, failure: Failure, words: str) -> None:
        """Count a failure.

        :param failure: what happened.
        :param words: the same, with the sequence.
        """
        self.counts[failure.cause] += 1
        self.words.setdefault(failure.cause, words)
        self.first = self.first or words


def failure_of(outcome: Exception | str) -> Failure:
    """Return what an exception, or a value that is no number, is counted as.

    :param outcome: the exception, or what is said of the value.
    """
    if isinstance(outcome, str):
        return Failure(NO_NUMBER, outcome)
    if isinstance(outcome, WrongAnswer):
        return Failure(WRONG_ANSWER, str(outcome))
    name = type(outcome).__name__.lstrip("_")
    return Failure(_cause(outcome, name), f"{name}: {outcome}")


def _cause(error: Exception, name: str) -> str:
    if isinstance(error, GaveUp):
        return GAVE_UP
    return DIED if isinstance(error, Died) else f"raised {name}"


def ending(code: int) -> str:
    """Return how a process ended, in words.

    :param code: its exit code; that of a signal is negative.
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
    short = ", by which systems end what takes too much memory" if name == "SIGKILL" else ""
    return f"signal {-code} ({name}{short})"
