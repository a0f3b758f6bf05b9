"""Feynman-Kac steering: score unfinished sequences now and then, and let the good ones multiply.

Singhal, Horvitz et al. (2025, arXiv:2501.06848). Particles move by the chain itself. At scored
steps a completion of each state is rated, ``r_k = log G(completion)`` (log-mean-exp over several),
and the population is weighted by a potential ``G_k``::

    difference   log G_k = r_k - r_(k-1)            max   log G_k = max of r so far
    add          log G_k = r_k                      sum   log G_k = sum of r so far

and closed at ``x0`` by ``G(x0) / prod G_k``, so that all four have the target ``p(path) G(x0)``.
They differ in where they send particles: only the difference is a twist, the others pay for their
greed with one large correction at the end. Weights accumulate over steps at which nothing is
resampled; ``-inf`` means never. The published programs close ``max`` and ``sum`` by the running
maximum and the running sum instead, which is another law: ``closing="published"`` shows it, and
its result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.inference.bootstrap import LookingAhead
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method, register
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.twists import FillTwist, PersistentFill, TwistLike

Kind = Literal["difference", "max", "sum", "add"]
Closing = Literal["exact", "published"]

CHECKED_LOOKS, CHECKED_FILLS = 4, 4
"""Looks of strided steering, and completions, that ``check`` tries."""

RUNNING, LOG_H = "steering/running", "steering/log_h"


@register
@dataclass(frozen=True)
class FKSteering(LookingAhead):
    """Move by the chain, weigh by what completions score: their difference, max, sum or each.

    :param twist: how states are scored, as in :class:`LookingAhead`; by default ``"defensive"``,
        with the published closing ``"argmax"``.
    :param proposal: how particles move, as there.
    :param kind: how scores become weights: ``"difference"``, ``"max"``, ``"sum"`` or ``"add"``.
    :param closing: ``"exact"``, or ``"published"``: ``max`` and ``sum`` end with the running value
        in place of ``log G(x0)``, and the result says ``exact=False``.
    :param every: score at every so many steps.
    :param interval: first and last step that may be scored, in steps taken, both included; all
        between the ends by default. The steps scored are ``first, first + every, ...``.
    :param cache: ask the potential once per distinct sequence; changes the cost and nothing else.
    :raises ValueError: if a name or a number is not usable.

    Example::

        method = FKSteering(every=20, interval=(20, 80))
        posterior = SMC(chain, Reward(dock, temperature=0.1), method=method).run(seed=0)
    """

    twist: TwistLike = "auto"
    kind: Kind = "difference"
    closing: Closing = "exact"
    every: int = 1
    interval: tuple[int, int] | None = None
    cache: bool = True

    name: ClassVar[str] = "steering"
    replays: ClassVar[bool] = True
    looks_late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.twist == "auto":
            object.__setattr__(self, "twist", "argmax" if self.published else "defensive")
        super().__post_init__()
        _check_choice("kind", self.kind, tuple(RULES))
        _check_choice("closing", self.closing, ("exact", "published"))
        _check_schedule(self.every, self.interval)
        if self.published and isinstance(self.twist, FillTwist) and self.twist.floor:
            raise ValueError(
                "FKSteering: closing='published' weighs by the completions themselves, not by a "
                f"floor under them; use {self.twist.name!r} with floor=0, or another twist."
            )
        if self.twist is None:
            raise ValueError(
                "FKSteering: twist=None scores nothing; use ImportanceSampling, or a twist."
            )

    @classmethod
    def variants(cls, source: Source) -> dict[str, Method]:
        """Return what else ``check`` tries: few looks, and other completions."""
        steps = max(site.chain.num_steps for site in source.chains)
        every = max(1, steps // (CHECKED_LOOKS + 1))
        strided = {"strided": cls(every=every, interval=(every, steps))} if every > 1 else {}
        found = {**strided, "persistent": cls(twist=PersistentFill(CHECKED_FILLS))}
        return {f"{cls.name}-{name}": method for name, method in found.items()}

    @property
    def published(self) -> bool:
        """Whether the closing is another law."""
        return self.closing == "published" and self.kind in ("max", "sum")

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal: where it does not matter what is scored.

        The law of the published closing is that of scores at steps of the grid.
        """
        return self.every == 1 and self.interval is None and not self.published

    def prepare(self, run: Bound, resampler: Any, ess_threshold: float) -> None:
        """Find out which steps are scored."""
        super().prepare(run, resampler, ess_threshold)
        run.notes["scored"] = self.scored_steps(self.num_steps(run))

    def scored_steps(self, num_steps: int) -> list[int]:
        """Return after which steps a chain is scored.

        :raises ValueError: if the interval holds none of them.
        """
        return _scored_steps(num_steps, self.every, self.interval)

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """Nothing is scored yet."""
        zeros = run.zeros
        # Before the first score a maximum is -inf: starting it at 0 would ignore negative scores.
        start = torch.full_like(zeros, -torch.inf) if self.kind == "max" else zeros
        return {**state, RUNNING: start, LOG_H: zeros}

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move, then score the new state where it is due."""
        moved, log_ratio = super().move(run, state, group, generator)
        if self.is_due(run, group + 1):
            score = self.rate(run, moved, generator)
            running, log_h = RULES[self.kind](moved[RUNNING], moved[LOG_H], score)
            moved = {**moved, RUNNING: running, LOG_H: log_h}
        return moved, log_ratio

    def is_due(self, run: Bound, group: int) -> bool:
        """Return whether states are scored after so many groups."""
        return group in run.notes["scored"]

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the log of the product of potentials so far."""
        log_h: Tensor = state[LOG_H]
        return log_h

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead of a difference; other kinds keep scores of latents of the past."""
        fresh = self.kind == "difference" and group in run.notes["scored"]
        return super().ahead(run, state, group) if fresh else None

    def renewed(self, state: State, log_h: Tensor) -> State:
        """Return states with another score."""
        return {**state, RUNNING: log_h, LOG_H: log_h}

    def pay(self, run: Bound, state: State) -> Tensor:
        """Close by ``log G(x0)``, or as published."""
        log_g: Tensor = state["log_g"]
        if not self.published:
            return log_g
        running: Tensor = state[RUNNING]
        return torch.maximum(running, log_g) if self.kind == "max" else running + log_g

    def law(self, run: Bound) -> Law:
        """Return the tilted chain, or what the published closing weighs by."""
        law = run.source.law
        if not self.published:
            return law
        value = {"max": "largest", "sum": "sum"}[self.kind]
        factor = f"exp(the {value} of log G over the scored completions and x0)"
        tilts = tuple(replace(tilt, factor=factor) for tilt in law.tilts)
        why = "the published closing, which is not p(path) * G(x0)"
        return law.but(tilts=tilts, exact=False, why=why)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types."""
        return {**super().settings(run), "scored_steps": run.notes["scored"]}


Rule = Callable[[Array, Array, Array], tuple[Array, Array]]


def _difference(running: Array, log_h: Array, score: Array) -> tuple[Array, Array]:
    return score, score


def _max(running: Array, log_h: Array, score: Array) -> tuple[Array, Array]:
    best = array_namespace(running).maximum(running, score)
    return best, log_h + best


def _sum(running: Array, log_h: Array, score: Array) -> tuple[Array, Array]:
    total = running + score
    return total, log_h + total


def _add(running: Array, log_h: Array, score: Array) -> tuple[Array, Array]:
    return score, log_h + score


RULES: dict[str, Rule] = {"difference": _difference, "max": _max, "sum": _sum, "add": _add}
"""``(running value, log prod G_j, score) -> (running value, log prod G_j)``, each ``(R, N)``, by
kind."""


def _scored_steps(num_steps: int, every: int, interval: tuple[int, int] | None) -> list[int]:
    first, last = interval or (1, num_steps)
    found = list(range(first, min(last, num_steps - 1) + 1, every))
    if interval is not None and not found:
        raise ValueError(
            f"FKSteering: interval={interval} holds no state between the ends of a "
            f"{num_steps}-step chain; give steps within 1..{num_steps - 1}."
        )
    return found


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"FKSteering: unknown {what}={value!r}; choose one of {', '.join(choices)}."
        )


def _check_schedule(every: int, interval: tuple[int, int] | None) -> None:
    if every < 1:
        raise ValueError(f"FKSteering: every must be >= 1, got {every}.")
    if interval is not None and not 1 <= interval[0] <= interval[1]:
        raise ValueError(
            f"FKSteering: interval must be (first, last) with 1 <= first <= last, got {interval}."
        )
