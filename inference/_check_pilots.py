"""Pilot runs: what they show, and how costs and errors are carried over to a larger run.

Costs grow more slowly than the number of particles, since equal rows are paid once; the growth seen
between pilots of several sizes is continued. Errors are continued by a log-normal law: if the
evidence estimate of ``n`` particles has the relative variance ``C / n`` and is about log-normal,
then ``var log Z_hat = log(1 + C / n) = v`` and ``E log Z_hat = log Z - v / 2``. On hard problems
this is much closer to what happens than ``v`` falling as ``1 / n``; it is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppl_diffusion.inference._check_meters import Cost
from ppl_diffusion.smc.posterior import ParticlePosterior

MAX_SHORTFALL = 300.0
"""Nats; beyond it a shortfall says "nothing was found" and ``exp`` would overflow."""

SURE = 3.0
"""Standard errors of the log-evidence; few runs show their own spread badly."""

ENOUGH_DRAWS = 30
"""ESS below which weights of independent draws say too little about their own tail."""

RECENT = 3
"""Pilots that the variance is read from: the largest ones."""

SHARED_STATES, SHARED_PARENTS = (0.8, 0.95), (0.5, 0.85)
"""Growth exponents between which sharing is continued in part: of draws, of resampled particles."""

NEARLY_LINEAR = 0.9
"""Growth exponent above which costs are said to grow in proportion."""


@dataclass(frozen=True)
class Pilot:
    """What one pilot run showed.

    :param num_particles: particles per run.
    :param log_evidence: of each run, float64 ``(R,)``.
    :param draw_variance: relative variance of the weight of one particle, over all runs.
    :param step_variance: the same, summed over the stretches between resampling, mean over runs.
    :param ess: ESS over number of particles after each step, mean over living runs, ``(T,)``.
    :param mean_log_potential: weighted mean of ``log G``; NaN if every run died.
    :param log_potential: ``log G`` of every particle, float64 ``(R * N,)``.
    :param cost: what it cost.
    :param busy: seconds of it that network and potential took; grows with the size.
    """

    num_particles: int
    log_evidence: Tensor
    draw_variance: float
    step_variance: float
    ess: tuple[float, ...]
    mean_log_potential: float
    log_potential: Tensor
    cost: Cost
    busy: float

    @classmethod
    def of(cls, posterior: ParticlePosterior, busy: float) -> Pilot:
        """Read a result.

        :param posterior: the result of a pilot run.
        :param busy: seconds of it that network and potential took.
        """
        alive = posterior.alive
        trace = posterior.ess[alive].mean(0) / posterior.num_particles
        return cls(
            num_particles=posterior.num_particles,
            log_evidence=posterior.log_evidence,
            draw_variance=_draw_variance(posterior),
            step_variance=_step_variance(posterior),
            ess=tuple(trace.tolist()) if bool(alive.any()) else (0.0,) * posterior.num_steps,
            mean_log_potential=_mean_log_potential(posterior),
            log_potential=posterior.log_potential.flatten(),
            cost=Cost(posterior.num_evaluations, posterior.num_potential_calls, posterior.seconds),
            busy=busy,
        )

    @property
    def num_runs(self) -> int:
        """Runs of the pilot."""
        return len(self.log_evidence)

    @property
    def size(self) -> int:
        """Particles of all runs."""
        return self.num_runs * self.num_particles

    @property
    def pooled(self) -> float:
        """Log of the mean evidence."""
        return float(torch.logsumexp(self.log_evidence, 0)) - math.log(self.num_runs)

    @property
    def dead(self) -> bool:
        """Whether no particle of any run survived."""
        return self.pooled == -math.inf

    @property
    def ess_fraction(self) -> float:
        """ESS over the particles of all runs, which are weighted by their evidence."""
        return 1 / (1 + self.draw_variance)

    @property
    def weight_variance(self) -> float:
        """Relative variance of the weight of an independent draw.

        Few draws miss the tail of their weights; then these are taken to be log-normal, too, with
        the spread of those above the median, since those below it do not matter.
        """
        finite = self.log_potential[self.log_potential > -math.inf]
        if self.size * self.ess_fraction >= ENOUGH_DRAWS or len(finite) < 2:
            return self.draw_variance
        above = 2 * float((finite - finite.median()).clamp_min(0).square().mean())
        spread = math.exp(min(above, MAX_SHORTFALL))
        return max(self.draw_variance, spread * self.size / len(finite) - 1)

    def surely_even(self, share: float) -> bool:
        """Return whether weights of independent draws are known to be so even.

        :param share: their ESS over their number.
        """
        even = self.ess_fraction >= share
        if self.size * self.ess_fraction >= ENOUGH_DRAWS or not even:
            return even
        spread = float(self.log_potential.var())  # infinite or NaN if a draw has G = 0
        return spread <= -math.log(share)

    @property
    def run_variance(self) -> float:
        """Relative variance of one run's evidence, as its spread over runs shows it."""
        if self.dead or self.num_runs < 2:
            return math.inf
        if bool((self.log_evidence > -math.inf).all()):
            return math.expm1(min(float(self.log_evidence.var()), MAX_SHORTFALL))
        return float((self.log_evidence - self.pooled).exp().var())


def _draw_variance(posterior: ParticlePosterior) -> float:
    """Return ``n / ESS - 1`` of all particles, every run weighted by its evidence."""
    if not bool(posterior.alive.any()):
        return math.inf
    squares = float(posterior.pooled_log_weights.exp().square().sum())
    return max(0.0, squares * posterior.log_weights.numel() - 1)


def _step_variance(posterior: ParticlePosterior) -> float:
    """Return the sum of ``N / ESS - 1`` where weights are used up: when resampled, and at the end.

    If particles forgot their past at every resampling this would be the variance of the evidence.
    """
    ends = posterior.resampled.clone()
    ends[:, -1] = True
    ends, ess = ends[posterior.alive], posterior.ess[posterior.alive]
    terms = torch.where(ends, posterior.num_particles / ess - 1, 0.0)
    return max(0.0, float(terms.sum(-1).mean())) if len(terms) else math.inf


def _mean_log_potential(posterior: ParticlePosterior) -> float:
    if not bool(posterior.alive.any()):
        return math.nan
    weights = posterior.pooled_log_weights.exp()
    return float(torch.where(weights > 0, weights * posterior.log_potential, 0.0).sum())


@dataclass
class Record:
    """The pilots of one program, smallest first.

    :param independent: whether particles never meet, so that single weights show the variance.
    """

    independent: bool
    pilots: list[Pilot] = field(default_factory=list)

    @property
    def last(self) -> Pilot:
        """The largest pilot."""
        return self.pilots[-1]

    @property
    def spent(self) -> Cost:
        """What all pilots cost."""
        return sum((pilot.cost for pilot in self.pilots), Cost())

    @property
    def num_spare_runs(self) -> int:
        """Degrees of freedom of the variance between runs."""
        return sum(pilot.num_runs - 1 for pilot in self.pilots[-RECENT:])

    @property
    def variance_seen(self) -> float:
        """Relative variance of the evidence times the number of particles, as pilots show it.

        Few runs may agree by chance; their own weights then give a lower bound.
        """
        if self.independent:
            return self.last.weight_variance
        parts = [(p.num_runs - 1, p.num_particles * p.run_variance) for p in self.pilots[-RECENT:]]
        between_runs = sum(d * c for d, c in parts) / max(self.num_spare_runs, 1)
        return max(between_runs, self.last.step_variance)

    @property
    def evidence_range(self) -> tuple[float, float]:
        """Between what the log-evidence very likely lies, if the runs show their own spread."""
        last = self.last
        if last.dead:
            return -math.inf, -math.inf
        error = math.sqrt(math.log1p(self.variance_seen / last.size))
        # An unbiased estimate exceeds the truth 100 times once in 100 runs at most (Markov).
        return last.pooled - min(SURE * error, math.log(100)), last.pooled + SURE * error

    def variance(self, evidence_floor: float, divergence: float | None) -> float:
        """Return ``C``: the relative variance of the evidence times the number of particles.

        A log-normal estimate falls short of the truth by half its variance. One that falls further
        short of what another program has found has a variance that its own runs do not show.
        Plain weighing needs ``exp`` of the divergence many draws (Chatterjee and Diaconis 2018,
        arXiv:1511.01437), and ``exp`` of twice that if its weights are log-normal.

        :param evidence_floor: lower bound of the log-evidence from all programs.
        :param divergence: relative entropy from the chain to the target, None if not known.
        """
        if self.last.dead:
            return math.inf
        short = min(max(evidence_floor - self.evidence_range[1], 0.0), MAX_SHORTFALL)
        missed = self.last.size * math.expm1(2 * short)
        if not self.independent or divergence is None:
            return max(self.variance_seen, missed)
        tail = min(self.variance_seen, math.expm1(2 * divergence))
        return max(self.last.draw_variance, math.expm1(divergence), tail, missed)

    @property
    def scales(self) -> bool:
        """Whether costs were seen to grow about in proportion to the particles."""
        first, last = self.pilots[0], self.last
        if len(self.pilots) < 2:
            return False
        growth = last.size / first.size
        costs = ((p.cost.rows, p.cost.calls) for p in (first, last))
        return all(high >= low * growth**NEARLY_LINEAR for low, high in zip(*costs, strict=True))

    def cost(self, size: float) -> Cost:
        """Return the cost of a run of so many particles.

        :param size: particles of all runs.
        """
        believed = SHARED_STATES if self.independent else SHARED_PARENTS
        rows = [(pilot.size, pilot.cost.rows) for pilot in self.pilots]
        calls = [(pilot.size, pilot.cost.calls) for pilot in self.pilots]
        return Cost(
            grown(rows, size, believed=believed),
            # Different states have the same guess, at any number of particles.
            grown(calls, size, believed=believed, least_trust=0.0 if self.independent else 0.5),
            self._seconds(size),
        )

    def _seconds(self, size: float) -> float:
        """Continue the time along the line through the last two pilots.

        Its slope is at most the time that network and potential took per particle.
        """
        last = self.last
        slope = last.busy / last.size
        if len(self.pilots) > 1:
            before = self.pilots[-2]
            seen = (last.cost.seconds - before.cost.seconds) / (last.size - before.size)
            slope = min(max(seen, slope / 4), slope)
        return max(last.cost.seconds + slope * (size - last.size), 0.0)


def grown(
    points: Sequence[tuple[int, float]],
    size: float,
    *,
    believed: tuple[float, float] = SHARED_STATES,
    least_trust: float = 0.0,
) -> float:
    """Continue a cost that grows with the number of particles, never faster than in proportion.

    Particles share what they ask: at first little, then ever more. For independent draws the law is
    ``c(n) = A n / (1 + sqrt(n / n_0))**2``, through the first and the last point: in proportion far
    below ``n_0`` and hardly beyond. It describes states of very different probability; for equally
    likely ones it is too large, which errs on the side of the budget. Particles that were resampled
    also share because there are few of them, which larger runs do not repeat: as long as the growth
    is not far from proportional it is continued in proportion.

    :param points: sizes and costs, ascending.
    :param size: where the cost is wanted.
    :param believed: growth exponents below which sharing is all continued, above which not at all.
    :param least_trust: power of the law's sharing that is continued in any case.
    """
    (first, low), (last, high) = points[0], points[-1]
    proportional = high * size / last
    if low <= 0 or high <= 0 or last == first:
        return proportional
    share = min(1.0, high * first / (low * last))
    if len(points) == 2:
        share = math.sqrt(share)  # two noisy points: half of the sharing may be chance
    low, high = believed
    exponent = 1 + math.log(share) / math.log(last / first)
    trust = min(1.0, max(least_trust, (high - exponent) / (high - low)))
    return proportional * _shared(first, last, share, size) ** trust


def _shared(first: float, last: float, share: float, size: float) -> float:
    """Return ``c(n) / n`` over that of the last point, if it fell by ``share`` since the first."""
    root = math.sqrt(share)
    room = root * math.sqrt(last) - math.sqrt(first)
    if room <= 0:  # no growth at all
        return last / size
    u = (1 - root) / room  # 1 / sqrt(n_0)
    return ((1 + u * math.sqrt(last)) / (1 + u * math.sqrt(size))) ** 2


def evidence_error(variance: float, size: float) -> float:
    """Return the root mean square error of the pooled log-evidence under the log-normal law.

    :param variance: ``C``, see :meth:`Record.variance`.
    :param size: particles of all runs.
    """
    if size <= 0 or not math.isfinite(variance):
        return math.inf
    v = math.log1p(variance / size)
    return math.sqrt(v + v * v / 4)
