"""Pilot runs: what they cost, what they show, and how that is carried over to a larger run.

One law serves all methods. The evidence estimate of ``n`` particles has a relative variance of
about ``C / n`` and is about log-normal (Bérard, Del Moral and Doucet 2014, arXiv:1307.0181), so::

    v = log(1 + C / n),    var log Z_hat = v,    E log Z_hat = log Z - v / 2

On hard problems the shortfall ``v / 2`` is most of the error. Costs are taken to be proportional to
the number of particles: an upper estimate as a rule, since larger runs share more of their rows.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError, ParticleCollapse, PotentialError
from ppl_diffusion.inference.baselines import BestOfN, ImportanceSampling
from ppl_diffusion.inference.correctors import ComposedSource, Corrector
from ppl_diffusion.inference.refinement import Refinement
from ppl_diffusion.inference.smc import SMC
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method, methods
from ppl_diffusion.programs.sources import Source
from ppl_diffusion.smc.genealogy import degenerate, evidence_variance
from ppl_diffusion.smc.posterior import ParticlePosterior

COSTS = ("network_rows", "potential_calls", "seconds")
RUNS, RECENT = 4, 3
"""Runs of a pilot, and pilots (the largest) whose spreads are averaged: few runs show it badly."""

FEW_DRAWS, CAP = 30, 300.0
"""ESS below which weights do not show their own tail; nats beyond which ``exp`` would overflow."""


PLAIN = ImportanceSampling.name

CHEAP_FIRST = (PLAIN, "steering-strided", "smc", "twisted")
"""Who is tried first, since the pilots' share may not do for all."""

PATIENCE, LEAST_PARTICLES, FEW = 120.0, 8, 4
"""Seconds that pilots may take, whatever the budget; particles that a run of several has at least;
particles of a first pilot, and draws below which weights mean nothing."""


def cost_of(rows: float = 0.0, calls: float = 0.0, seconds: float = 0.0) -> Tensor:
    """Return network rows, potential calls and wall time as an array, float64 ``(3,)``."""
    return torch.tensor([rows, calls, seconds], dtype=torch.float64, device="cpu")


def within(cost: Tensor, limit: Tensor) -> bool:
    """Return whether no part of a cost exceeds its limit."""
    return bool((cost <= limit).all())


def evidence_error(variance: float, size: float) -> float:
    """Return the root mean square error of a log-evidence by the law above."""
    v = math.log1p(variance / size)
    return math.sqrt(v + v * v / 4)


class TooDear(Exception):
    """A pilot was stopped because it took more than it may."""


class Watched(SMC):
    """The runner, stopped between two steps when it has cost more than its limit."""

    def __init__(self, *target: Any, limit: Tensor, **options: Any) -> None:
        super().__init__(*target, **{**options, "progress": self._watch})
        self.limit, self.started = limit, time.perf_counter()
        self.bound: Bound | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Bind the target, and keep hold of what counts rows and calls."""
        self.bound = super().bind(args, kwargs)
        return self.bound

    @property
    def spent(self) -> Tensor:
        """What the run has cost so far."""
        bound, seconds = self.bound, time.perf_counter() - self.started
        if bound is None:
            return cost_of(seconds=seconds)
        return cost_of(bound.num_evaluations, self.method.num_calls(bound), seconds)

    def _watch(self, done: int, total: int) -> None:
        spent = self.spent
        # Sharing may save half of what is to come; what would still be too dear stops at once.
        hopeless = not within(spent * total / done, 2 * self.limit)
        if done < total and (hopeless or not within(spent, self.limit)):
            raise TooDear


@dataclass(eq=False)
class Candidate:
    """A method with its pilots, smallest first."""

    name: str
    method: Method
    each: Tensor = field(default_factory=cost_of)  # what a particle costs; zero if not known
    status: str = "not tried"
    pilots: list[ParticlePosterior] = field(default_factory=list)
    stopped: bool = False  # larger pilots are out of the question

    def pilot(self, size: int, limit: Tensor, seed: int, given: Any, **options: Any) -> Tensor:
        """Run a pilot and return what it cost; if nothing comes of it, ``status`` says why."""
        target, args, kwargs = given
        options |= {"num_particles": size, "num_runs": RUNS, "method": self.method}
        runner = Watched(*target, limit=limit, **options)
        try:
            self.pilots.append(runner.run(*args, seed=seed, **kwargs))
        except PotentialError:
            raise
        except (TooDear, CapabilityError, ParticleCollapse, ValueError) as error:
            why = "no pilot: too dear" if isinstance(error, TooDear) else f"refused: {error}"
            self.stopped, self.status = True, self.status if self.pilots else why
            return runner.spent
        each, before = runner.spent / (RUNS * size), self.each
        # A larger pilot may cost more per particle (a longer ladder): then so does the next one.
        growth = torch.where(before > 0, each / before, 1.0).clamp(1.0, 2.0)
        self.status, self.each = "tried", each * growth
        return runner.spent

    @property
    def last(self) -> ParticlePosterior:
        """The largest pilot."""
        return self.pilots[-1]

    @property
    def size(self) -> int:
        """Particles of all runs of the largest pilot."""
        return self.last.log_weights.numel() if self.pilots else 0

    @property
    def ess(self) -> float:
        """ESS at the end over all particles, each run weighted by its evidence."""
        if not bool(self.last.alive.any()):
            return 0.0
        weights = self.last.pooled_log_weights.exp()
        return min(1.0, 1 / float(weights.square().sum() * self.size))

    @property
    def seen(self) -> float:
        """Relative variance ``C`` of a particle as the pilots themselves show it."""
        if not bool(self.last.alive.any()):
            return math.inf
        if not bool(self.last.resampled.any()):
            return self._draw_variance
        recent = [p for p in self.pilots[-RECENT:] if bool(p.alive.any())]
        runs = sum(p.num_particles * _run_variance(p) for p in recent) / len(recent)
        # Few runs may agree by chance; then what they share of their ancestry counts.
        own = self.last.num_particles * _tree_variance(self.last)
        return max(runs, own)

    @property
    def _draw_variance(self) -> float:
        """``n / ESS - 1`` of independent draws, or more where they are too few to show it."""
        log_weights, ess = self.last.pooled_log_weights.flatten(), self.ess
        if ess * self.size >= FEW_DRAWS:
            return 1 / ess - 1
        # Few draws miss the tail: they are taken to be log-normal, with the spread of the upper
        # half, because no draw below the median matters.
        finite = log_weights[log_weights > -math.inf]
        above = 2 * float((finite - finite.median()).clamp_min(0).square().mean())
        return max(1 / ess, math.exp(min(above, CAP)) * self.size / len(finite)) - 1

    @property
    def evidence_range(self) -> tuple[float, float]:
        """Between what the log-evidence very likely lies, if runs show their own spread."""
        found, three = self.last.pooled_log_evidence, 3 * evidence_error(self.seen, self.size)
        # An unbiased estimate exceeds the truth 100 times once in 100 runs at most (Markov).
        return found - min(three, math.log(100)), found + min(three, CAP)

    def variance(self, floor: float) -> float:
        """Return ``C``, so large that the law explains why less than ``floor`` was found."""
        short = min(max(floor - self.evidence_range[1], 0.0), CAP)
        return max(self.seen, self.size * math.expm1(2 * short))

    def shown(self, floor: float, size: int) -> dict[str, Any]:
        """Return what the pilots showed, and the error of a run of so many particles."""
        last, alive, variance = self.last, self.last.alive, self.variance(floor)
        trace = (last.ess[alive] / last.num_particles).sum(0) / alive.sum().clamp_min(1)
        spare = (RUNS - 1) * len(self.pilots[-RECENT:])
        # So few runs show their variance up to the factor of a chi-square.
        from scipy import stats  # here, not above: a second of import that most runs never need

        low, high = (spare / float(stats.chi2.ppf(q, spare)) for q in (0.95, 0.05))
        return {
            "error": evidence_error(variance, size),
            "error_low": evidence_error(variance * low, size),
            "error_high": evidence_error(variance * high, size),
            "pilot_particles": self.size,
            "ess": self.ess,
            "ess_trace": tuple(trace.tolist()),
            "log_evidence": last.pooled_log_evidence,
            "log_evidence_error": evidence_error(self.seen, self.size),
        }


def _run_variance(posterior: ParticlePosterior) -> float:
    """Return the relative variance of one run's evidence, as runs show it."""
    if bool(posterior.alive.all()):
        return math.expm1(min(float(posterior.log_evidence.var()), CAP))
    return float((posterior.log_evidence - posterior.pooled_log_evidence).exp().var())


def _tree_variance(posterior: ParticlePosterior) -> float:
    """Return at least what the family tree tells of it; too little for most resamplers."""
    weights = posterior.weights
    told = evidence_variance(posterior.eve, weights, posterior.resampled)
    return float(told.masked_fill(degenerate(posterior.eve, weights), 0.0).clamp_min(0).mean())


def applicable(source: Source, composed: bool, extra: Mapping[str, Method]) -> list[Candidate]:
    """Return the methods to try, in the order in which they are."""
    found: dict[str, Method] = {}
    for name, cls in methods().items():
        # Only correctors take compositions; of a plain chain they sample another law (reveals).
        # The evidence of a refined method is that of the method, which is tried itself.
        refined = issubclass(cls, Refinement)
        if cls.exact and not refined and issubclass(cls, Corrector) == composed:
            found[name] = cls()
            if "variants" in vars(cls):  # inherited ones are those of another method
                found |= cls.variants(source)  # type: ignore[attr-defined]
    found |= extra
    known, cheap = [], dict.fromkeys(n for n in CHEAP_FIRST if n in found)
    for name in cheap | found:
        with contextlib.suppress(CapabilityError):
            found[name].require(source)
            known.append(Candidate(name, found[name]))
    return known


def _plain_cost(source: Source) -> Tensor:
    """Return the most that a plain draw can cost."""
    own = [site.chain for site in source.chains]
    chains = source.composition.chains if isinstance(source, ComposedSource) else own
    rows = (
        c.num_steps * c.batch_shape.numel() * getattr(c.kernel.denoiser, "network_rows", 1)
        for c in chains
    )
    return cost_of(sum(rows), 1)


@dataclass
class Search:
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
        return part * torch.minimum(self.limit * self.share, cost_of(math.inf, math.inf, PATIENCE))

    def run(self, source: Source) -> tuple[Candidate, str]:
        """Spend the pilots' share; return what is recommended, and why."""
        plain = _plain_cost(source)
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
        else:
            plain = tried[0].pilots[0]  # most of its time is overhead, which look-ahead may double
            calls = plain.num_potential_calls
            first = cost_of(plain.num_evaluations, calls, 2 * plain.seconds)
            limit = torch.maximum(part, first) if within(first, left) else part
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
        seed = self.seed + len(candidate.pilots)  # pilots of one method are independent
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
            return first, f"steering is not needed: the ESS of plain draws is {first.ess:.0%}"
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
