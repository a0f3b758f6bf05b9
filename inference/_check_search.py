"""Spending the pilots' share of a budget, and choosing by what they showed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.inference._check_candidates import (
    BEST_OF_N,
    PLAIN,
    Build,
    Candidate,
    Question,
)
from ppl_diffusion.inference._check_meters import Cost
from ppl_diffusion.inference._check_pilots import Pilot, Record, evidence_error

CostOf = Callable[[float], Cost]

FEW = 4
"""With fewer trajectories than this, weights mean nothing."""

ENOUGH = 0.5
"""ESS of importance sampling, as a fraction of its draws, above which nothing else is needed."""

SLACK = 1.25
"""A simpler program may have this many times the error of the best one."""

LEAST_PARTICLES = 8
"""Particles that a run of several has at least."""

RUNS = 4
"""Runs of a pilot."""

FIRST_SHARE = 0.25
"""Share of the budget that the first two pilots may take together."""

GOOD = 0.5
"""Error of the log-evidence, in nats, that will do."""

WORTH_STEERING = 16
"""Particles from which on a program that was not tried is trusted by rule."""

PATIENCE = 120.0
"""Seconds that pilots may take in all, whatever the budget is."""

UNAFFORDABLE = "no pilot: too dear"


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
        """What the first two pilots may spend."""
        return self._part(max(self.share, FIRST_SHARE))

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


@dataclass
class Search:
    """One dry run.

    :param question: target and candidates.
    :param budget: the budget.
    :param num_runs: runs of the recommended program.
    :param pilot_particles: particles per run of the first pilots.
    :param max_particles: largest number of particles recommended.
    :param seed: seed of the pilots.

    :ivar records: pilots by program.
    :ivar skipped: why other programs were not tried, by name.
    """

    question: Question
    budget: Budget
    num_runs: int
    pilot_particles: int
    max_particles: int
    seed: int
    records: dict[str, Record] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def spent(self) -> Cost:
        """What the pilots cost so far."""
        return sum((record.spent for record in self.records.values()), Cost())

    @property
    def left(self) -> Cost:
        """What is left of the pilots' share."""
        return self.budget.allowance - self.spent

    @property
    def evidence_floor(self) -> float:
        """The best lower bound of the log-evidence from any program."""
        return max((r.evidence_range[0] for r in self.records.values()), default=-math.inf)

    @property
    def tried(self) -> list[Candidate]:
        """Candidates with a pilot, the simplest first."""
        return [c for c in self.question.candidates if c.name in self.records]

    def run(self) -> Verdict:
        """Spend the pilots' share, then choose."""
        simplest = self.question.candidates[0]
        if self.bound(simplest).size < FEW:
            return self._too_little(simplest)
        active = self._first_pilots()
        while active:
            total = sum(map(self._doubled, active), Cost())
            if total.within(self.left.times(0.25) if len(active) > 1 else self.left):
                active = [c for c in active if self._grow(c)]
            elif len(active) > 1:
                active = self._better_half(active)
            else:
                break
        return self._choose() if self.records else self._untried(simplest)

    # Pilots.

    def _first_pilots(self) -> list[Candidate]:
        """Give every candidate that can be afforded a first pilot, the promising ones first."""
        for number, candidate in enumerate(self.question.in_order_of_promise):
            expected = self._expected(candidate).times(RUNS * self.pilot_particles)
            # Nothing is learned from a single program: the first two may take more.
            limit = self.left if number > 1 else self.budget.most - self.spent
            if expected.within(limit):
                self._try(candidate, self.pilot_particles)
            else:
                self.skipped[candidate.name] = UNAFFORDABLE
        return self.tried

    def _expected(self, candidate: Candidate) -> Cost:
        """Return the most a particle can cost, with the times measured so far."""
        network, potential = self.question.denoiser, self.question.metered
        seconds = 0.0 if network is None else candidate.rows * network.meter.seconds_per_row
        if potential is not None:
            seconds += candidate.calls * potential.meter.seconds_per_row
        return Cost(candidate.rows, candidate.calls, seconds)

    def _doubled(self, candidate: Candidate) -> Cost:
        record = self.records[candidate.name]
        return record.cost(2 * record.last.size)

    def _grow(self, candidate: Candidate) -> bool:
        """Run a pilot of twice the size; return whether another one makes sense."""
        self._try(candidate, 2 * self.records[candidate.name].last.num_particles)
        return 2 * self.records[candidate.name].last.size <= self.max_particles

    def _try(self, candidate: Candidate, size: int) -> None:
        self.seed += 1  # pilots are independent of each other
        before = self.question.busy
        try:
            posterior = self.question.pilot(candidate, size, RUNS, self.seed)
        except CapabilityError as error:
            self.skipped[candidate.name] = str(error)
            return
        record = self.records.setdefault(candidate.name, Record(candidate.name == PLAIN))
        busy = self.question.busy - before if self.question.metered else posterior.seconds
        record.pilots.append(Pilot.of(posterior, busy))

    def _better_half(self, active: list[Candidate]) -> list[Candidate]:
        ranked = sorted(active, key=lambda c: self.error(c))
        kept = ranked[: len(active) // 2]
        return [c for c in active if c in kept]

    # Predictions.

    def variance(self, candidate: Candidate) -> float:
        """Return the relative variance of a particle, see :meth:`Record.variance`.

        :param candidate: a program with a pilot.
        """
        return self.records[candidate.name].variance(self.evidence_floor)

    def error(self, candidate: Candidate) -> float:
        """Return the predicted error of the log-evidence, in nats.

        :param candidate: a program with a pilot.
        """
        return evidence_error(self.variance(candidate), self.plan(candidate).size)

    def plan(self, candidate: Candidate) -> Plan:
        """Return the largest run that the rest of the budget affords.

        :param candidate: a program with a pilot.
        """
        record, rest = self.records[candidate.name], self.budget.limit - self.spent
        size = largest(lambda n: record.cost(n).within(rest), self.max_particles)
        return self._plan(size, record.cost)

    def bound(self, candidate: Candidate) -> Plan:
        """Return the largest run that the budget affords if no two rows coincide.

        :param candidate: a program.
        """
        each, limit = Cost(candidate.rows, candidate.calls), self.budget.limit
        size = largest(lambda n: each.times(n).within(limit), self.max_particles)
        return self._plan(size, each.times)

    def _plan(self, size: int, cost: CostOf) -> Plan:
        runs = max(1, min(self.num_runs, size // LEAST_PARTICLES))
        particles = size // runs
        return Plan(particles, runs, cost(particles * runs))

    # Choices.

    def _choose(self) -> Verdict:
        plain = self.records.get(PLAIN)
        if plain is not None and self.plain_is_enough(plain):
            return self._verdict(
                self.tried[0],
                f"the ESS of plain weighing is {percent(plain.last.ess_fraction)} of its draws, so "
                "that look-ahead has little to gain",
            )
        errors = {c.name: self.error(c) for c in self.tried}
        best = min(errors.values())
        if (unseen := self._unseen()) is not None:
            return unseen
        if best == math.inf:
            return self._all_died()
        chosen = next(c for c in self.tried if errors[c.name] <= SLACK * best)
        least = "the smallest" if errors[chosen.name] == best else "nearly the smallest"
        return self._verdict(
            chosen,
            f"it has {least} predicted error of the log-evidence, {errors[chosen.name]:.2g} nats; "
            f"at its best: {chosen.why}",
        )

    def plain_is_enough(self, plain: Record) -> bool:
        """Return whether look-ahead has little to gain.

        :param plain: pilots of importance sampling.
        """
        found_all = plain.evidence_range[1] >= self.evidence_floor
        return found_all and 1 / (1 + plain.last.weight_variance) >= ENOUGH

    def _unseen(self) -> Verdict | None:
        """Return the most promising look-ahead where none could be tried."""
        if any(c.name != PLAIN for c in self.tried):
            return None
        for candidate in self.question.in_order_of_promise[1:]:
            plan = self.bound(candidate)
            if plan.size >= WORTH_STEERING and self.skipped.get(candidate.name) == UNAFFORDABLE:
                return Verdict(
                    candidate.name,
                    candidate.build,
                    plan,
                    f"plain weighing is not enough, and the rule of thumb is: {candidate.why}; no "
                    "pilot of it was affordable",
                )
        return None

    def _verdict(self, candidate: Candidate, reason: str) -> Verdict:
        return Verdict(candidate.name, candidate.build, self.plan(candidate), reason)

    def _all_died(self) -> Verdict:
        looking = [c for c in self.tried if c.name != PLAIN]
        chosen = (looking or self.tried)[0]
        return self._verdict(
            chosen, "every pilot of every program died; look-ahead is the better hope"
        )

    def _too_little(self, simplest: Candidate) -> Verdict:
        build, name = self.question.best_of, BEST_OF_N
        if build is None:
            build, name = simplest.build, simplest.name
        plan = self.bound(simplest)
        if plan.size < 1:
            plan = Plan(1, 1, Cost(simplest.rows, simplest.calls))
        return Verdict(
            name,
            build,
            plan,
            f"the budget affords about {plan.size} trajectories, fewer than the {FEW} that weights "
            "need; nothing was tried",
        )

    def _untried(self, simplest: Candidate) -> Verdict:
        plan = self.bound(simplest)
        return Verdict(
            simplest.name,
            simplest.build,
            plan,
            f"the budget affords about {plan.size} trajectories and no pilot; nothing was tried, "
            "and so few particles gain little from look-ahead",
        )


def largest(affordable: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that is affordable, 0 if none is.

    :param affordable: a predicate that holds up to some number and not beyond.
    :param most: the largest number tried.
    """
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: not affordable(n))


def percent(share: float) -> str:
    """Return a share in words that do not round something to nothing.

    :param share: between 0 and 1.
    """
    return f"{share:.0%}" if share == 0 or share >= 0.01 else f"{100 * share:.1g}%"
