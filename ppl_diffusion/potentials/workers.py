"""Calls that run in an executor, and how busy they keep those who work there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answers import read_answer
from ppl_diffusion.potentials.calls import Calls, Outcome, Piece, RowFunction
from ppl_diffusion.potentials.causes import GaveUp


@dataclass(frozen=True)
class Times:
    """Seconds that calls took.

    :param busy: of work, summed over workers; calls that raised or were given up are left out.
    :param under_way: during which at least one call was queued or running.
    :param waited: during which nobody did anything else than wait for them.
    """

    busy: float = 0.0
    under_way: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(
            self.busy + other.busy,
            self.under_way + other.under_way,
            self.waited + other.waited,
        )

    def since(self, before: Times) -> Times:
        """Return what was added.

        :param before: an earlier state.
        """
        return Times(
            self.busy - before.busy,
            self.under_way - before.under_way,
            self.waited - before.waited,
        )

    def told(self, num_workers: int | None) -> dict[str, Any]:
        """Return them in JSON types, with the shares that matter.

        ``utilisation`` is the share of the workers' time under way in which they worked, and
        ``overlap`` that in which the sampler had something else to do; None where nothing is known.

        :param num_workers: calls that run at once.
        """
        shares = {"utilisation": None, "overlap": None}
        if self.under_way > 0:
            workers = num_workers or float("nan")
            shares["utilisation"] = _share(self.busy / (workers * self.under_way))
            shares["overlap"] = _share(1 - self.waited / self.under_way)
        return {"seconds": self.busy, "under_way": self.under_way, **shares}


def _share(value: float) -> Any:
    # Clocks of two processes do not tick alike.
    return min(max(value, 0.0), 1.0) if value == value else None


@dataclass
class _Clock:
    """Measures :class:`Times`, from whichever thread a call ends in."""

    times: Times = Times()
    _open: set[Future[Any]] = field(default_factory=set)
    _since: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def started(self, call: Future[Any]) -> None:
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open.add(call)

    def ended(self, call: Future[Any]) -> None:
        with self._lock:
            if call not in self._open:  # known already
                return
            self._open.remove(call)
            if not self._open:
                self._add(under_way=time.perf_counter() - self._since)

    def worked(self, seconds: float) -> None:
        with self._lock:
            self._add(busy=seconds)

    def waited(self, seconds: float) -> None:
        with self._lock:
            self._add(waited=seconds)

    def _add(self, **seconds: float) -> None:
        before = asdict(self.times)
        self.times = replace(self.times, **{n: before[n] + x for n, x in seconds.items()})


def timed(fn: RowFunction, rows: Tensor) -> tuple[Any, float]:
    """Return a function's answer and the seconds it took, where it runs.

    :param rows: int64 ``(B, L)``.
    """
    started = time.perf_counter()
    return fn(rows), time.perf_counter() - started


class CallsBeside(Calls):
    """Calls that run in an executor while something else is done.

    :param fn: the function.
    :param executor: where they run.
    :param num_workers: calls that run at once, None where nobody knows.
    :param timeout: seconds without any call finishing after which the running ones are given up.
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
        self._pending: dict[Future[Any], Piece] = {}
        self._clock = _Clock()

    @property
    def times(self) -> Times:
        """What calls took so far."""
        return self._clock.times

    def _start(self, piece: Piece) -> None:
        try:
            call = self.executor.submit(partial(timed, self.fn), piece.rows)
        except RuntimeError as error:  # broken, or shut down
            self.cancel()
            raise self._lost(error) from error
        self._clock.started(call)
        self._pending[call] = piece
        call.add_done_callback(self._clock.ended)

    def _wait(self) -> Iterator[tuple[Piece, Outcome]]:
        for call in self._next():
            piece = self._pending.pop(call)
            self._clock.ended(call)  # it was given up, or its thread has not come to say so yet
            yield piece, self._outcome(call, len(piece))

    def _next(self) -> list[Future[Any]]:
        started = time.perf_counter()
        done, waiting = wait(self._pending, self.timeout, FIRST_COMPLETED)
        self._clock.waited(time.perf_counter() - started)
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

    def _outcome(self, call: Future[Any], count: int) -> Outcome:
        if not call.done():
            return GaveUp(f"no answer within {self.timeout} s")
        error = call.exception()
        if isinstance(error, BrokenExecutor):
            raise self._lost(error) from error
        if isinstance(error, Exception):
            return error
        answer, seconds = call.result()
        self._clock.worked(seconds)
        try:
            return read_answer(answer, count)
        except Exception as unread:
            return unread

    def _lost(self, error: BaseException) -> PotentialError:
        return PotentialError(
            f"{self.name} lost its executor ({error}); "
            "check that the function can run in a worker, and give a new executor."
        )

    def cancel(self) -> None:
        super().cancel()
        for call in self._pending:
            call.cancel()
            self._clock.ended(call)
        self._pending.clear()


def workers_of(executor: Executor | None) -> int | None:
    """Return how many calls an executor runs at once, None where it does not say.

    :param executor: the executor.
    """
    # Those of the standard library say it under a private name only.
    number = getattr(executor, "num_workers", getattr(executor, "_max_workers", None))
    return number if isinstance(number, int) and number > 0 else None
