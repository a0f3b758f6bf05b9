"""An executor of workers that may be lost, and are replaced."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from numbers import Integral
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from ppl_diffusion.potentials.parcels import Parcel, Parcels


class Worker(Protocol):
    """What makes one call after another, and may end with any of them.

    :ivar spent: whether it must not be given another call.
    """

    spent: bool

    def call(self, parcel: Parcel, arguments: bytes, timeout: float | None) -> Any: ...
    def kill(self) -> None: ...
    def end(self) -> None: ...


class _Task(NamedTuple):
    future: Future[Any]
    parcel: Parcel
    arguments: bytes
    timeout: float | None


class CrewExecutor(Executor):
    """A thread for each worker hands it calls, and starts another one when it is lost.

    :param make: starts a worker, when it is first needed.
    :param num_workers: how many work at once.
    :param timeout: seconds that a call may take, None for ever.
    :raises ValueError: if a number is not usable.
    """

    def __init__(
        self, make: Callable[[], Worker], num_workers: int, timeout: float | None = None
    ) -> None:
        owner = type(self).__name__
        check_count(owner, "num_workers", num_workers, "1")
        check_timeout(owner, timeout)
        self.num_workers, self.timeout = num_workers, timeout
        self._parcels, self._crew = Parcels(), _Crew(make)
        self._threads = [
            threading.Thread(target=_attend, args=(self._crew,), daemon=True)
            for _ in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()
        # Called at exit, too, and before that when nobody holds the executor any more.
        self._end = weakref.finalize(self, _abandon, self._crew, num_workers)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call.

        :raises RuntimeError: after :meth:`shutdown`.
        :raises PotentialError: if the function or an argument cannot be sent to a process.
        """
        return self.submit_within(None, fn, *args, **kwargs)

    def submit_within(
        self, timeout: float | None, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """Queue a call that has a deadline of its own, if that is before the one of all.

        :param timeout: seconds that it may take.
        """
        if self._crew.closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        limits = [limit for limit in (timeout, self.timeout) if limit is not None]
        future: Future[Any] = Future()
        arguments = self._parcels.packed((args, kwargs), fn)
        task = _Task(future, self._parcels.of(fn), arguments, min(limits, default=None))
        self._crew.tasks.put(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers end once the queue is empty.

        :param wait: for all of them.
        :param cancel_futures: empty the queue.
        """
        self._crew.close(self.num_workers, cancel=cancel_futures)
        for thread in self._threads if wait else ():
            thread.join()

    def kill(self) -> None:
        """End all workers and what they started, now; calls under way fail."""
        self._end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the calls, or kill them where an error ends the block."""
        if kind is None:
            self.shutdown()
        else:
            self.kill()


class _Crew:
    """What the threads of an executor share, which they must not keep alive."""

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self.closed = self.dead = False
        self._workers: set[Worker] = set()
        self._lock = threading.Lock()

    def start(self) -> Worker:
        worker = self._make()
        with self._lock:
            self._workers.add(worker)
            dead = self.dead
        if dead:
            worker.kill()
        return worker

    def end(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.end()

    def close(self, num_workers: int, *, cancel: bool) -> None:
        first, self.closed = not self.closed, True
        while cancel and not self.tasks.empty():
            task = self.tasks.get()
            if task is not None:
                task.future.cancel()
        for _ in range(num_workers if first or cancel else 0):
            self.tasks.put(None)

    def kill(self) -> None:
        with self._lock:
            self.dead, workers = True, list(self._workers)
        for worker in workers:
            worker.kill()


def _abandon(crew: _Crew, num_workers: int) -> None:
    crew.close(num_workers, cancel=True)
    crew.kill()


def _attend(crew: _Crew) -> None:
    """Give tasks to one process after another, until there are no more."""
    worker: Worker | None = None
    while (task := crew.tasks.get()) is not None:
        if not task.future.set_running_or_notify_cancel():
            continue
        try:
            worker = worker or crew.start()
            result = worker.call(task.parcel, task.arguments, task.timeout)
        except BaseException as error:
            task.future.set_exception(error)
            error.__traceback__ = None  # it would hold the task's frames
        else:
            task.future.set_result(result)
            del result
        del task  # an idle thread holds nobody's tensors
        if worker is not None and worker.spent:
            crew.end(worker)
            worker = None
    if worker is not None:
        crew.end(worker)


def check_count(owner: str, what: str, number: Any, least: str) -> None:
    """Check a whole number above zero.

    :raises ValueError: if it is none.
    """
    if isinstance(number, bool) or not isinstance(number, int | Integral) or number < 1:
        raise ValueError(
            f"{owner}: {what} must be a whole number, at least {least}, got {number!r}."
        )


def check_timeout(owner: str, timeout: Any) -> None:
    """Check a number of seconds.

    :raises ValueError: if it is none.
    """
    if timeout is None:
        return
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (number and math.isfinite(timeout) and timeout > 0):
        raise ValueError(
            f"{owner}: timeout must be a positive, finite number of seconds, got {timeout!r}."
        )
