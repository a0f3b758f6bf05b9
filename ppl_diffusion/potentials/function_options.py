"""Options of functions of sequences, and the sentence for each that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answer_store import Answer
from ppl_diffusion.potentials.calls import Outcome, RowFunction, guided_sizes
from ppl_diffusion.potentials.causes import Failure, failure_of

OnError = Literal["raise", "reject"] | float
KeyFunction = Callable[[Tensor], Sequence[bytes | str]]
"""``rows (B, L) -> B`` names, equal where the function's answer is the same."""


class FunctionOptions(TypedDict, total=False):
    """Options of a :class:`FunctionSettings` that the potentials made from one hand on."""

    name: str | None
    batch_size: int | None
    executor: Executor | None
    num_workers: int | None
    timeout: float | None
    on_error: OnError
    retries: int
    key: KeyFunction | None
    cache_size: int
    cache: str | Path | None
    version: str
    retry_failed: bool
    budget: int | None
    reserve: int | None


_LEAST = {
    "batch_size": 1,
    "cache_size": 1,
    "num_workers": 1,
    "retries": 0,
    "budget": 1,
    "reserve": 0,
}


@dataclass(eq=False, repr=False)
class FunctionSettings:
    """What a function of sequences is asked, where, how often, and what its failures mean.

    :param fn: ``x0 (B, L) int64 -> (B,)``: a tensor, an array, a series, a list or a generator of
        numbers. None, text or any other object in place of a number, and another number of values
        than of sequences, are failures like an exception.
    :param batch_size: sequences per call of ``fn``; by default all at once, and with an executor
        pieces that shrink towards the end (:func:`~ppl_diffusion.potentials.calls.guided_sizes`),
        or one at a time where failures are expected (a ``timeout``, ``retries``, or an
        ``on_error`` that is not ``"raise"``): the neighbours of a failure would have to be asked
        about again.
    :param executor: where calls run.
    :param num_workers: how many calls it runs at once, where it does not say so itself.
    :param timeout: seconds that a call may take, in an executor that can end calls
        (:class:`~ppl_diffusion.potentials.Processes`, ``RayExecutor``); in another one the seconds
        without any call finishing after which the running ones are given up, though they run on.
    :param on_error: ``"raise"`` a :class:`~ppl_diffusion.errors.PotentialError`; ``"reject"``: a
        failed sequence is counted in :attr:`num_failures` and gets NaN here, now and later; or a
        number that it gets instead, in units of the function.
    :param retries: how often a failed sequence is asked about again before it counts as one.
    :param key: what tells sequences apart, ``rows (B, L) -> B`` texts or bytes (the tokens by
        default): of those with one key one is asked about, and speaks for all.
    :param cache_size: values remembered, the least recently used are dropped first.
    :param cache: an SQLite file where answers and failures outlive the run, which runs of one
        machine may share.
    :param version: of the function; answers of another version are not used.
    :param retry_failed: ask again about what failed according to the file.
    :param budget: sequences that may be handed to ``fn`` in the life of this object, repetitions
        included; cached ones are free, and look-aheads beyond it get a neutral guess.
    :param reserve: how many of them are kept back for values that are no look-aheads.
    :param worst: the one infinite value that is legal, if any (the value of an impossible
        sequence); NaN and every other infinity is a failure.
    """

    fn: RowFunction
    _: KW_ONLY
    name: str | None = None
    batch_size: int | None = None
    executor: Executor | None = None
    num_workers: int | None = None
    timeout: float | None = None
    on_error: OnError = "raise"
    retries: int = 0
    key: KeyFunction | None = None
    cache_size: int = 100_000
    cache: str | Path | None = None
    version: str = ""
    retry_failed: bool = False
    budget: int | None = None
    reserve: int | None = None
    worst: float | None = -math.inf

    def check(self) -> None:
        """Check the settings.

        :raises TypeError: if the function or the executor is none.
        :raises ValueError: if an option cannot be used.
        """
        if not callable(self.fn):
            raise TypeError(f"{self.name}: fn must be callable, got {type(self.fn).__name__}.")
        _check_executor(self)
        _check_policy(self)
        _check_numbers(self)
        if self.reserve is not None and self.budget is None:
            raise ValueError(f"{self.name}: reserve={self.reserve} needs the budget it is part of.")
        if self.cache is None and (self.version or self.retry_failed):
            raise ValueError(
                f"{self.name}: version and retry_failed need the file they are about, cache=."
            )

    def sizes(self, count: int, num_workers: int | None) -> list[int]:
        """Return how many sequences each call is given.

        :param count: sequences in all.
        :param num_workers: calls that run at once, None where nobody knows.
        """
        size = self.batch_size
        if size is None and self.executor is not None:
            if num_workers is not None and not self._expects_failures:
                return guided_sizes(count, num_workers)
            size = 1
        size = size or max(count, 1)
        return [min(size, count - begin) for begin in range(0, count, size)]

    @property
    def _expects_failures(self) -> bool:
        """Whether neighbours of a failure would have to be asked about again."""
        timeout = self.timeout or getattr(self.executor, "timeout", None)
        return timeout is not None or self.on_error != "raise" or self.retries > 0

    def read(self, outcome: Outcome, count: int) -> list[Answer]:
        """Return what came back for each of so many sequences.

        :param outcome: of the call.
        """
        if isinstance(outcome, Exception):
            return [failure_of(outcome)] * count
        return [self._checked(value) for value in outcome]

    def _checked(self, value: float | str) -> Answer:
        if isinstance(value, str):
            return failure_of(value)
        legal = math.isfinite(value) or value == self.worst
        return value if legal else failure_of(f"it returned {value}")

    def value_of(self, answer: Answer) -> float:
        """Return the value of a sequence, NaN where it is rejected.

        :param answer: what is known of it.
        """
        if not isinstance(answer, Failure):
            return answer
        return math.nan if isinstance(self.on_error, str) else float(self.on_error)

    def refuse(self, row: Tensor, failure: Failure, cause: Exception | None) -> NoReturn:
        """Raise the error for a sequence.

        :param row: the sequence, int64 ``(L,)``.
        """
        raise PotentialError(
            f"{self.name} failed on the sequence {shown(self.fn, row)} ({failure.message}); mend "
            'the function, or pass on_error="reject" to give such sequences probability zero.'
        ) from cause


def _check_numbers(function: FunctionSettings) -> None:
    for option, least in _LEAST.items():
        number = getattr(function, option)
        if number is not None and not _whole(number, least):
            raise ValueError(
                f"{function.name}: {option} must be a whole number, at least {least}, got "
                f"{number!r}."
            )


def _check_policy(function: FunctionSettings) -> None:
    policy = function.on_error
    if isinstance(policy, str) and policy in ("raise", "reject"):
        return
    if not isinstance(policy, int | float) or isinstance(policy, bool):
        raise ValueError(
            f'{function.name}: on_error is "raise" or "reject", or a value that failed sequences '
            f"get, got {policy!r}."
        )
    if not (math.isfinite(policy) or policy == function.worst):
        raise ValueError(
            f"{function.name}: the value of failed sequences must be finite, got "
            f'on_error={policy!r}; "reject" gives them probability zero.'
        )


def _check_executor(function: FunctionSettings) -> None:
    name, executor, timeout = function.name, function.executor, function.timeout
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"{name}: an executor has a method submit, such as Processes(4), got "
            f"{type(executor).__name__}."
        )
    if function.num_workers is not None and executor is None:
        raise ValueError(
            f"{name}: num_workers={function.num_workers!r} needs the executor they work in; "
            "pass executor=Processes(...), which knows its own number."
        )
    if timeout is not None and (executor is None or not timeout > 0):
        raise ValueError(
            f"{name}: timeout needs an executor and a positive number of seconds, got "
            f"{timeout} with executor={executor}."
        )


def _whole(number: Any, least: int) -> bool:
    whole = isinstance(number, int | Integral) and not isinstance(number, bool)
    return whole and int(number) >= least


def shown(fn: RowFunction, row: Tensor) -> str:
    """Return a sequence as whoever wrote the function knows it: a text, or tokens.

    :param row: int64 ``(L,)``.
    """
    decode = getattr(fn, "decode", None)
    try:
        return str(row.tolist()) if decode is None else repr(decode(row[None])[0])
    except Exception:  # words about a failure must not fail themselves
        return str(row.tolist())
