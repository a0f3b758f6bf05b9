"""Seconds that calls take, and how busy they keep those who make them."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds that calls took.

    :param busy: of work, summed over workers; calls that raised or were given up are left out.
    :param under_way: during which at least one call was queued or running.
    :param waited: during which nobody did anything else than wait for them.
    """

    busy: float = 0.0
    under_way: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Times) -> Times:
        return Times(
            self.busy + other.busy,
            self.under_way + other.under_way,
            self.waited + other.waited,
        )

    def since(self, before: Times) -> Times:
        """Return what was added.

        :param before: an earlier state.
        """
        return Times(
            self.busy - before.busy,
            self.under_way - before.under_way,
            self.waited - before.waited,
        )

    def told(self, num_workers: int | None) -> dict[str, Any]:
        """Return them in JSON types, with the shares that matter.

        ``utilisation`` is the share of the workers' time under way in which they worked, and
        ``overlap`` that in which the sampler had something else to do; None where nothing is known.

        :param num_workers: calls that run at once.
        """
        shares = {"utilisation": None, "overlap": None}
        if self.under_way > 0:
            workers = num_workers or float("nan")
            shares["utilisation"] = _share(self.busy / (workers * self.under_way))
            shares["overlap"] = _share(1 - self.waited / self.under_way)
        return {"seconds": self.busy, "under_way": self.under_way, **shares}


def _share(value: float) -> Any:
    # Clocks of two processes do not tick alike.
    return min(max(value, 0.0), 1.0) if value == value else None


@dataclass
class Clock:
    """Measures :class:`Times`, from whichever thread a call ends in."""

    times: Times = Times()
    _open: set[Hashable] = field(default_factory=set)
    _since: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def started(self, call: Hashable) -> None:
        """Note that a call is queued.

        :param call: the call.
        """
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open.add(call)

    def ended(self, call: Hashable) -> None:
        """Note that it is over, once or more often.

        :param call: the call.
        """
        with self._lock:
            if call not in self._open:  # known already
                return
            self._open.remove(call)
            if not self._open:
                self._add(under_way=time.perf_counter() - self._since)

    def worked(self, seconds: float) -> None:
        """Note work.

        :param seconds: of a worker.
        """
        with self._lock:
            self._add(busy=seconds)

    def waited(self, seconds: float) -> None:
        """Note that nobody did anything else.

        :param seconds: of the sampler.
        """
        with self._lock:
            self._add(waited=seconds)

    def _add(self, **seconds: float) -> None:
        before = asdict(self.times)
        self.times = replace(self.times, **{n: before[n] + x for n, x in seconds.items()})
