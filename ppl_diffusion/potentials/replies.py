"""What comes back from a worker."""

from __future__ import annotations

import pickle
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from typing import Any


def read_reply(reply: bytes) -> Any:
    """Return the value of a call, or raise what it raised.

    :param reply: of :func:`~ppl_diffusion.potentials.child.read_call`.
    :raises BrokenExecutor: if the worker could not read the function.
    """
    kind, *content = pickle.loads(reply)
    if kind == "value":
        return content[0]
    if kind == "unread":
        raise BrokenExecutor(f"a worker could not read it: {content[0]}")
    raise _rebuilt(*content)


def _rebuilt(name: str, words: str, pickled: bytes | None) -> Exception:
    """Return an exception of another process, or one that looks like it."""
    if pickled is not None:
        with suppress(Exception):
            error = pickle.loads(pickled)
            if isinstance(error, Exception):
                return error
    kind: type[Exception] = type(name, (RuntimeError,), {})
    return kind(words)
