"""Spending the pilots' share of a budget, and choosing by what they showed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference._check_budget import Budget, CostOf, Plan, Verdict, largest
from ppl_diffusion.inference._check_candidates import (
    BEST_OF_N,
    PLAIN,
    Candidate,
    Question,
)
from ppl_diffusion.inference._check_meters import Cost
from ppl_diffusion.inference._check_pilots import (
    MAX_SHORTFALL,
    Pilot,
    Record,
    evidence_error,
)

FEW = 4
"""With fewer trajectories than this, weights mean nothing."""

ENOUGH = 0.5
"""ESS of importance sampling, as a fraction of its draws, above which nothing else is needed."""

SLACK = 1.5
"""A more promising program may have this many times the error of the best: pilots are noisy."""

NOISE = 0.01
"""Difference between log-evidences, in nats, that means nothing."""

LEAST_PARTICLES = 8
"""Particles that a run of several has at least."""

RACE_SHARE = 0.25
"""Part of what is left of the pilots' share that a round of several programs may take."""

FEW_SIZES = 4
"""Pilots of a program from which on its costs can be continued."""

RUNS = 4
"""Runs of a pilot."""

GOOD = 0.5
"""Error of the log-evidence, in nats, that will do."""

WORTH_STEERING = 16
"""Particles from which on a program that was not tried is trusted by rule."""

UNAFFORDABLE = "no pilot: too dear"


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
        self._race(self._first_pilots())
        if not self.records:
            return self._untried(simplest)
        verdict = self._choose()
        while self._grow_if_affordable(verdict.name):  # its costs are what must be right
            verdict = self._choose()
        return verdict

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

    def _race(self, active: list[Candidate]) -> None:
        """Give the better half pilots of twice the size, again and again."""
        while len(active) > 1:
            total = sum((self._doubled(c.name) for c in active), Cost())
            if total.within(self.left.times(RACE_SHARE)):
                active = [c for c in active if self._grow(c)]
            else:
                ranked = sorted(active, key=self.error)
                active = ranked[: len(active) // 2]

    def _doubled(self, name: str) -> Cost:
        record = self.records[name]
        return record.cost(2 * record.last.size)

    def _grow_if_affordable(self, name: str) -> bool:
        """Run a pilot of twice the size, unless it is too large or too dear.

        Where few states are shared by ever more particles, costs cannot be continued from one or
        two sizes: then the first few may take more.
        """
        record = self.records.get(name)
        if record is None or 2 * record.last.size > self.max_particles:
            return False
        unclear = len(record.pilots) < FEW_SIZES and not record.scales
        limit = self.budget.most - self.spent if unclear else self.left
        if not self._doubled(name).within(limit):
            return False
        self._grow(next(c for c in self.tried if c.name == name))
        return True

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

    # Predictions.

    def variance(self, candidate: Candidate) -> float:
        """Return the relative variance of a particle, see :meth:`Record.variance`.

        :param candidate: a program with a pilot.
        """
        return self.records[candidate.name].variance(self.evidence_floor, self.divergence)

    @property
    def divergence(self) -> float | None:
        """Relative entropy from chain to target, ``E[log G] - log Z``, as look-ahead has it.

        Pilots mostly find too little of the target, so that the largest value counts.
        """
        pilots = [p for r in self.records.values() if not r.independent for p in r.pilots]
        known = [p.mean_log_potential - p.pooled for p in pilots if not p.dead]
        return min(max(0.0, *known), MAX_SHORTFALL) if known else None

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
        """Return the largest run that the rest of the budget affords if no two rows coincide.

        :param candidate: a program.
        """
        each, rest = self._expected(candidate), self.budget.limit - self.spent
        size = largest(lambda n: each.times(n).within(rest), self.max_particles)
        return self._plan(size, each.times)

    def _plan(self, size: int, cost: CostOf) -> Plan:
        size = max(size, 1)
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
        if (unseen := self._unseen()) is not None:
            return unseen
        errors = {c.name: self.error(c) for c in self.tried}
        best = min(errors.values())
        if best == math.inf:
            return self._all_died()
        ranked = [c for c in self.question.in_order_of_promise if c.name in errors]
        chosen = next(c for c in ranked if errors[c.name] <= SLACK * best)
        least = "the smallest" if errors[chosen.name] == best else "nearly the smallest"
        return self._verdict(
            chosen,
            f"it has {least} predicted error of the log-evidence, {errors[chosen.name]:.2g} nats; "
            f"its usual case: {chosen.why}",
        )

    def plain_is_enough(self, plain: Record) -> bool:
        """Return whether look-ahead has little to gain.

        :param plain: pilots of importance sampling.
        """
        found_all = plain.evidence_range[1] >= self.evidence_floor - NOISE
        return found_all and plain.last.surely_even(ENOUGH)

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
        return self._verdict(
            (looking or self.tried)[0],
            "every pilot of every program died, and look-ahead is the better hope",
        )

    def _too_little(self, simplest: Candidate) -> Verdict:
        plan, build, name = self.bound(simplest), self.question.best_of, BEST_OF_N
        if build is None or plan.size < 2:  # one draw is the best of nothing
            build, name = simplest.build, simplest.name
        drawn = "one trajectory" if plan.size == 1 else f"about {plan.size} trajectories"
        return Verdict(
            name,
            build,
            plan,
            f"the budget affords {drawn}, fewer than the {FEW} that weights need; nothing was "
            "tried",
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


def percent(share: float) -> str:
    """Return a share in words that do not round something to nothing.

    :param share: between 0 and 1.
    """
    return f"{share:.0%}" if share == 0 or share >= 0.01 else f"{100 * share:.1g}%"
