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
from torch import Tensor

from ppl_diffusion.errors import CapabilityError, ParticleCollapse, PotentialError
from ppl_diffusion.inference.smc import SMC
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.smc.posterior import ParticlePosterior

RUNS, RECENT = 4, 3
"""Runs of a pilot, and pilots (the largest) whose spreads are averaged: few runs show it badly."""

FEW_DRAWS = 30
"""ESS below which weights do not show their own tail."""

CAP = 300.0
"""Nats; more than this is "nothing was found", and ``exp`` would overflow."""


def cost_of(rows: float = 0.0, calls: float = 0.0, seconds: float = 0.0) -> Tensor:
    """Return network rows, potential calls and wall time as an array, float64 ``(3,)``."""
    return torch.tensor([rows, calls, seconds], dtype=torch.float64)


def within(cost: Tensor, limit: Tensor) -> bool:
    """Return whether no part of a cost exceeds its limit."""
    return bool((cost <= limit).all())


def evidence_error(variance: float, size: float) -> float:
    """Return the root mean square error of a log-evidence by the log-normal law above.

    :param variance: relative variance ``C`` of a particle.
    :param size: particles of all runs.
    """
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
        seconds = time.perf_counter() - self.started
        if self.bound is None:
            return cost_of(seconds=seconds)
        return cost_of(self.bound.num_evaluations, self.method.num_calls(self.bound), seconds)

    def _watch(self, done: int, total: int) -> None:
        spent = self.spent
        # Sharing may save half of what is to come; what would still be too dear stops at once.
        hopeless = not within(spent * total / done, 2 * self.limit)
        if done < total and (hopeless or not within(spent, self.limit)):
            raise TooDear


@dataclass(eq=False)
class Candidate:
    """A method with its pilots.

    :param name: how reports call it.
    :param method: the method.
    :param status: what became of it, in a few words.
    :param pilots: results of its pilots, smallest first.
    :param each: what a particle costs; None if not known.
    :param stopped: whether larger pilots are out of the question.
    """

    name: str
    method: Method
    status: str = "not tried"
    pilots: list[ParticlePosterior] = field(default_factory=list)
    each: Tensor | None = None
    stopped: bool = False

    def pilot(
        self, target: tuple[Any, ...], size: int, limit: Tensor, seed: int, **options: Any
    ) -> Tensor:
        """Run a pilot and return what it cost; if nothing comes of it, ``status`` says why.

        :param target: target, potential, arguments, and keyword arguments.
        :param size: particles per run.
        :param limit: what it may cost.
        :param seed: its seed.
        :param options: of the runner.
        :raises PotentialError: if a potential raises, or is no number.
        """
        options |= {"num_particles": size, "num_runs": RUNS, "method": self.method}
        runner = Watched(*target[:2], limit=limit, **options)
        try:
            self.pilots.append(runner.run(*target[2], seed=seed, **target[3]))
            self.status, self.each = "tried", runner.spent / (RUNS * size)
        except PotentialError:
            raise
        except (TooDear, CapabilityError, ParticleCollapse, ValueError) as error:
            self.stopped = True
            why = "no pilot: too dear" if isinstance(error, TooDear) else f"refused: {error}"
            self.status = self.status if self.pilots else why
        return runner.spent

    @property
    def last(self) -> ParticlePosterior:
        """The largest pilot."""
        return self.pilots[-1]

    @property
    def size(self) -> int:
        """Particles of all runs of the largest pilot."""
        return self.last.log_weights.numel()

    @property
    def independent(self) -> bool:
        """Whether particles never met."""
        return not bool(self.last.resampled.any())

    @property
    def ess(self) -> float:
        """ESS at the end over all particles, each run weighted by its evidence."""
        return pooled_ess(self.last)

    @property
    def shown(self) -> dict[str, Any]:
        """What the largest pilot showed, as reports have it."""
        last, alive = self.last, self.last.alive
        trace = (last.ess[alive] / last.num_particles).sum(0) / alive.sum().clamp_min(1)
        return {
            "pilot_particles": self.size,
            "ess": self.ess,
            "ess_trace": tuple(trace.tolist()),
            "log_evidence": last.pooled_log_evidence,
            "log_evidence_error": evidence_error(self.seen, self.size),
        }

    @property
    def seen(self) -> float:
        """Relative variance ``C`` of a particle as the pilots themselves show it."""
        if not bool(self.last.alive.any()):
            return math.inf
        if self.independent:
            return _draw_variance(self.last)
        recent = self.pilots[-RECENT:]
        runs = sum(p.num_particles * _run_variance(p) for p in recent) / len(recent)
        # Few runs may agree by chance; their own weights then give a lower bound.
        return max(runs, _step_variance(self.last))

    @property
    def evidence_range(self) -> tuple[float, float]:
        """Between what the log-evidence very likely lies, if runs show their own spread."""
        if math.isinf(self.seen):
            return -math.inf, -math.inf
        three = 3 * evidence_error(self.seen, self.size)
        found = self.last.pooled_log_evidence
        # An unbiased estimate exceeds the truth 100 times once in 100 runs at most (Markov).
        return found - min(three, math.log(100)), found + three

    def variance(self, floor: float) -> float:
        """Return ``C``, at least so large that the law explains what it missed.

        :param floor: lower bound of the log-evidence from all methods.
        """
        if math.isinf(self.seen):
            return math.inf
        short = min(max(floor - self.evidence_range[1], 0.0), CAP)
        return max(self.seen, self.size * math.expm1(2 * short))


def pooled_ess(posterior: ParticlePosterior) -> float:
    """Return ESS over the particles of all runs, which are weighted by their evidence."""
    if not bool(posterior.alive.any()):
        return 0.0
    weights = posterior.pooled_log_weights.exp()
    return min(1.0, 1 / float(weights.square().sum() * weights.numel()))


def _draw_variance(posterior: ParticlePosterior) -> float:
    """Return ``n / ESS - 1`` of independent draws, or more where they are too few to show it."""
    log_weights, ess = posterior.pooled_log_weights.flatten(), pooled_ess(posterior)
    if ess * len(log_weights) >= FEW_DRAWS:
        return 1 / ess - 1
    # Few draws miss the tail: they are taken to be log-normal, with the spread of the upper half,
    # because no draw below the median matters.
    finite = log_weights[log_weights > -math.inf]
    above = 2 * float((finite - finite.median()).clamp_min(0).square().mean())
    return max(1 / ess, math.exp(min(above, CAP)) * len(log_weights) / len(finite)) - 1


def _run_variance(posterior: ParticlePosterior) -> float:
    """Return the relative variance of one run's evidence, as runs show it."""
    if not bool(posterior.alive.any()):
        return 0.0  # a smaller pilot found nothing, which says nothing about the largest
    if bool(posterior.alive.all()):
        return math.expm1(min(float(posterior.log_evidence.var()), CAP))
    return float((posterior.log_evidence - posterior.pooled_log_evidence).exp().var())


def _step_variance(posterior: ParticlePosterior) -> float:
    """Return the sum of ``N / ESS - 1`` where weights are used up: when resampled, and at the end.

    If particles forgot their past at every resampling this would be the variance of the evidence.
    """
    ends = posterior.resampled.clone()
    ends[:, -1] = True
    ends, ess = ends[posterior.alive], posterior.ess[posterior.alive]
    terms = torch.where(ends, posterior.num_particles / ess - 1, 0.0)
    return max(0.0, float(terms.sum(-1).mean()))
