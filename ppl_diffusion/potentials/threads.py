"""Workers that an interpreter does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from numbers import Integral
from queue import SimpleQueue
from typing import Any

_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Threads(Executor):
    """An executor of threads that end with the interpreter, whatever they are busy with.

    The one of the standard library joins its threads at exit: a call that hangs then keeps the
    program for ever, though its results are long written. Here the call is left behind.

    :param num_workers: how many threads.
    :raises ValueError: if that is none, or no whole number.

    Example::

        reward = Reward(dock, executor=Threads(4), timeout=600, on_error="reject")
    """

    def __init__(self, num_workers: int) -> None:
        if not isinstance(num_workers, int | Integral) or num_workers < 1:
            raise ValueError(
                f"Threads: num_workers must be a whole number, at least 1, got {num_workers!r}."
            )
        self.num_workers = num_workers
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), daemon=True)
            for _ in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call.

        :raises RuntimeError: after :meth:`shutdown`.
        """
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._tasks.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once the queue is empty.

        :param wait: for all of them.
        :param cancel_futures: empty the queue.
        """
        self._closed = True
        while cancel_futures and not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads if wait else ():
            thread.join()


def _work(tasks: SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        future, fn, args, kwargs = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        del task, future, args, kwargs  # an idle thread holds nobody's tensors
