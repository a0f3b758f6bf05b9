"""Which functions of sequences failed during a run, and how busy their workers were.

A reward may stand deep inside a program, and be made anew whenever that runs. So functions report
to whoever watches, and nobody has to find them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from ppl_diffusion.potentials.calls import Calls, RowFunction
from ppl_diffusion.potentials.workers import CallsBeside, Times

REWARDS = "rewards"
"""The settings that hold seconds, and differ between runs of one seed."""

MOST = 8
"""Functions of one name that are told apart: a program may make another whenever it runs."""


class _Watched(NamedTuple):
    """Calls in an executor, and where they stood when somebody began to watch."""

    name: str
    calls: CallsBeside
    num_rows: int
    num_known: int
    times: Times


class Failures:
    """Distinct sequences that functions were asked about, and those they failed on, by name.

    The second of two functions that bear one name is called ``"name 2"``.
    """

    def __init__(self) -> None:
        self._functions: dict[str, dict[Hashable, tuple[str, RowFunction]]] = {}
        self._watched: dict[int, _Watched] = {}
        self._known: dict[str, dict[int, bool]] = {}
        self._first: dict[str, str] = {}

    def note(
        self, name: str, fn: RowFunction, values: Mapping[bytes, float], first: str | None
    ) -> None:
        """Note what a function answered.

        :param name: of the function.
        :param fn: the function.
        :param values: by sequence; NaN where it failed.
        :param first: what went wrong first, in words.
        """
        name = self._told_apart(name, fn)
        known = self._known.setdefault(name, {})
        known.update((hash(key), value != value) for key, value in values.items())
        if first is not None:
            self._first.setdefault(name, first)

    def told(self) -> dict[str, dict[str, Any]]:
        """Return what failed, in JSON types: ``asked``, ``failed`` and ``first`` by name."""
        counts = {name: (len(known), sum(known.values())) for name, known in self._known.items()}
        return {
            name: {"asked": asked, "failed": failed, "first": self._first.get(name, "not known")}
            for name, (asked, failed) in counts.items()
            if failed
        }

    def watch(self, name: str, calls: CallsBeside) -> None:
        """Count what calls in an executor cost from here on.

        :param name: of the function.
        :param calls: its calls.
        """
        if id(calls) not in self._watched:
            name = self._told_apart(name, calls.fn)
            begun = _Watched(name, calls, calls.num_rows, calls.num_known, calls.times)
            self._watched[id(calls)] = begun

    def work(self) -> dict[str, dict[str, Any]]:
        """Return what calls in executors cost, in JSON types, by name.

        ``asked`` sequences were handed to the function, ``cached`` ones were known to it, and
        ``failed``; ``seconds`` of work, ``under_way``, ``utilisation`` and ``overlap`` as in
        :class:`~ppl_diffusion.potentials.workers.Times`.
        """
        by_name: dict[str, list[_Watched]] = {}
        for watched in self._watched.values():
            by_name.setdefault(watched.name, []).append(watched)
        found = {}
        for name, same in by_name.items():
            counts = {
                "asked": sum(one.calls.num_rows - one.num_rows for one in same),
                "cached": sum(one.calls.num_known - one.num_known for one in same),
                "failed": sum(self._known.get(name, {}).values()),
            }
            times = sum((one.calls.times.since(one.times) for one in same), Times())
            found[name] = {**counts, **times.told(same[0].calls.num_workers)}
        return found

    def _told_apart(self, name: str, fn: RowFunction) -> str:
        same = self._functions.setdefault(name, {})
        key = _identity(fn)
        if key not in same:
            number = len(same) + 1
            if number > MOST:
                return f"{name} {MOST}"
            # It is kept: an identity means nothing once its owner is gone.
            same[key] = (name if number == 1 else f"{name} {number}", fn)
        return same[key][0]

    def cancel(self) -> None:
        """Cancel calls that were begun and that nobody is going to collect."""
        for watched in self._watched.values():
            watched.calls.cancel()

    def settings(self) -> dict[str, Any]:
        """Return entries of a result's settings; empty where nothing failed or ran in workers."""
        told, work = self.told(), self.work()
        return {**({"failures": told} if told else {}), **({REWARDS: work} if work else {})}


def _identity(fn: RowFunction) -> Hashable:
    """Return what tells functions apart: one made anew of the same parts is the same."""
    if isinstance(fn, MethodType):
        return fn.__func__, id(fn.__self__)
    if not isinstance(fn, FunctionType):
        return id(fn)
    parts = [*(fn.__defaults__ or ()), *(cell.cell_contents for cell in fn.__closure__ or ())]
    return fn.__code__, *map(id, parts)


_WATCHED: ContextVar[Failures | None] = ContextVar("watched", default=None)


@contextmanager
def watch_failures() -> Iterator[Failures]:
    """Collect what functions of sequences answer inside, in this thread."""
    failures = Failures()
    token = _WATCHED.set(failures)
    try:
        yield failures
    finally:
        _WATCHED.reset(token)
        # A run that failed half-way would otherwise leave a queue for the interpreter to wait for.
        failures.cancel()


def report(name: str, fn: RowFunction, values: Mapping[bytes, float], first: str | None) -> None:
    """Tell whoever watches what a function answered; see :meth:`Failures.note`."""
    failures = _WATCHED.get()
    if failures is not None:
        failures.note(name, fn, values, first)


def watch_calls(name: str, calls: Calls) -> None:
    """Tell whoever watches that a function is going to be asked; see :meth:`Failures.watch`."""
    failures = _WATCHED.get()
    if failures is not None and isinstance(calls, CallsBeside):
        failures.watch(name, calls)
