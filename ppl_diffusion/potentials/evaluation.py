"""Functions of a sequence that are slow, may fail, and must be evaluated once per sequence.

SMC asks for the same sequences again and again (resampling copies them), and a docking program or
a laboratory robot answers slowly, in parallel, and not always. :class:`SequenceFunction` sits
between the two: it removes duplicates, remembers values, hands pieces to an executor, and turns
every failure either into one clear error or into a counted rejection.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answers import WrongAnswer
from ppl_diffusion.potentials.calls import (
    Calls,
    CallsInTurn,
    Outcome,
    Piece,
    RowFunction,
    guided_sizes,
)
from ppl_diffusion.potentials.causes import GaveUp
from ppl_diffusion.potentials.failures import report, watch_calls
from ppl_diffusion.potentials.workers import CallsBeside, workers_of
from ppl_diffusion.rows import distinct_rows

OnError = Literal["raise", "reject"]


class FunctionOptions(TypedDict, total=False):
    """Options of a :class:`SequenceFunction` that the potentials made from one hand on."""

    name: str | None
    batch_size: int | None
    executor: Executor | None
    num_workers: int | None
    timeout: float | None
    on_error: OnError
    cache_size: int


@dataclass(eq=False, repr=False)
class SequenceFunction:
    """A function of sequences with a cache, an optional executor, and a policy for failures.

    :param fn: ``x0 (B, L) int64 -> (B,)``: a tensor, an array, a series, a list or a generator of
        numbers. None, text or any other object in place of a number, and another number of values
        than of sequences, are failures like an exception.
    :param batch_size: sequences per call of ``fn``; by default all at once, and with an executor
        pieces that shrink towards the end (:func:`~ppl_diffusion.potentials.calls.guided_sizes`),
        or one at a time where failures are expected (a ``timeout``, or ``on_error="reject"``):
        the neighbours of a failure would have to be asked about again.
    :param executor: where calls run (with a process pool, ``fn`` must be picklable).
    :param num_workers: how many calls it runs at once, where it does not say so itself.
    :param timeout: seconds without any call finishing after which the running ones are given up;
        needs an executor.
    :param on_error: ``"raise"`` a :class:`~ppl_diffusion.errors.PotentialError`, or ``"reject"``:
        a failed sequence is counted in :attr:`num_failures` and gets NaN here, now and later.
    :param cache_size: values remembered, the least recently used are dropped first.
    :param worst: the one infinite value that is legal, if any (the value of an impossible
        sequence); NaN and every other infinity is a failure.

    A batch that raises is repeated one sequence at a time, so that one bad sequence is found and
    costs no other its value. Values that were finished before an error stay in the cache.

    :ivar num_calls: sequences handed to ``fn`` so far, repetitions after a failure included.
    :ivar num_sequences: distinct sequences that got an answer so far, rejections included.
    :ivar num_failures: sequences rejected so far.
    :ivar first_failure: the first of them and its reason, in words; None while there is none.
    """

    fn: RowFunction
    _: KW_ONLY
    name: str | None = None
    batch_size: int | None = None
    executor: Executor | None = None
    num_workers: int | None = None
    timeout: float | None = None
    on_error: OnError = "raise"
    cache_size: int = 100_000
    worst: float | None = -math.inf
    num_sequences: int = field(default=0, init=False)
    num_failures: int = field(default=0, init=False)
    first_failure: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or str(getattr(self.fn, "__name__", type(self.fn).__name__))
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._check_options()
        # How many work is looked up once: it sizes the pieces, which must not change in a run.
        workers = self.num_workers or workers_of(self.executor)
        self._calls: Calls = (
            CallsInTurn(self.fn)
            if self.executor is None
            else CallsBeside(self.fn, self.executor, workers, self.timeout, str(self.name))
        )

    @property
    def num_calls(self) -> int:
        return self._calls.num_rows

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the value of each sequence, NaN where it was rejected.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: float64 ``(*batch,)`` on the device of ``x0``.
        :raises PotentialError: if ``fn`` fails and ``on_error="raise"``, or lost its executor.
        """
        rows = x0.reshape(-1, x0.shape[-1])
        first, inverse = distinct_rows(rows)
        values = torch.tensor(self._look_up(rows[first].cpu()), dtype=torch.float64)
        return values.to(x0.device)[inverse].reshape(x0.shape[:-1])

    def prefetch(self, x0: Tensor) -> None:
        """Start calls for what is not known yet in the executor, and wait for none of them.

        Asking for these sequences later collects the answers; without an executor nothing happens.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        """
        if self.executor is not None:
            watch_calls(str(self.name), self._calls)
            rows = x0.reshape(-1, x0.shape[-1])
            rows = rows[distinct_rows(rows)[0]].cpu()
            self._start(rows, _keys(rows))

    def clear(self) -> None:
        """Forget all values, rejections included; the counters stay."""
        self._cache.clear()

    def _look_up(self, rows: Tensor) -> list[float]:
        watch_calls(str(self.name), self._calls)
        keys = _keys(rows)
        found = {key: self._cache[key] for key in keys if key in self._cache}
        for key in found:
            self._cache.move_to_end(key)
        self._calls.num_known += len(found)
        self._start(rows, keys)
        wanted = {key for key in keys if key not in found}
        for key, value in self._answers(wanted):
            if key in wanted:
                found[key] = value
                wanted.remove(key)
        report(str(self.name), self.fn, found, self.first_failure)
        return [found[key] for key in keys]

    def _start(self, rows: Tensor, keys: list[bytes]) -> None:
        """Start calls for rows that have no value and are not being asked about already."""
        known, under_way = self._cache, self._calls.under_way
        new = [i for i, key in enumerate(keys) if key not in known and key not in under_way]
        begin = 0
        for size in self._sizes(len(new)):
            part = new[begin : begin + size]
            self._calls.submit(Piece([keys[i] for i in part], rows[part]))
            begin += size

    def _sizes(self, count: int) -> list[int]:
        size, workers = self.batch_size, self._calls.num_workers
        if size is None and self.executor is not None:
            alone = self.timeout is not None or self.on_error == "reject" or workers is None
            if workers is not None and not alone:
                return guided_sizes(count, workers)
            size = 1
        size = size or max(count, 1)
        return [min(size, count - begin) for begin in range(0, count, size)]

    def _answers(self, wanted: set[bytes]) -> Iterator[tuple[bytes, float]]:
        """Yield values as they come in, others than those wanted too, until these are all known."""
        try:
            while wanted:
                for piece, outcome in self._calls.finished():
                    yield from self._answered(piece, outcome)
        except BaseException:
            self._calls.cancel()
            raise

    def _answered(self, piece: Piece, outcome: Outcome) -> Iterator[tuple[bytes, float]]:
        # What took too long once would take too long again.
        failed = isinstance(outcome, Exception) and not isinstance(outcome, GaveUp)
        if failed and len(piece) > 1:
            for single in piece.singles():
                self._calls.submit(single)
            return
        for key, value in self._settle(piece, outcome):
            self._cache[key] = value
            self.num_sequences += 1
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
            yield key, value

    def _settle(self, piece: Piece, outcome: Outcome) -> Iterator[tuple[bytes, float]]:
        """Apply the policy to what came back for one piece."""
        cause = outcome if isinstance(outcome, Exception) else None
        found = [_reason(outcome)] * len(piece) if isinstance(outcome, Exception) else outcome
        answers = enumerate(map(self._check, found))
        for i, answer in sorted(answers, key=lambda entry: isinstance(entry[1], str)):
            value = (
                self._reject(piece.rows[i], answer, cause) if isinstance(answer, str) else answer
            )
            yield piece.keys[i], value

    def _check(self, value: float | str) -> float | str:
        legal = isinstance(value, str) or math.isfinite(value) or value == self.worst
        return value if legal else f"it returned {value}"

    def _reject(self, row: Tensor, reason: str, cause: Exception | None) -> float:
        if self.on_error == "raise":
            raise PotentialError(
                f"{self.name} failed on the sequence {row.tolist()} ({reason}); mend the function, "
                'or pass on_error="reject" to give such sequences probability zero.'
            ) from cause
        self.num_failures += 1
        self.first_failure = self.first_failure or f"{reason}, on the sequence {row.tolist()}"
        return math.nan

    def _check_options(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"{self.name}: fn must be callable, got {type(self.fn).__name__}.")
        if self.on_error not in ("raise", "reject"):
            raise ValueError(
                f'{self.name}: on_error is "raise" or "reject", got {self.on_error!r}.'
            )
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise TypeError(
                f"{self.name}: an executor has a method submit, such as Threads(4), got "
                f"{type(self.executor).__name__}."
            )
        if self.num_workers is not None and self.executor is None:
            raise ValueError(
                f"{self.name}: num_workers={self.num_workers!r} needs the executor they work in; "
                "pass executor=Threads(...), which knows its own number."
            )
        if self.timeout is not None and (self.executor is None or not self.timeout > 0):
            raise ValueError(
                f"{self.name}: timeout needs an executor and a positive number of seconds, got "
                f"{self.timeout} with executor={self.executor}."
            )
        for option in ("batch_size", "cache_size", "num_workers"):
            number = getattr(self, option)
            if number is not None and (not isinstance(number, Integral) or number < 1):
                raise ValueError(
                    f"{self.name}: {option} must be a whole number, at least 1, got {number!r}."
                )


def _keys(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.to(torch.int32).numpy()]


def _reason(error: Exception) -> str:
    if isinstance(error, WrongAnswer):
        return str(error)
    return f"{type(error).__name__.lstrip('_')}: {error}"
