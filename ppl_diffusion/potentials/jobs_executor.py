"""Executors whose calls are jobs of a queue, such as those of submitit, as executors of futures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from ppl_diffusion.potentials.threads import Threads


class Jobs(Protocol):
    """What submits jobs that are no futures, and have a result."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...


class JobsExecutor(Threads):
    """Waits for jobs in threads, so many at once.

    A job of a cluster queue takes its time to start: give each many sequences (``batch_size``). Its
    time limit is the queue's; what the queue ends is a failure like any other.

    :param jobs: submits them, such as a ``submitit.AutoExecutor``.
    :param num_workers: how many are in the queue at once.

    Example::

        cluster = submitit.AutoExecutor("logs")
        cluster.update_parameters(timeout_min=60, slurm_partition="short")
        reward = Reward(dock, executor=JobsExecutor(cluster, 100), batch_size=50)
    """

    def __init__(self, jobs: Jobs, num_workers: int) -> None:
        super().__init__(num_workers)
        self.jobs = jobs

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call.

        :raises RuntimeError: after :meth:`shutdown`.
        """
        return super().submit(partial(_result, self.jobs, fn), *args, **kwargs)


def _result(jobs: Jobs, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return jobs.submit(fn, *args, **kwargs).result()
