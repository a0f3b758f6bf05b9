"""How far a command has come: a bar on terminals, lines in logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
SECONDS = 30.0
"""Seconds after which a log gets another line, at most."""
TENTHS = 10
"""Parts of the way, each of which is worth a line."""


@contextmanager
def progress_bar(label: str, *, quiet: bool) -> Iterator[Advance]:
    """Show how far something has come, on standard error.

    A bar where that is a terminal, and otherwise a line every 30 seconds or tenth of the way,
    whichever comes first, though no more than one a second.

    :returns: ``advance(step, total)``, which says that ``step`` of ``total`` are done.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda *_: None
    elif console.is_terminal:
        yield from _bar(label, console)
    else:
        yield LogLines(label).advance


@contextmanager
def told_in_logs(label: str, *, quiet: bool) -> Iterator[Advance | None]:
    """Give what writes lines into a log, None on a terminal: for what has a bar of its own."""
    if quiet or Console(stderr=True).is_terminal:
        yield None
    else:
        yield LogLines(label).advance


def _bar(label: str, console: Console) -> Iterator[Advance]:
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*shown, TimeRemainingColumn(), console=console)
    task = bar.add_task(label, total=None)

    def advance(step: int, total: int, *_: Any) -> None:
        bar.start()  # at the first step: what is refused before has no bar, but one sentence
        bar.update(task, completed=step, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


class LogLines:
    """Lines about the way that is done, with the time that is left if it goes on like that.

    :param label: what goes on.
    :param clock: seconds.
    """

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.clock = label, clock
        self.started = self.said_at = clock()
        self.first: int | None = None
        self.tenths = 0

    def advance(self, step: int, total: int, *_: Any) -> None:
        """Write a line where one is due.

        :param step: steps done.
        :param total: steps in all.
        """
        if self.first is None:
            self.first = step - 1  # a resumed run does not begin at its beginning
        now, tenths = self.clock(), step * TENTHS // max(total, 1)
        passed = tenths > self.tenths and (now - self.said_at >= 1 or step >= total)
        if not (passed or now - self.said_at >= SECONDS):
            return
        self.tenths, self.said_at = tenths, now
        left = (now - self.started) / max(step - self.first, 1) * (total - step)
        print(f"{self.label}: {step} of {total}, {clock_time(left)} left", file=sys.stderr)


def clock_time(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: ``1:02:03``, or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
