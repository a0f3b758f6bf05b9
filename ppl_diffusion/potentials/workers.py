"""Calls that run in an executor, and how busy they keep those who work there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from functools import partial
from typing import Any

from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answers import read_answer
from ppl_diffusion.potentials.calls import KILLED, Calls, Outcome, Piece, RowFunction
from ppl_diffusion.potentials.causes import GaveUp
from ppl_diffusion.potentials.times import Times as Times


def timed(fn: RowFunction, rows: Tensor) -> tuple[list[float | str], float]:
    """Return a function's answer and the seconds it took, where it runs.

    It is read there, too: a generator cannot travel, and numbers can.

    :param rows: int64 ``(B, L)``.
    """
    started = time.perf_counter()
    return read_answer(fn(rows), len(rows)), time.perf_counter() - started


class CallsBeside(Calls):
    """Calls that run in an executor while something else is done.

    :param fn: the function.
    :param executor: where they run.
    :param num_workers: calls that run at once, None where nobody knows.
    :param timeout: seconds that a call may take, where the executor can end calls
        (``submit_within``); elsewhere those without any call finishing after which the running
        ones are given up.
    :param name: how errors call the function.
    """

    def __init__(
        self,
        fn: RowFunction,
        executor: Executor,
        num_workers: int | None,
        timeout: float | None,
        name: str,
    ) -> None:
        super().__init__(fn, num_workers)
        self.executor, self.timeout, self.name = executor, timeout, name
        self._timed = partial(timed, fn)  # one object: executors may send it once
        self._pending: dict[Future[Any], Piece] = {}

    def _start(self, piece: Piece) -> None:
        try:
            call = self._submit(piece.rows)
        except RuntimeError as error:  # broken, or shut down
            self.cancel()
            raise self._lost(error) from error
        self.clock.started(call)
        self._pending[call] = piece
        call.add_done_callback(self.clock.ended)

    def _submit(self, rows: Tensor) -> Future[Any]:
        within = getattr(self.executor, "submit_within", None)
        if within is None:
            return self.executor.submit(self._timed, rows)
        call: Future[Any] = within(self.timeout, self._timed, rows)
        return call

    def _wait(self) -> Iterator[tuple[Piece, Outcome]]:
        for call in self._next():
            piece = self._pending.pop(call)
            self.clock.ended(call)  # it was given up, or its thread has not come to say so yet
            yield piece, self._outcome(call, piece)

    def _next(self) -> list[Future[Any]]:
        started = time.perf_counter()
        patience = None if hasattr(self.executor, "submit_within") else self.timeout
        done, waiting = wait(self._pending, patience, FIRST_COMPLETED)
        self.clock.waited(time.perf_counter() - started)
        # In the order in which they were asked: which of two failures is told first is no chance.
        found = [call for call in self._pending if call in done]
        found = found or [call for call in self._pending if call in waiting and call.running()]
        if found:
            return found
        raise PotentialError(
            f"{self.name} left no worker free: {sum(map(len, self._pending.values()))} sequences "
            f"were not started within {self.timeout} s; give the executor more workers, or a new "
            "one."
        )

    def _outcome(self, call: Future[Any], piece: Piece) -> Outcome:
        if not call.done():
            return GaveUp(f"no answer within {self.timeout} s")
        error = call.exception()
        if isinstance(error, BrokenExecutor):
            raise self._lost(error) from error
        if error is not None:
            self.counts[KILLED] += isinstance(error, GaveUp)
            return error if isinstance(error, Exception) else _as_exception(error)
        answer, piece.seconds = call.result()
        self.clock.worked(piece.seconds or 0.0)
        found: list[float | str] = answer
        return found

    def _lost(self, error: BaseException) -> PotentialError:
        return PotentialError(
            f"{self.name} lost its executor ({error}); "
            "check that the function can run in a worker, and give a new executor."
        )

    def cancel(self) -> None:
        super().cancel()
        for call in self._pending:
            call.cancel()
            self.clock.ended(call)
        self._pending.clear()


def _as_exception(error: BaseException) -> Exception:
    """Return ``sys.exit()`` of a worker as what it is here: a failure, and not the end of all."""
    kind: type[Exception] = type(type(error).__name__, (RuntimeError,), {})
    return kind(str(error))


def workers_of(executor: Executor | None) -> int | None:
    """Return how many calls an executor runs at once, None where it does not say.

    :param executor: the executor.
    """
    # Those of the standard library say it under a private name only.
    number = getattr(executor, "num_workers", getattr(executor, "_max_workers", None))
    return number if isinstance(number, int) and number > 0 else None
