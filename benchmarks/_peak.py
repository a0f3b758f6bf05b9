"""How much a piece of work adds to the size of this process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESOLUTION = 1e-3
"""In GB: less than the system resolves."""


class Peak:
    """What is added to the size of this process, from here to :meth:`stop`.

    Where the system tells only the largest size there ever was, work that stays below an earlier
    peak adds nothing: take a fresh process.

    :ivar gigabytes: GB (1e9 bytes) that the first stretch added, known once it was stopped.
    """

    def __init__(self) -> None:
        if FORGET.exists():
            FORGET.write_text("5")  # the peak of this process is its size now
        self.before = _status("VmRSS") if STATUS.exists() else _largest()
        self.gigabytes = 0.0

    def stop(self) -> None:
        """End the stretch; later calls change nothing."""
        if not self.gigabytes:
            after = _status("VmHWM") if STATUS.exists() else _largest()
            self.gigabytes = max(after - self.before, RESOLUTION)


def _status(name: str) -> float:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e9


def _largest() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
