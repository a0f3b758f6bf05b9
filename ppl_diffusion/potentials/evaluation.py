"""Functions of a sequence that are slow, may fail, and must be evaluated once per sequence.

SMC asks for the same sequences again and again (resampling copies them), and a docking program or
a laboratory robot answers slowly, in parallel, and not always. :class:`SequenceFunction` sits
between the two: it removes duplicates, remembers values, distributes chunks over an executor, and
turns every failure either into one clear error or into a counted rejection.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answers import WrongAnswer, read_answer
from ppl_diffusion.potentials.failures import report
from ppl_diffusion.rows import distinct_rows

OnError = Literal["raise", "reject"]
RowFunction = Callable[[Tensor], Any]
_Piece = list[int]
_Outcome = list[float | str] | Exception
"""What came back for a piece: a number or a reason for each sequence, or an error for all."""


class FunctionOptions(TypedDict, total=False):
    """Options of a :class:`SequenceFunction` that the potentials made from one hand on."""

    name: str | None
    batch_size: int | None
    executor: Executor | None
    timeout: float | None
    on_error: OnError
    cache_size: int


class _GaveUp(TimeoutError):
    """A call was still running when its time was over."""


@dataclass(eq=False, repr=False)
class SequenceFunction:
    """A function of sequences with a cache, an optional executor, and a policy for failures.

    :param fn: ``x0 (B, L) int64 -> (B,)``: a tensor, an array, a series, a list or a generator of
        numbers. None, text or any other object in place of a number, and another number of values
        than of sequences, are failures like an exception.
    :param batch_size: sequences per call of ``fn``; by default all at once, and one at a time when
        there is an executor.
    :param executor: where calls run (with a process pool, ``fn`` must be picklable).
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
    timeout: float | None = None
    on_error: OnError = "raise"
    cache_size: int = 100_000
    worst: float | None = -math.inf
    num_calls: int = field(default=0, init=False)
    num_sequences: int = field(default=0, init=False)
    num_failures: int = field(default=0, init=False)
    first_failure: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or str(getattr(self.fn, "__name__", type(self.fn).__name__))
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._check_options()

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

    def clear(self) -> None:
        """Forget all values, rejections included; the counters stay."""
        self._cache.clear()

    def _look_up(self, rows: Tensor) -> list[float]:
        keys = [row.tobytes() for row in rows.to(torch.int32).numpy()]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        for key in found:
            self._cache.move_to_end(key)
        unknown = [i for i, key in enumerate(keys) if key not in found]
        for i, value in self._evaluate(rows, unknown):
            found[keys[i]] = self._cache[keys[i]] = value
            self.num_sequences += 1
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        report(str(self.name), found, self.first_failure)
        return [found[key] for key in keys]

    def _evaluate(self, rows: Tensor, unknown: _Piece) -> Iterator[tuple[int, float]]:
        """Yield ``(index, value)`` as values come in."""
        again: _Piece = []
        for piece, outcome in self._call(rows, self._split(unknown)):
            # What took too long once would take too long again.
            failed = isinstance(outcome, Exception) and not isinstance(outcome, _GaveUp)
            if failed and len(piece) > 1:
                again += piece
            else:
                yield from self._settle(rows, piece, outcome)
        for piece, outcome in self._call(rows, [[i] for i in again]):
            yield from self._settle(rows, piece, outcome)

    def _split(self, indices: _Piece) -> list[_Piece]:
        size = self.batch_size or (1 if self.executor else max(len(indices), 1))
        return [indices[i : i + size] for i in range(0, len(indices), size)]

    def _call(self, rows: Tensor, pieces: list[_Piece]) -> Iterator[tuple[_Piece, _Outcome]]:
        """Yield every piece with what came back for it."""
        if self.executor is not None:
            yield from self._call_in_executor(self.executor, rows, pieces)
            return
        for piece in pieces:
            self.num_calls += len(piece)
            outcome: _Outcome
            try:
                outcome = read_answer(self.fn(rows[piece]), len(piece))
            except Exception as error:
                outcome = error
            yield piece, outcome

    def _call_in_executor(
        self, executor: Executor, rows: Tensor, pieces: list[_Piece]
    ) -> Iterator[tuple[_Piece, _Outcome]]:
        self.num_calls += sum(map(len, pieces))
        pending = {executor.submit(self.fn, rows[piece]): piece for piece in pieces}
        try:
            while pending:
                for future in self._next(pending):
                    piece = pending.pop(future)
                    yield piece, self._outcome(future, len(piece))
        finally:
            for future in pending:
                future.cancel()

    def _next(self, pending: dict[Future[Any], _Piece]) -> Sequence[Future[Any]]:
        done, waiting = wait(pending, self.timeout, FIRST_COMPLETED)
        if done:
            return list(done)
        stuck = [future for future in waiting if future.running()]
        if stuck:
            return stuck
        raise PotentialError(
            f"{self.name} left no worker free: {sum(map(len, pending.values()))} sequences were "
            f"not started within {self.timeout} s; give the executor more workers, or a new one."
        )

    def _outcome(self, future: Future[Any], count: int) -> _Outcome:
        if not future.done():
            return _GaveUp(f"no answer within {self.timeout} s")
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise PotentialError(
                f"{self.name} lost its executor ({error}); "
                "check that the function can run in a worker, and give a new executor."
            ) from error
        if isinstance(error, Exception):
            return error
        try:
            return read_answer(future.result(), count)
        except Exception as unread:
            return unread

    def _settle(
        self, rows: Tensor, piece: _Piece, outcome: _Outcome
    ) -> Iterator[tuple[int, float]]:
        """Apply the policy to what came back for one piece."""
        cause = outcome if isinstance(outcome, Exception) else None
        found = [_reason(outcome)] * len(piece) if isinstance(outcome, Exception) else outcome
        answers = [self._check(value) for value in found]
        for i, answer in sorted(
            zip(piece, answers, strict=True), key=lambda entry: isinstance(entry[1], str)
        ):
            yield i, self._reject(rows[i], answer, cause) if isinstance(answer, str) else answer

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
        if self.timeout is not None and (self.executor is None or not self.timeout > 0):
            raise ValueError(
                f"{self.name}: timeout needs an executor and a positive number of seconds, got "
                f"{self.timeout} with executor={self.executor}."
            )
        for option in ("batch_size", "cache_size"):
            number = getattr(self, option)
            if number is not None and number < 1:
                raise ValueError(f"{self.name}: {option} must be at least 1, got {number}.")


def _reason(error: Exception) -> str:
    if isinstance(error, WrongAnswer):
        return str(error)
    return f"{type(error).__name__.lstrip('_')}: {error}"
