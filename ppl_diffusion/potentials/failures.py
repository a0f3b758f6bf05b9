"""Which functions of sequences failed during a run, whoever asked them.

A reward may stand deep inside a program, and be made anew whenever that runs. So functions report
to whoever watches, and nobody has to find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Failures:
    """Distinct sequences that functions were asked about, and those they failed on, by name."""

    def __init__(self) -> None:
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

    def settings(self) -> dict[str, Any]:
        """Return the entry of a result's settings; empty where nothing failed."""
        told = self.told()
        return {"failures": told} if told else {}


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


def report(name: str, values: Mapping[bytes, float], first: str | None) -> None:
    """Tell whoever watches what a function answered; see :meth:`Failures.note`."""
    failures = _WATCHED.get()
    if failures is not None:
        failures.note(name, values, first)
