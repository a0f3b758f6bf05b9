"""Workers that are actors of Ray, on one machine or many."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

from ppl_diffusion.potentials.causes import Died, GaveUp
from ppl_diffusion.potentials.child import Functions, read_call, remember
from ppl_diffusion.potentials.crew import CrewExecutor
from ppl_diffusion.potentials.parcels import Parcel
from ppl_diffusion.potentials.replies import read_reply
from ppl_diffusion.potentials.worker_process import START


class RayExecutor(CrewExecutor):
    """An executor of Ray actors; one that dies or takes too long is killed and replaced.

    Ray starts on this machine unless it runs already; ``ray.init(address="auto")`` before that
    joins a cluster. The package, and the modules that the function needs, must be installed where
    its actors live.

    :param num_workers: how many actors; each is started when it is first needed.
    :param timeout: seconds that a call may take once its actor has read it, None for ever.
    :param num_cpus: processors that Ray counts for each actor.
    :raises ModuleNotFoundError: if Ray is not installed.
    :raises ValueError: if a number is not usable.

    Example::

        reward = Reward(dock, executor=RayExecutor(64, timeout=600), on_error="reject")
    """

    def __init__(
        self, num_workers: int, *, timeout: float | None = None, num_cpus: float = 1
    ) -> None:
        ray = _library()
        if not ray.is_initialized():
            ray.init()
        super().__init__(partial(RayWorker, ray, num_cpus), num_workers, timeout)


class Caller:
    """What an actor does: it reads a call, and makes it when it is asked to."""

    def __init__(self) -> None:
        self._functions = Functions()

    def read(self, message: bytes) -> None:
        """Read a call, and import what it needs."""
        self._call = read_call(message, self._functions)

    def make(self) -> bytes:
        """Make it, and return the reply."""
        return self._call()


class RayWorker:
    """An actor, seen from here.

    :param ray: the library.
    :param num_cpus: processors that Ray counts for it.

    :ivar spent: whether it must not be given another call.
    """

    def __init__(self, ray: ModuleType, num_cpus: float) -> None:
        self.spent = False
        self._ray, self._sent = ray, OrderedDict[bytes, None]()
        options = {"num_cpus": num_cpus, "max_restarts": 0}
        self._actor: Any = ray.remote(**options)(Caller).remote()

    def call(self, parcel: Parcel, arguments: bytes, timeout: float | None) -> Any:
        """Make a call and return its result.

        :param parcel: the function.
        :param arguments: pickled ``(args, kwargs)``.
        :param timeout: seconds that it may take once it was read.
        :raises GaveUp: if it takes longer; the actor is killed.
        :raises Died: if the actor dies.
        :raises BrokenExecutor: if the actor cannot read the function.
        """
        try:
            reply = self._exchange(parcel, arguments, timeout)
        except self._ray.exceptions.GetTimeoutError:
            self.kill()
            raise GaveUp(f"no answer within {timeout:g} s") from None
        except self._ray.exceptions.RayError as error:
            self.spent = True
            raise Died(f"its actor is gone ({_first_line(error)})") from None
        return read_reply(reply)

    def kill(self) -> None:
        """Kill the actor."""
        self.spent = True
        with suppress(Exception):  # it, or all of Ray, may be gone
            self._ray.kill(self._actor)

    def end(self) -> None:
        """Kill it, as it has nothing to do."""
        self.kill()

    def _exchange(self, parcel: Parcel, arguments: bytes, timeout: float | None) -> bytes:
        known = remember(self._sent, parcel.digest)
        message = pickle.dumps((parcel.digest, None if known else parcel.pickled, arguments))
        self._begin(self._actor.read.remote(message))
        reply: bytes = self._ray.get(self._actor.make.remote(), timeout=timeout)
        return reply

    def _begin(self, read: Any) -> None:
        try:
            self._ray.get(read, timeout=START)
        except self._ray.exceptions.GetTimeoutError:
            self.kill()
            raise BrokenExecutor(
                f"an actor did not start within {START:g} s: Ray has no processor free for it; "
                "give fewer workers"
            ) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")


def _library() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "RayExecutor needs Ray: install ppl-diffusion[ray], or use Processes on one machine."
        ) from error
    found: ModuleType = ray
    return found
