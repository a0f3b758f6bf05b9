"""What a dry run may spend, and what it can recommend."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from ppl_diffusion.inference._check_candidates import Build
from ppl_diffusion.inference._check_meters import Cost

LARGEST_SHARE = 0.25
"""Share of the budget that pilots may take where less would teach nothing."""

CostOf = Callable[[float], Cost]

PATIENCE = 120.0
"""Seconds that pilots may take in all, whatever the budget is."""


@dataclass(frozen=True)
class Budget:
    """What may be spent.

    :param limit: on pilots and run together, ``inf`` where there is none.
    :param share: the pilots' share of it.
    """

    limit: Cost
    share: float

    @classmethod
    def of(cls, rows: int | None, calls: int | None, seconds: float | None, share: float) -> Budget:
        """Return a budget after checking it.

        :param rows: network rows, None for any number.
        :param calls: potential calls.
        :param seconds: wall time.
        :param share: the pilots' share.
        :raises ValueError: if a number is not positive, or none is given.
        """
        given = {"num_evaluations": rows, "num_potential_calls": calls, "seconds": seconds}
        if all(value is None for value in given.values()):
            raise ValueError(
                "check: nothing limits the run; give num_evaluations, num_potential_calls or "
                "seconds."
            )
        for name, value in given.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"check: {name} must be positive and finite, got {value}.")
        if not 0 < share <= 0.5:
            raise ValueError(f"check: pilot_share must lie in (0, 0.5], got {share}.")
        return cls(Cost(*(math.inf if v is None else float(v) for v in given.values())), share)

    @property
    def allowance(self) -> Cost:
        """What the pilots may spend."""
        return self._part(self.share)

    @property
    def most(self) -> Cost:
        """What pilots may spend where less would teach nothing."""
        return self._part(max(self.share, LARGEST_SHARE))

    def _part(self, share: float) -> Cost:
        own = self.limit.times(share)
        return Cost(own.rows, own.calls, min(own.seconds, PATIENCE))


@dataclass(frozen=True)
class Plan:
    """A size that a budget affords, and what it is predicted to cost.

    :param num_particles: particles per run.
    :param num_runs: runs.
    :param cost: predicted cost.
    """

    num_particles: int
    num_runs: int
    cost: Cost

    @property
    def size(self) -> int:
        """Particles of all runs."""
        return self.num_particles * self.num_runs


@dataclass(frozen=True)
class Verdict:
    """What is recommended.

    :param name: the program.
    :param build: its builder.
    :param plan: its size and predicted cost.
    :param reason: why, in a sentence.
    """

    name: str
    build: Build
    plan: Plan
    reason: str


def largest(affordable: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that is affordable, 0 if none is.

    :param affordable: a predicate that holds up to some number and not beyond.
    :param most: the largest number tried.
    """
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: not affordable(n))
