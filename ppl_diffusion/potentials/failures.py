"""Which functions of sequences failed during a run, and how busy their workers were.

A reward may stand deep inside a program, and be made anew whenever that runs. So functions report
to whoever watches, and nobody has to find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from ppl_diffusion.potentials.calls import Calls
from ppl_diffusion.potentials.workers import CallsBeside, Times

REWARDS = "rewards"
"""The settings that hold seconds, and differ between runs of one seed."""


class _Watched(NamedTuple):
    """Calls in an executor, and where they stood when somebody began to watch."""

    name: str
    calls: CallsBeside
    num_rows: int
    num_known: int
    times: Times


class Failures:
    """Distinct sequences that functions were asked about, and those they failed on, by name."""

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}
        self._known: dict[str, dict[int, bool]] = {}
        self._first: dict[str, str] = {}

    def note(self, name: str, values: Mapping[bytes, float], first: str | None) -> None:
        """Note what a function answered.

        :param name: of the function.
        :param values: by sequence; NaN where it failed.
        :param first: what went wrong first, in words.
        """
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
        begun = _Watched(name, calls, calls.num_rows, calls.num_known, calls.times)
        self._watched.setdefault(id(calls), begun)

    def work(self) -> dict[str, dict[str, Any]]:
        """Return what calls in executors cost, in JSON types, by name.

        ``asked`` sequences were handed to the function, ``cached`` ones were known to it, and
        ``failed``; ``seconds`` of work, ``under_way``, ``utilisation`` and ``overlap`` as in
        :class:`~ppl_diffusion.potentials.workers.Times`.
        """
        found = {}
        for name, calls, num_rows, num_known, times in self._watched.values():
            failed = sum(self._known.get(name, {}).values())
            counts = {"asked": calls.num_rows - num_rows, "cached": calls.num_known - num_known}
            shares = calls.times.since(times).told(calls.num_workers)
            found[name] = {**counts, "failed": failed, **shares}
        return found

    def cancel(self) -> None:
        """Cancel calls that were begun and that nobody is going to collect."""
        for watched in self._watched.values():
            watched.calls.cancel()

    def settings(self) -> dict[str, Any]:
        """Return entries of a result's settings; empty where nothing failed or ran in workers."""
        told, work = self.told(), self.work()
        return {**({"failures": told} if told else {}), **({REWARDS: work} if work else {})}


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


def report(name: str, values: Mapping[bytes, float], first: str | None) -> None:
    """Tell whoever watches what a function answered; see :meth:`Failures.note`."""
    failures = _WATCHED.get()
    if failures is not None:
        failures.note(name, values, first)


def watch_calls(name: str, calls: Calls) -> None:
    """Tell whoever watches that a function is going to be asked; see :meth:`Failures.watch`."""
    failures = _WATCHED.get()
    if failures is not None and isinstance(calls, CallsBeside):
        failures.watch(name, calls)
