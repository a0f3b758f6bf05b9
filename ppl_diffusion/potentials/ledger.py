"""What calls of functions cost while somebody watches, by the name of the function."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ppl_diffusion.potentials.budget import Budget
from ppl_diffusion.potentials.calls import (
    ASKED,
    FROM_DISK,
    FROM_MEMORY,
    GUESSED,
    KILLED,
    RETRIED,
    Calls,
)
from ppl_diffusion.potentials.times import Clock, Times

_MANY = 256
"""Accounts after which those of functions that are gone are added up: programs make functions."""


@dataclass(frozen=True)
class _Sum:
    """What calls cost."""

    num_workers: int | None
    budget: Budget
    counts: Counter[str]
    times: Times

    def plus(self, other: _Sum) -> _Sum:
        counts = Counter(self.counts)
        counts.update(other.counts)  # unlike a sum it keeps what is not positive
        return _Sum(self.num_workers, self.budget, counts, self.times + other.times)

    def told(self, causes: Mapping[str, int]) -> dict[str, Any]:
        counts = self.counts
        return {
            "asked": counts[ASKED],
            "cached": counts[FROM_MEMORY] + counts[FROM_DISK],
            **{name: counts[name] for name in (FROM_MEMORY, FROM_DISK, RETRIED, KILLED)},
            "failed": sum(causes.values()),
            "failed_by_cause": dict(causes),
            **self.times.told(self.num_workers),
            **self.budget.told(counts[GUESSED]),
        }


@dataclass(frozen=True)
class _Account:
    """Counters, and where they stood when somebody began to watch; not the calls themselves."""

    name: str
    calls: weakref.ref[Calls]
    num_workers: int | None
    budget: Budget
    counts: Counter[str]
    clock: Clock
    counts_before: Counter[str]
    times_before: Times

    @classmethod
    def of(cls, name: str, calls: Calls) -> _Account:
        counts, clock = calls.counts, calls.clock
        owner = weakref.ref(calls)
        before = Counter(counts), clock.times
        return cls(name, owner, calls.num_workers, calls.budget, counts, clock, *before)

    def sum(self) -> _Sum:
        counts = Counter(self.counts)
        counts.subtract(self.counts_before)
        times = self.clock.times.since(self.times_before)
        return _Sum(self.num_workers, self.budget, counts, times)


class Ledger:
    """Accounts of calls."""

    def __init__(self) -> None:
        # By counters, which are held: the number of an object means nothing once it is gone.
        self._accounts: dict[int, _Account] = {}
        self._closed: dict[str, _Sum] = {}

    def open(self, calls: Calls, name: Callable[[], str]) -> bool:
        """Count what calls cost from here on, and return whether that is new.

        :param calls: the calls.
        :param name: gives the name of their function.
        """
        if id(calls.counts) in self._accounts:
            return False
        if len(self._accounts) >= _MANY:
            self._close()
        self._accounts[id(calls.counts)] = _Account.of(name(), calls)
        return True

    def told(self, causes: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
        """Return the entries in JSON types, by name.

        :param causes: of failures, by name.
        """
        sums = dict(self._closed)
        for account in self._accounts.values():
            _add(sums, account)
        return {name: one.told(causes.get(name, {})) for name, one in sums.items()}

    def _close(self) -> None:
        gone: Iterable[int] = [k for k, one in self._accounts.items() if one.calls() is None]
        for key in gone:
            _add(self._closed, self._accounts.pop(key))


def _add(sums: dict[str, _Sum], account: _Account) -> None:
    found = account.sum()
    sums[account.name] = sums[account.name].plus(found) if account.name in sums else found
