"""Who moves at each step of the engine: a schedule over the chain sites of a program.

Chains that read only their own state and *finished* values have one law under every admissible
schedule: own steps in order, and everything a chain depends on finished before its first step. The
order is a choice of variance and cost, never of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Item(NamedTuple):
    """One move of one site.

    :param site: name of the chain site.
    :param k: its own step.
    """

    site: str
    k: int


Group = tuple[Item, ...]
"""Moves made before particles are weighed again."""

Plan = Callable[[Mapping[str, int], "torch.Generator | None"], list[Group]]


def lockstep(steps: Mapping[str, int], generator: torch.Generator | None = None) -> list[Group]:
    """Return groups in which all sites move on, each on its own grid."""
    # A chain of n steps moves where n t / T passes a whole number: spread evenly, all end at T.
    total = max(steps.values())
    return [
        tuple(
            Item(site, n * t // total)
            for site, n in steps.items()
            if n * (t + 1) // total > n * t // total
        )
        for t in range(total)
    ]


def sequential(steps: Mapping[str, int], generator: torch.Generator | None = None) -> list[Group]:
    """Return groups of one move: one site after the other."""
    return [(Item(site, k),) for site, n in steps.items() for k in range(n)]


def interleaved(steps: Mapping[str, int], generator: torch.Generator | None = None) -> list[Group]:
    """Return groups of one move, in one random order for all particles."""
    # One order for all: counts that differ between particles would only add noise to the weights.
    bag = [site for site, n in steps.items() for _ in range(n)]
    done = dict.fromkeys(steps, -1)
    groups: list[Group] = []
    for index in torch.randperm(len(bag), generator=generator, device="cpu").tolist():
        done[bag[index]] += 1
        groups.append((Item(bag[index], done[bag[index]]),))
    return groups


PLANS: dict[str, Plan] = {
    "lockstep": lockstep,
    "sequential": sequential,
    "interleaved": interleaved,
}
"""The schedules by name."""


def as_plan(schedule: str | Plan) -> Plan:
    """Return a schedule from its name.

    :param schedule: a name from :data:`PLANS`, or a function of the steps of the sites.
    :raises ValueError: if the name is unknown.
    """
    if callable(schedule):
        return schedule
    if schedule not in PLANS:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(PLANS)}.")
    return PLANS[schedule]


def stages(above: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the sites in stages, each of which depends on earlier stages only."""
    level: dict[str, int] = {}
    for site, parents in above.items():  # program order is an order of ancestry
        level[site] = 1 + max((level[parent] for parent in parents), default=-1)
    return [[s for s in above if level[s] == n] for n in range(max(level.values()) + 1)]


def groups_of(
    plan: Plan,
    staged: Sequence[Sequence[str]],
    steps: Mapping[str, int],
    generator: torch.Generator | None = None,
) -> list[Group]:
    """Return all groups of a run, stage after stage."""
    groups: list[Group] = []
    for sites in staged:
        own = plan({site: steps[site] for site in sites}, generator)
        _require_admissible(own, {site: steps[site] for site in sites})
        groups += own
    return groups


def _require_admissible(groups: list[Group], steps: Mapping[str, int]) -> None:
    made: dict[str, list[int]] = {site: [] for site in steps}
    for item in (item for group in groups for item in group):
        made.setdefault(item.site, []).append(item.k)
    wanted = {site: list(range(n)) for site, n in steps.items()}
    # Paths are recorded after every group: a second move of a site would hide the first.
    once = all(len({item.site for item in group}) == len(group) > 0 for group in groups)
    if made != wanted or not once:
        raise ValueError(
            "schedule: every step of every chain must be made once, in its own order, at most one "
            "of each in a group, and a chain may start only when all it depends on is finished; "
            f"got {made} for {dict(steps)}."
        )
