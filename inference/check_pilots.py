"""Pilot runs: what they cost, what they show, and how that is carried over to a larger run.

One law serves all methods. The evidence estimate of ``n`` particles has a relative variance of
about ``C / n`` and is about log-normal (Bérard, Del Moral and Doucet 2014, arXiv:1307.0181), so::

    v = log(1 + C / n),    var log Z_hat = v,    E log Z_hat = log Z - v / 2

On hard problems the shortfall ``v / 2`` is most of the error. Costs are taken to be proportional to
the number of particles: an upper estimate as a rule, since larger runs share more of their rows.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ppl_diffusion.errors import CapabilityError, ParticleCollapse, PotentialError
from ppl_diffusion.inference.smc import SMC
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.smc.posterior import ParticlePosterior

COSTS = ("network_rows", "potential_calls", "seconds")

RUNS, RECENT = 4, 3
"""Runs of a pilot, and pilots (the largest) whose spreads are averaged: few runs show it badly."""

FEW_DRAWS, CAP = 30, 300.0
"""ESS below which weights do not show their own tail; nats beyond which ``exp`` would overflow."""


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
        each = runner.spent / (RUNS * size)
        # A larger pilot may cost more per particle (a longer ladder): then so does the next one.
        growth = (
            (each / self.each.clamp_min(1e-12)).clamp(1.0, 2.0) if len(self.pilots) > 1 else 1.0
        )
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
        recent = self.pilots[-RECENT:]
        runs = sum(p.num_particles * _run_variance(p) for p in recent) / len(recent)
        # Few runs may agree by chance; their own weights then give a lower bound.
        return max(runs, _step_variance(self.last))

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
    if not bool(posterior.alive.any()):
        return 0.0  # a small pilot that found nothing says nothing about a larger one
    return float((posterior.log_evidence - posterior.pooled_log_evidence).exp().var())


def _step_variance(posterior: ParticlePosterior) -> float:
    """Return ``N / ESS - 1`` summed over where weights are used up: when resampled, and at the end.

    If particles forgot their past at every resampling this would be the variance of the evidence.
    """
    ends = posterior.resampled.clone()
    ends[:, -1] = True
    terms = (posterior.num_particles / posterior.ess - 1) * ends
    return float(terms[posterior.alive].sum(-1).mean())
