"""Functions and arguments on their way to another process."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from types import ModuleType
from typing import Any, NamedTuple

from ppl_diffusion.errors import PotentialError

KEPT = 8
"""Functions whose pickles are kept: one is made of a network, and called a thousand times."""


class Parcel(NamedTuple):
    """A pickled function.

    :ivar digest: by which a worker remembers it.
    :ivar pickled: the pickle.
    """

    digest: bytes
    pickled: bytes


class Parcels:
    """Functions in pickled form, the last few kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Any, Parcel]] = OrderedDict()

    def of(self, fn: Callable[..., Any]) -> Parcel:
        """Return a function's pickle, made when it is first asked for.

        :raises PotentialError: if it cannot be pickled.
        """
        if id(fn) not in self._kept:
            pickled = self.packed(fn, fn)
            # The function is kept: an identity means nothing once its owner is gone.
            self._kept[id(fn)] = fn, Parcel(blake2b(pickled, digest_size=16).digest(), pickled)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(id(fn))
        return self._kept[id(fn)][1]

    def packed(self, content: Any, fn: Callable[..., Any]) -> bytes:
        """Return the pickle of anything.

        :param content: what is pickled.
        :param fn: the function it belongs to, which errors name.
        :raises PotentialError: if it cannot be pickled.
        """
        library = _cloudpickle()
        inner = _inner(fn)
        try:
            if library is not None:
                pickled: bytes = library.dumps(content)
                return pickled
            if getattr(inner, "__module__", None) == "__main__":
                raise pickle.PicklingError("it is defined in __main__")
            return pickle.dumps(content)
        except Exception as error:
            raise PotentialError(_unsendable(inner, error, library)) from error


def _inner(fn: Callable[..., Any]) -> Any:
    """Return the user's function, which stands inside partial ones."""
    while isinstance(fn, partial):
        fn = fn.args[0] if fn.args and callable(fn.args[0]) else fn.func
    return fn


def _unsendable(fn: Any, error: Exception, library: ModuleType | None) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    what = "define it in a module" if library else "define it in a module, or install cloudpickle"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"{name} cannot be sent to another process ({reason}); {what}, and let it open files, "
        "models and connections when it is called."
    )


def _cloudpickle() -> ModuleType | None:
    try:
        import cloudpickle
    except ModuleNotFoundError:
        return None
    found: ModuleType = cloudpickle
    return found
