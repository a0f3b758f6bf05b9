"""A dry run: which method to use for a budget, how large, what it costs, and how good it will be.

Steering is not always worth its price. Weighing asks the potential once per draw and is all that is
needed where many draws of the chain do well; look-ahead pays where few do. Which of these a problem
is shows in small pilots. Every method of the registry that is exact and does not refuse the target
gets one, as far as a share of the budget goes; the more promising half goes on to pilots of twice
the size (successive halving: Jamieson and Talwalkar 2016, arXiv:1502.07943). What is recommended
has the smallest error of the log-evidence predicted for what is left of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from scipy import stats
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.baselines import BestOfN, ImportanceSampling
from ppl_diffusion.inference.check_pilots import (
    RECENT,
    RUNS,
    Candidate,
    cost_of,
    evidence_error,
    within,
)
from ppl_diffusion.inference.check_table import COSTS, tables, warnings_of
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.correctors import Corrector
from ppl_diffusion.inference.smc import SMC, Target
from ppl_diffusion.programs.method import Method, methods
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.sources import ChainSource, PotentialLike, ProgramSource, Source
from ppl_diffusion.smc.posterior import ParticlePosterior

PLAIN = ImportanceSampling.name

CHEAP_FIRST = (PLAIN, "steering-strided", "smc", "twisted")
"""Who is tried first, since the pilots' share may not do for all."""

LARGEST_SHARE, PATIENCE = 0.25, 120.0
"""Share of a budget, and seconds, that pilots may take where less would teach nothing."""

LEAST_PARTICLES, FEW = 8, 4
"""Particles that a run of several has at least; draws below which weights mean nothing."""


@dataclass(frozen=True, eq=False)
class Check:
    """What a dry run found; printing it prints its table.

    :param recommended: name of the method to use.
    :param program: an :class:`~ppl_diffusion.inference.SMC` with it, of a size the budget affords;
        its ``run`` takes the arguments of the user's program, if that is the target.
    :param reason: why this one, in a sentence.
    :param rows: one dict per method: ``name``, ``status``, ``num_particles`` and ``num_runs`` that
        the budget affords and what they are predicted to cost (``network_rows``,
        ``potential_calls``, ``seconds``), ``error`` (nats; root mean square error of the
        log-evidence) with ``error_low`` and ``error_high`` (90 % interval for the spread of so few
        runs), and of the largest pilot ``pilot_particles``, ``ess`` (share of the particles),
        ``ess_trace`` (after each step), ``log_evidence`` and its error. Only what is known.
    :param warnings: what to know before trusting it, a sentence each.
    :param pilot_cost: what the pilots took off the budget.
    """

    recommended: str
    program: SMC
    reason: str
    rows: list[dict[str, Any]]
    warnings: list[str]
    pilot_cost: dict[str, float]
    _args: tuple[Any, ...] = field(default=(), repr=False)
    _kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def run(self, *, seed: int | None = None) -> ParticlePosterior:
        """Run the recommended program on the target that was checked.

        :param seed: seed of the run.
        """
        return self.program.run(*self._args, seed=seed, **self._kwargs)

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a method.

        :param name: its name.
        :raises KeyError: if it was not among the candidates.
        """
        for row in self.rows:
            if row["name"] == name:
                return row
        raise KeyError(f"{name!r} was no candidate; there are {[r['name'] for r in self.rows]}.")

    def __rich__(self) -> Any:
        use = f"Use {self.recommended}: {self.reason}."
        return tables(self.rows, use, self.pilot_cost, self.warnings)

    def __str__(self) -> str:
        console = Console(width=132, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


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
    pilot_share: float = 0.1,
    pilot_particles: int = 2,
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
    :param num_runs: runs of the recommended program: several, so that its error shows; fewer where
        a run would have less than 8 particles.
    :param pilot_share: share of every budget that goes into pilots; up to a quarter where less
        would leave plain weighing alone in the race.
    :param pilot_particles: particles per run of the first pilots.
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
    limit = _limit(num_evaluations, num_potential_calls, seconds)
    _require_least(num_runs=(num_runs, 1), pilot_particles=(pilot_particles, 2))
    _require_least(max_particles=(max_particles, 1))
    if not 0 < pilot_share <= 0.5:
        raise ValueError(f"check: pilot_share must lie in (0, 0.5], got {pilot_share}.")
    given = (target, potential, tuple(args), dict(kwargs or {}))
    source = _source(given, options)
    known = _candidates(source, isinstance(target, Composition), candidates or {})
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    search = _Search(given, known, limit, pilot_share, max_particles, num_runs, seed, options)
    search.spent = cost_of(calls=source.num_calls)  # what the reading of a program took
    search.store = isinstance(source, ProgramSource) and bool(source.program.reads)
    best, reason = search.run(pilot_particles, _plain_cost(target, source))
    rows = [search.row(candidate) for candidate in search.candidates]
    row = next(row for row in rows if row["name"] == best.name)
    row["status"] = "recommended"
    size = {"num_particles": row["num_particles"], "num_runs": row["num_runs"]}
    return Check(
        recommended=best.name,
        program=SMC(target, potential, method=best.method, **size, **options),
        reason=reason,
        rows=rows,
        warnings=warnings_of(search.tried, best, row),
        pilot_cost=dict(zip(COSTS, search.spent.tolist(), strict=True)),
        _args=given[2],
        _kwargs=given[3],
    )


def _limit(rows: int | None, calls: int | None, seconds: float | None) -> Tensor:
    given = {"num_evaluations": rows, "num_potential_calls": calls, "seconds": seconds}
    if all(value is None for value in given.values()):
        raise ValueError(
            "check: nothing limits the run; give num_evaluations, num_potential_calls or seconds."
        )
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"check: {name} must be positive and finite, got {value}.")
    return cost_of(*(math.inf if value is None else value for value in given.values()))


def _require_least(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"check: {name} must be >= {least}, got {value}.")


# What is tried.


def _source(given: tuple[Any, ...], options: dict[str, Any]) -> Source:
    """Return what is sampled, after the runner has refused what it cannot take."""
    target, potential, args, kwargs = given
    runner = SMC(target, potential, **options)
    if isinstance(target, Composition):
        return Corrector().source(target, potential)
    if isinstance(target, ReverseChain):
        return ChainSource(target, potential)
    together = runner.vectorize_particles
    return ProgramSource(Program(target, args, kwargs, vectorize=together, owner="check"), set())


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
    names = [n for n in CHEAP_FIRST if n in found] + [n for n in found if n not in CHEAP_FIRST]
    return [Candidate(n, found[n]) for n in names if _takes(found[n], source)]


def _takes(method: Method, source: Source) -> bool:
    try:
        method.require(source)
    except CapabilityError:
        return False
    return True


def _plain_cost(target: Target, source: Source) -> Tensor:
    """Return the most that a plain draw can cost."""
    chains = target.chains if isinstance(target, Composition) else [s.chain for s in source.chains]
    rows = (c.num_steps * math.prod(c.batch_shape) * _network_rows(c) for c in chains)
    return cost_of(sum(rows), 1)


def _network_rows(chain: ReverseChain) -> int:
    return int(getattr(chain.kernel.denoiser, "network_rows", 1))


# What is spent.


@dataclass
class _Search:
    """One dry run."""

    given: tuple[Any, ...]
    candidates: list[Candidate]
    limit: Tensor
    share: float
    max_particles: int
    num_runs: int
    seed: int
    options: dict[str, Any]
    spent: Tensor = field(default_factory=cost_of)
    store: bool = False  # whole paths, for programs that read them

    @property
    def tried(self) -> list[Candidate]:
        return [c for c in self.candidates if c.pilots]

    def left(self, share: float) -> Tensor:
        """Return what is left of a share of the budget; nobody waits for pilots for ever."""
        return torch.minimum(self.limit * share, cost_of(math.inf, math.inf, PATIENCE)) - self.spent

    def run(self, size: int, plain: Tensor) -> tuple[Candidate, str]:
        """Spend the pilots' share; return what is recommended, and why."""
        if within(plain * RUNS * size, self.left(LARGEST_SHARE)):
            for number, candidate in enumerate(self.candidates):
                self._first_pilot(candidate, size, len(self.candidates) - number)
        if not self.tried:
            return self._untried(plain)
        self._race()
        best = self._best()
        while self._affords([best], 1.0) and self._grow(best):  # its cost is what must be right
            best = self._best()
        return best, self._reason(best)

    def _first_pilot(self, candidate: Candidate, size: int, waiting: int) -> None:
        if len(self.tried) < 2:  # nothing is learned from a single method
            limit = self.left(max(self.share, LARGEST_SHARE))
        else:
            # An equal part, or what the first one took: nothing is much cheaper than plain draws.
            left, first = self.left(self.share), self.tried[0]
            assert first.each is not None
            limit = torch.minimum(left, torch.maximum(left / waiting, first.each * RUNS * size))
        if bool((limit <= 0).any()):
            candidate.status, candidate.stopped = "no pilot: too dear", True
            return
        self._pilot(candidate, size, limit)

    def _pilot(self, candidate: Candidate, size: int, limit: Tensor) -> None:
        seed, options = (
            self.seed + len(candidate.pilots),
            {"store_path": self.store, **self.options},
        )
        self.spent = self.spent + candidate.pilot(self.given, size, limit, seed, **options)

    def _race(self) -> None:
        """Give pilots of twice the size, to the better half where not all can have one."""
        active = self.tried
        while len(active) > 1:
            if self._affords(active, 0.5):
                active = [c for c in active if self._grow(c)]
            else:
                active = sorted(active, key=self._error)[: len(active) // 2]

    def _affords(self, active: list[Candidate], part: float) -> bool:
        cost = sum((2 * c.size * c.each for c in active if c.each is not None), cost_of())
        return within(cost, part * self.left(self.share))

    def _grow(self, candidate: Candidate) -> bool:
        if candidate.stopped or 2 * candidate.size > self.max_particles:
            return False
        self._pilot(candidate, 2 * candidate.last.num_particles, self.left(self.share))
        return not candidate.stopped

    # What is predicted, and chosen.

    @property
    def floor(self) -> float:
        """The best lower bound of the log-evidence from any method."""
        return max((c.evidence_range[0] for c in self.tried), default=-math.inf)

    def _shape(self, candidate: Candidate) -> tuple[int, int]:
        """Return particles and runs of the largest run that the rest of the budget affords."""
        assert candidate.each is not None
        most = float(((self.limit - self.spent) / candidate.each.clamp_min(1e-12)).min())
        size = int(max(1.0, min(self.max_particles, most)))
        runs = max(1, min(self.num_runs, size // LEAST_PARTICLES))
        return size // runs, runs

    def _error(self, candidate: Candidate) -> float:
        return evidence_error(candidate.variance(self.floor), math.prod(self._shape(candidate)))

    @property
    def _plain_is_enough(self) -> bool:
        """Whether at least half of plain draws count; then nothing needs the cleverer ones."""
        first = self.tried[0]
        return first.name == PLAIN and first.variance(self.floor) <= 1

    def _best(self) -> Candidate:
        return self.tried[0] if self._plain_is_enough else min(self.tried, key=self._error)

    def _reason(self, best: Candidate) -> str:
        if all(math.isinf(c.seen) for c in self.tried):
            return "every pilot of every method died, so that nothing speaks for any of them"
        if self._plain_is_enough:
            return (
                f"steering is not needed: the ESS of plain weighing is {best.ess:.0%} of its draws"
            )
        return (
            "in pilots it tended to have the smallest error of the log-evidence for its cost, "
            f"about {self._error(best):.2g} nats at this size"
        )

    def _untried(self, plain: Tensor) -> tuple[Candidate, str]:
        """Recommend plain draws, or their best, on the ground of what they cost at most."""
        refused = [c.status for c in self.candidates if c.status.startswith("refused: ")]
        if len(refused) == len(self.candidates):
            raise CapabilityError(f"check: no method takes this target. {' '.join(refused[:1])}")
        first = self.candidates[0]
        first.each = plain
        size = math.prod(self._shape(first))
        if first.name == PLAIN and 1 < size < FEW:
            first = Candidate(BestOfN.name, BestOfN(), each=plain)
            self.candidates.insert(0, first)
        drawn = f"about {size} trajectories" if size > 1 else "one trajectory"
        return first, f"the budget affords {drawn} and no pilot; so few gain little from look-ahead"

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """Return what a report says of a method."""
        row: dict[str, Any] = {"name": candidate.name, "status": candidate.status}
        if candidate.each is None:
            return row
        particles, runs = self._shape(candidate)
        cost = (candidate.each * particles * runs).tolist()
        row |= {"num_particles": particles, "num_runs": runs, **dict(zip(COSTS, cost, strict=True))}
        if not candidate.pilots:
            return row
        variance, spare = (
            candidate.variance(self.floor),
            (RUNS - 1) * len(candidate.pilots[-RECENT:]),
        )
        ratios = {"error": 1.0, "error_low": 0.95, "error_high": 0.05}
        ratios |= {k: spare / float(stats.chi2.ppf(q, spare)) for k, q in ratios.items() if q < 1}
        row |= {k: evidence_error(variance * x, particles * runs) for k, x in ratios.items()}
        return row | candidate.shown
