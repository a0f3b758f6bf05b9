"""One worker process, seen from its parent."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from ppl_diffusion.potentials.causes import Died, GaveUp, ending
from ppl_diffusion.potentials.child import BEGUN, READY, remember
from ppl_diffusion.potentials.parcels import Parcel
from ppl_diffusion.potentials.replies import read_reply

START = 300.0
"""Seconds to start an interpreter and to import what a function needs, before its own time runs."""

_PULSE = 0.2
"""Seconds between looks at whether it lives: what it has started may hold its pipe open."""

_GRACE = 5.0
_BOOT = (
    "import json, sys; path, messages, lifeline, memory = json.loads(sys.argv[1]); "
    "sys.path[:] = path; sys.argv[1:] = []; "
    "from ppl_diffusion.potentials.child import serve; serve(messages, lifeline, memory)"
)


class WorkerProcess:
    """A process that leads its own session, and makes one call after another.

    :param memory: bytes of address space that it may use, None for all.

    :ivar spent: whether it must not be given another call.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.spent = False
        self._sent: OrderedDict[bytes, None] = OrderedDict()
        self._ready = False
        self._connection, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        path = [folder or os.getcwd() for folder in sys.path]
        told = json.dumps([path, theirs.fileno(), lifeline, memory])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, told],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                # Workers side by side would otherwise start a thread per core each.
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)

    def call(self, parcel: Parcel, arguments: bytes, timeout: float | None) -> Any:
        """Make a call and return its result.

        :param parcel: the function.
        :param arguments: pickled ``(args, kwargs)``.
        :param timeout: seconds that it may take once it has begun.
        :raises GaveUp: if it takes longer; the group is killed.
        :raises Died: if the process ends.
        :raises BrokenExecutor: if the process cannot read the function.
        """
        try:
            reply = self._exchange(parcel, arguments, timeout)
        except GaveUp:
            raise
        except (EOFError, OSError):
            self.spent = True
            raise self._death() from None
        try:
            return read_reply(reply)
        except MemoryError:
            self.spent = True  # what is left of it is good for nothing
            raise

    def kill(self) -> None:
        """Kill it, and everything in its group."""
        self.spent = True
        # Its leader may be over and what that has started not.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Let it end, kill what is left of it, and free what it held."""
        self._close()
        if not self.spent:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self.kill()
        self._process.wait()

    def _exchange(self, parcel: Parcel, arguments: bytes, timeout: float | None) -> bytes:
        if not self._ready:
            self._next(START, "it did not start", READY)
            self._ready = True
        known = remember(self._sent, parcel.digest)
        pickled = None if known else parcel.pickled
        self._connection.send_bytes(pickle.dumps((parcel.digest, pickled, arguments)))
        self._next(START, "its function was not imported", BEGUN)
        return self._next(timeout, "no answer")

    def _next(self, timeout: float | None, what: str, expected: bytes | None = None) -> bytes:
        """Return the next message, or kill the group where there is none in time."""
        over = None if timeout is None else time.monotonic() + timeout
        while not self._connection.poll(_PULSE if over is None else self._pause(over)):
            if over is not None and time.monotonic() >= over:
                self.kill()
                raise GaveUp(f"{what} within {timeout:g} s")
            if self._process.poll() is not None and not self._connection.poll():
                raise EOFError
        message = self._connection.recv_bytes()
        assert expected is None or message == expected
        return message

    @staticmethod
    def _pause(over: float) -> float:
        return min(_PULSE, max(0.0, over - time.monotonic()))

    def _death(self) -> Died:
        # Its pipe closes a moment before it is over, and how it ended is worth the moment.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self.kill()
        when = "" if self._ready else " before it could begin"
        return Died(f"its process ended with {ending(self._process.wait())}{when}")

    def _close(self) -> None:
        self._connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1
