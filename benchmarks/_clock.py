"""Exclusive times by part: every moment belongs to one part, so that the parts add up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

Part = tuple[str, str]
"""A phase of the work, and what is done in it."""


class Clock:
    """A clock that is always running for exactly one part.

    Only the thread that made it is followed: what others do meanwhile counts, in process time, for
    the part of that thread.

    :param phase: what runs first.
    :param now: the time, in seconds.

    :ivar seconds: time of each part so far, exclusive of those inside it.
    """

    def __init__(self, phase: str, now: Callable[[], float] = time.process_time) -> None:
        self._now, self._thread = now, threading.get_ident()
        self._stack: list[Part] = [(phase, "")]
        self._since = now()
        self.seconds: Counter[Part] = Counter()  # type: ignore[assignment]

    @property
    def part(self) -> Part:
        """What the clock runs for."""
        return self._stack[-1]

    @property
    def total(self) -> float:
        """Time of all parts."""
        return sum(self.seconds.values())

    def stop(self) -> None:
        """Write down the time so far."""
        now = self._now()
        self.seconds[self.part] += now - self._since  # type: ignore[assignment]
        self._since = now

    @contextmanager
    def running(self, phase: str | None, work: str) -> Iterator[None]:
        """Run for another part inside.

        :param phase: its phase; None stays in the one that is running.
        :param work: what is done.
        """
        self.stop()
        self._stack.append((self.part[0] if phase is None else phase, work))
        try:
            yield
        finally:
            self.stop()
            self._stack.pop()

    def timed(
        self,
        function: Callable[..., Any],
        phase: str | None,
        work: str,
        only_in: str | None = None,
    ) -> Callable[..., Any]:
        """Return a function during which the clock runs for a part.

        :param phase: the part's phase; None stays in the one that is running.
        :param work: what is done.
        :param only_in: work during which alone the part is told apart.
        """

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            elsewhere = threading.get_ident() != self._thread
            if elsewhere or only_in not in (None, self.part[1]):
                return function(*args, **kwargs)
            with self.running(phase, work):
                return function(*args, **kwargs)

        return call


@contextmanager
def replaced(owner: Any, name: str, changed: Callable[[Any], Any]) -> Iterator[None]:
    """Put something else in the place of an attribute, inside.

    :param owner: a module or a class that holds it.
    :param name: the attribute.
    :param changed: makes what takes its place.
    """
    own = vars(owner)[name]
    setattr(owner, name, changed(own))
    try:
        yield
    finally:
        setattr(owner, name, own)
