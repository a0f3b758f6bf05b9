"""Workers that are processes: killed with all they started when their time is over, and replaced.

A thread cannot be stopped inside compiled code, and a program that one has started runs on when the
thread is forgotten. So each worker is a process that leads a session of its own, and what is killed
is the group.

Workers are started as fresh interpreters that read calls from a pipe, and not by
``multiprocessing``: that imports the main module again in each of them, so that a script without
``if __name__ == "__main__"`` starts itself over and over, and a notebook has nothing to import;
and forking a process in which torch has threads may hang. Here functions of the main module travel
by value (``cloudpickle``), and the main module is never run twice.
"""

from __future__ import annotations

import os
from functools import partial

from ppl_diffusion.potentials.crew import CrewExecutor, check_count
from ppl_diffusion.potentials.worker_process import WorkerProcess


class Processes(CrewExecutor):
    """An executor of processes that outlive their calls, but no deadline.

    A call that takes too long fails with :class:`~ppl_diffusion.potentials.causes.GaveUp`, and one
    whose process ends with :class:`~ppl_diffusion.potentials.causes.Died`; a new process takes the
    next call, and no other call is lost. Nothing here keeps an interpreter from ending, and no
    worker outlives it. Workers do not see Ctrl-C.

    :param num_workers: how many processes; each is started when it is first needed.
    :param timeout: seconds that a call may take, counted from its start in the worker; None for
        ever.
    :param memory: bytes of address space that each may use (``RLIMIT_AS``), None for all; a
        process with torch takes up .7 GiB before it begins.
    :raises ValueError: if a number is not usable.
    :raises NotImplementedError: where there are no process groups (Windows).

    Example::

        reward = Reward(dock, executor=Processes(4, timeout=600), on_error="reject")
    """

    def __init__(
        self, num_workers: int, *, timeout: float | None = None, memory: int | None = None
    ) -> None:
        if os.name != "posix":
            raise NotImplementedError("Processes needs process groups, which only POSIX has.")
        if memory is not None:
            check_count("Processes", "memory", memory, "1 byte")
        super().__init__(partial(WorkerProcess, memory), num_workers, timeout)
