"""What a worker process does: it waits for calls, makes them, and sends back what came of them.

It knows its parent by two descriptors. Over one go messages; the other is never written to, and
ends when the parent does, whatever that died of. A worker takes its whole group with it then.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

READY, BEGUN = b"ready", b"begun"
"""A worker says the one when it takes calls, and the other when it has read one and makes it."""

KEPT = 8
"""Functions that a worker remembers, so that a network is sent once and not with each call."""

_PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux


def serve(messages: int, lifeline: int, memory: int | None) -> None:
    """Make calls until the parent closes the connection.

    :param messages: descriptor of the connection.
    :param lifeline: descriptor that ends with the parent.
    :param memory: bytes of address space allowed, None for all.
    """
    for descriptor in (messages, lifeline):  # a program started here must not hold them open
        os.set_inheritable(descriptor, False)
    _die_with_parent(lifeline)
    if memory is not None:
        _limit(memory)
    connection, functions = Connection(messages), Functions()
    connection.send_bytes(READY)
    try:
        while True:
            _answer(connection, functions)
    except (EOFError, OSError):  # the parent has closed it, or is gone
        return


class Functions:
    """Functions by the digest of their pickles, the last few."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Any] = OrderedDict()

    def get(self, digest: bytes, pickled: bytes | None) -> Callable[..., Any]:
        """Return a function.

        :param digest: of its pickle.
        :param pickled: the pickle, None where it was sent before.
        """
        if pickled is not None:
            self._known[digest] = pickle.loads(pickled)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        found: Callable[..., Any] = self._known[digest]
        return found


def remember(sent: OrderedDict[bytes, None], digest: bytes) -> bool:
    """Note at the parent's side what a worker remembers, and return whether it did already.

    :param sent: what it was sent.
    :param digest: of the next function.
    """
    known = digest in sent
    sent[digest] = None
    sent.move_to_end(digest)
    if len(sent) > KEPT:
        sent.popitem(last=False)
    return known


def read_call(message: bytes, functions: Functions) -> Callable[[], bytes]:
    """Return what makes a call and gives the reply, after everything it needs was imported.

    :param message: what :meth:`~ppl_diffusion.potentials.crew.Worker.call` has sent.
    :param functions: what is remembered.
    """
    digest, pickled, arguments = pickle.loads(message)
    try:
        fn = functions.get(digest, pickled)
        args, kwargs = pickle.loads(arguments)
    except BaseException as error:
        return partial(pickle.dumps, ("unread", f"{type(error).__name__}: {error}"))
    return partial(_reply, fn, args, kwargs)


def _answer(connection: Connection, functions: Functions) -> None:
    call = read_call(connection.recv_bytes(), functions)
    connection.send_bytes(BEGUN)
    connection.send_bytes(call())


def _reply(fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    try:
        return pickle.dumps(("value", fn(*args, **kwargs)))
    except BaseException as error:  # sys.exit() of a user's function is a failure of its own
        return _told(error)


def _told(error: BaseException) -> bytes:
    name, words = type(error).__name__, str(error)
    try:
        pickled = pickle.dumps(error) if isinstance(error, Exception) else None
    except Exception:
        pickled = None
    return pickle.dumps(("error", name, words, pickled))


def _die_with_parent(lifeline: int) -> None:
    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    if sys.platform == "linux":  # that thread never runs while compiled code holds the interpreter
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)


def _limit(memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
