"""A dry run: which method to use for a budget, how large, what it costs, and how good it will be.

Weighing plain draws is all that is needed where many of them do well; look-ahead pays where few do.
Which of these a problem is shows in small pilots. Every method of the registry that is exact and
does not refuse the target gets some, each twice as large as the last, within a share of the budget.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.baselines import BestOfN, ImportanceSampling
from ppl_diffusion.inference.check_pilots import (
    COSTS,
    RUNS,
    Candidate,
    cost_of,
    evidence_error,
    within,
)
from ppl_diffusion.inference.check_table import table, warnings_of
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.correctors import ComposedSource, Corrector
from ppl_diffusion.inference.smc import SMC, Target
from ppl_diffusion.programs.method import Method, methods
from ppl_diffusion.programs.sources import PotentialLike, ProgramSource, Source
from ppl_diffusion.smc.posterior import ParticlePosterior

PLAIN = ImportanceSampling.name

CHEAP_FIRST = (PLAIN, "steering-strided", "smc", "twisted")
"""Who is tried first, since the pilots' share may not do for all."""

PATIENCE, LEAST_PARTICLES, FEW = 120.0, 8, 4
"""Seconds that pilots may take, whatever the budget; particles that a run of several has at least;
particles of a first pilot, and draws below which weights mean nothing."""


@dataclass(frozen=True, eq=False)
class Check:
    """What a dry run found; printing it prints its table.

    :param recommended: name of the method to use.
    :param program: an :class:`~ppl_diffusion.inference.SMC` with it, of a size the budget affords.
    :param reason: why this one, in a sentence.
    :param rows: one dict per method of what is known: ``name``, ``status``, ``num_particles`` and
        ``num_runs`` that the budget affords, what they cost as a rule at most (``network_rows``,
        ``potential_calls``, ``seconds``), their ``error`` (nats; root mean square error of the
        log-evidence) with a 90 % interval (``error_low``, ``error_high``); and of the largest pilot
        ``pilot_particles``, ``ess`` (share of the particles), ``ess_trace`` (after each step),
        ``log_evidence``, ``log_evidence_error``.
    :param warnings: what to know before trusting it, a sentence each.
    :param pilot_cost: what the pilots took off the budget.
    """

    recommended: str
    program: SMC
    reason: str
    rows: list[dict[str, Any]]
    warnings: list[str]
    pilot_cost: dict[str, float]
    _given: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    def run(self, *, seed: int | None = None) -> ParticlePosterior:
        """Run the recommended program on the target, and the arguments, that were checked.

        :param seed: seed of the run.
        """
        args, kwargs = self._given
        return self.program.run(*args, seed=seed, **kwargs)

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a method.

        :param name: its name.
        :raises KeyError: if it was not among the candidates.
        """
        known = {row["name"]: row for row in self.rows}
        if name not in known:
            raise KeyError(f"{name!r} was no candidate; there are {', '.join(known)}.")
        return known[name]

    def __str__(self) -> str:
        cost = ", ".join(f"{v:,.4g} {k.replace('_', ' ')}" for k, v in self.pilot_cost.items())
        lines = [f"Use {self.recommended}: {self.reason}.", f"Pilots took {cost}."]
        return "\n".join([*table(self.rows), *lines, *(f"Warning: {w}" for w in self.warnings)])


def check(
    target: Target,
    potential: PotentialLike | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_evaluations: int | None = 10_000,
    num_potential_calls: int | None = None,
    seconds: float | None = None,
    num_runs: int = 4,
    pilot_share: float = 0.2,
    max_particles: int = 4096,
    candidates: Mapping[str, Method] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Check:
    """Try the methods that apply to a target, and say which one to use for a budget.

    :param target: a reverse chain, a composition of chains, or a Pyro program.
    :param potential: ``log G`` of a bare chain or on top of a composition; None for a program.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :param num_evaluations: network rows that pilots and run together may take; None for any number.
    :param num_potential_calls: sequences the potential may be asked about; None for any number.
    :param seconds: wall time; None for any. Times are those of a machine as busy as this one.
    :param num_runs: runs of the recommended program; fewer where one would have under 8 particles.
    :param pilot_share: share of every budget for pilots: half to find the best, half to be sure.
    :param max_particles: largest recommended number of particles over all runs.
    :param candidates: methods to try besides those of the registry, by name, such as
        ``{"gradient": TwistedSampler(twist="argmax", proposal=GradientProposal(soft))}``.
    :param seed: seed of the pilots; the global random state is left alone if it is given.
    :param options: options of the runner, such as ``schedule`` or ``vectorize_particles``.
    :raises ValueError: if a number is not usable, or no budget is given.
    :raises CapabilityError: if every method refuses the target.
    :raises PotentialError: if the potential raises, or returns NaN, ``+inf`` or a wrong shape.

    Example::

        found = check(chain, Reward(dock, temperature=0.1), num_potential_calls=1000, seed=0)
        print(found)
        posterior = found.program.run(seed=1)
    """
    budget: dict[str, float | None] = {"num_evaluations": num_evaluations}
    budget |= {"num_potential_calls": num_potential_calls, "seconds": seconds}
    _require_numbers(budget, num_runs=num_runs, max_particles=max_particles)
    if not 0 < pilot_share <= 0.5:
        raise ValueError(f"check: pilot_share must lie in (0, 0.5], got {pilot_share}.")
    given = ((target, potential), tuple(args), dict(kwargs or {}))
    source = SMC(target, potential, **options)._source(*given[1:])  # may refuse it
    known = _candidates(source, isinstance(target, Composition), candidates or {})
    limit = cost_of(*(math.inf if value is None else value for value in budget.values()))
    # Programs that read whole paths are refused without them; others need not pay for them.
    whole = isinstance(source, ProgramSource) and bool(source.program.reads)
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    pilots = {"given": given, "store_path": whole, **options}
    search = _Search(known, pilots, limit, pilot_share, num_runs, max_particles, seed)
    search.spent = cost_of(calls=source.num_calls)  # what the reading of a program took
    best, reason = search.run(_plain_cost(source))
    rows = [search.row(candidate, best) for candidate in search.candidates]
    row = search.row(best, best)
    size = {name: row[name] for name in ("num_particles", "num_runs")}
    return Check(
        recommended=best.name,
        program=SMC(target, potential, method=best.method, **size, **options),
        reason=reason,
        rows=rows,
        warnings=warnings_of(search.tried, best, row),
        pilot_cost=dict(zip(COSTS, search.spent.tolist(), strict=True)),
        _given=given[1:],
    )


def _require_numbers(budget: dict[str, float | None], **sizes: int) -> None:
    if all(value is None for value in budget.values()):
        raise ValueError(f"check: nothing limits the run; give {', '.join(budget)}, or several.")
    for name, value in budget.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"check: {name} must be positive and finite, got {value}.")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"check: {name} must be >= 1, got {size}.")


def _candidates(source: Source, composed: bool, extra: Mapping[str, Method]) -> list[Candidate]:
    """Return the methods to try, in the order in which they are."""
    found: dict[str, Method] = {}
    for name, cls in methods().items():
        # Only correctors take compositions; of a plain chain they sample another law (reveals).
        if cls.exact and issubclass(cls, Corrector) == composed:
            found[name] = cls()
            if "variants" in vars(cls):  # inherited ones are those of another method
                found |= cls.variants(source)  # type: ignore[attr-defined]
    found |= extra
    order = [n for n in CHEAP_FIRST if n in found] + [n for n in found if n not in CHEAP_FIRST]
    known = []
    for name in order:
        with contextlib.suppress(CapabilityError):
            found[name].require(source)
            known.append(Candidate(name, found[name]))
    return known


def _plain_cost(source: Source) -> Tensor:
    """Return the most that a plain draw can cost."""
    chains = [site.chain for site in source.chains]
    if isinstance(source, ComposedSource):
        chains = list(source.composition.chains)
    plates = [chain.num_steps * math.prod(chain.batch_shape) for chain in chains]
    each = [getattr(chain.kernel.denoiser, "network_rows", 1) for chain in chains]
    return cost_of(sum(map(math.prod, zip(plates, each, strict=True))), 1)


@dataclass
class _Search:
    """One dry run: candidates, what pilots are given, the budget, and sizes."""

    candidates: list[Candidate]
    options: dict[str, Any]
    limit: Tensor
    share: float
    num_runs: int
    max_particles: int
    seed: int
    spent: Tensor = field(default_factory=cost_of)

    @property
    def tried(self) -> list[Candidate]:
        return [c for c in self.candidates if c.pilots]

    def _end(self, part: float) -> Tensor:
        """Return what pilots together may take; nobody waits for them for ever."""
        most = cost_of(math.inf, math.inf, PATIENCE)
        return torch.minimum(self.limit * self.share, most) * part

    def run(self, plain: Tensor) -> tuple[Candidate, str]:
        """Spend the pilots' share; return what is recommended, and why."""
        if within(self.spent + plain * RUNS * FEW, self._end(1.0)):
            for number, candidate in enumerate(self.candidates):
                self._try(candidate, len(self.candidates) - number)
        if not self.tried:
            return self._untried(plain)
        while self._grow(self._best()[0], self._end(1.0)):  # its cost is what must be right
            pass
        return self._best()

    def _try(self, candidate: Candidate, waiting: int) -> None:
        """Give a method an equal part of what is left, or what plain draws took if that is more."""
        tried, left = self.tried, self._end(0.5) - self.spent
        limit = part = left / waiting
        if len(tried) < 2:  # nothing is learned from a single method
            limit = self._end(1.0) - self.spent
        elif within(first := tried[0].each * RUNS * FEW, left):
            limit = torch.maximum(part, first)
        candidate.status, end = "no pilot: too dear", self.spent + part
        if bool((limit > 0).all()):
            self._pilot(candidate, FEW, limit)
            while self._grow(candidate, end):
                pass

    def _grow(self, candidate: Candidate, end: Tensor) -> bool:
        """Run a pilot of twice the size, if it ends in time."""
        size = 2 * candidate.size
        affordable = within(self.spent + size * candidate.each, end) and size <= self.max_particles
        if candidate.stopped or not affordable:
            return False
        self._pilot(candidate, size // RUNS, end - self.spent)
        return not candidate.stopped

    def _pilot(self, candidate: Candidate, size: int, limit: Tensor) -> None:
        seed = self.seed + len(candidate.pilots)
        self.spent = self.spent + candidate.pilot(size, limit, seed, **self.options)

    @property
    def _floor(self) -> float:
        """The best lower bound of the log-evidence from any method."""
        return max(c.evidence_range[0] for c in self.tried)

    def _shape(self, candidate: Candidate) -> tuple[int, int]:
        """Return particles and runs of the largest run that the rest of the budget affords."""
        most = float(((self.limit - self.spent) / candidate.each.clamp_min(1e-12)).min())
        size = int(max(1.0, min(self.max_particles, most)))
        runs = max(1, min(self.num_runs, size // LEAST_PARTICLES))
        return size // runs, runs

    def _error(self, candidate: Candidate) -> float:
        return evidence_error(candidate.variance(self._floor), math.prod(self._shape(candidate)))

    def _best(self) -> tuple[Candidate, str]:
        """Return what is recommended, and why."""
        first, best = self.tried[0], min(self.tried, key=self._error)
        # Where at least half of plain draws count, nothing needs the cleverer ones.
        if first.name == PLAIN and first.variance(self._floor) <= 1:
            return (
                first,
                f"steering is not needed: the ESS of plain draws is {first.ess:.0%} of them",
            )
        if math.isinf(best.seen):
            return best, "every pilot of every method died, so that nothing speaks for any of them"
        error = f"about {self._error(best):.2g} nats at this size"
        return best, f"in pilots it tended to have the smallest error for its cost, {error}"

    def _untried(self, plain: Tensor) -> tuple[Candidate, str]:
        """Recommend plain draws, or their best, by what they cost at most."""
        refused = [c.status for c in self.candidates if c.status.startswith("refused: ")]
        if len(refused) == len(self.candidates):
            raise CapabilityError(f"check: no method takes this target. {' '.join(refused[:1])}")
        first = self.candidates[0]
        first.each = plain
        size = math.prod(self._shape(first))
        if first.name == PLAIN and 1 < size < FEW:
            first = Candidate(BestOfN.name, BestOfN(), plain)
            self.candidates.insert(0, first)
        drawn = f"about {size} trajectories" if size > 1 else "one trajectory"
        return first, f"the budget affords {drawn} and no pilot; so few gain little from look-ahead"

    def row(self, candidate: Candidate, best: Candidate) -> dict[str, Any]:
        """Return what a report says of a method."""
        status = "recommended" if candidate is best else candidate.status
        row: dict[str, Any] = {"name": candidate.name, "status": status}
        if not bool(candidate.each.any()):
            return row
        particles, runs = self._shape(candidate)
        cost = (candidate.each * particles * runs).tolist()
        row |= {"num_particles": particles, "num_runs": runs, **dict(zip(COSTS, cost, strict=True))}
        if candidate.pilots:
            row |= candidate.shown(self._floor, particles * runs)
        return row
