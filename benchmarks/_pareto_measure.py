"""What a run costs and what its designs are worth, how budgets are met, who dominates whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from benchmarks._pareto_methods import Lab, Setting
from benchmarks._references import letter_entropy
from ppl_diffusion.designs.judging import standard_error
from ppl_diffusion.smc import ParticlePosterior

NUM_DESIGNS = 32
"""Weighted draws by which a run is judged."""
BOUND_SAMPLES = 8
TOLERANCE = 0.05
MAX_PILOTS = 4


@dataclass(frozen=True)
class Outcome:
    """One run.

    :param evaluations: network rows.
    :param potential_calls: distinct sequences the oracle was asked about.
    :param judged: mean expression by the judge.
    :param reward: mean expression by the oracle that designed, capped as in the reward.
    :param bound: mean lower bound on the prior's log-probability, nats.
    :param distinct: share of different sequences.
    :param hamming: mean number of positions in which two designs differ.
    :param entropy: mean entropy of a design's letters, nats.
    :param eves: designs' different ancestors in the initial population.
    :param ess: effective sample size of the weights.
    :param exact: whether the weights are exact for a declared law.
    """

    evaluations: float
    potential_calls: float
    judged: float
    reward: float
    bound: float
    distinct: float
    hamming: float
    entropy: float
    eves: float
    ess: float
    exact: bool

    def spent(self, kind: str) -> float:
        """Return what the run spent of a budget.

        :param kind: ``"evaluations"`` or ``"calls"``.
        """
        return self.potential_calls if kind == "calls" else self.evaluations


def run_setting(lab: Lab, setting: Setting, size: int, seed: int) -> Outcome:
    """Run a setting once.

    :param lab: prior and oracles.
    :param setting: the setting.
    :param size: particles.
    :param seed: seed of the run; settings share them.
    """
    reward = lab.reward(setting.temperature)
    posterior = setting.build(lab, reward, size).run(seed=seed)
    calls = reward.num_calls  # a repeated question costs nothing, and judging comes later
    return judge_run(lab, posterior, calls, seed)


def judge_run(lab: Lab, posterior: ParticlePosterior, calls: int, seed: int) -> Outcome:
    """Judge a single run by its weighted draws.

    :param lab: prior and oracles.
    :param posterior: one run of particles.
    :param calls: what it asked the oracle.
    :param seed: seed of draws and of the bound, other than the run's own.
    """
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    drawn = posterior.resample(NUM_DESIGNS, generator=generator)
    tokens, inverse = torch.unique(drawn["x0"], dim=0, return_inverse=True)
    bound = lab.chain.marginal().log_prob_bound(
        tokens, num_samples=BOUND_SAMPLES, generator=generator
    )
    entropies = torch.tensor([letter_entropy(text) for text in lab.prior.decode(tokens)])
    return Outcome(
        evaluations=posterior.num_evaluations,
        potential_calls=calls,
        judged=float(lab.judge(tokens)[inverse].mean()),
        reward=float(lab.reward(1.0)(tokens)[inverse].mean()),
        bound=float(bound[inverse].mean()),
        distinct=len(tokens) / NUM_DESIGNS,
        hamming=mean_hamming(drawn["x0"]),
        entropy=float(entropies[inverse].mean()),
        eves=len(posterior.eve.flatten()[drawn["index"]].unique()),
        ess=1 / float(posterior.weights.square().sum()),
        exact=posterior.exact,
    )


def mean_hamming(tokens: Tensor) -> float:
    """Return the mean Hamming distance between two different draws, which may be equal sequences.

    :param tokens: int64 ``(n, L)``.
    """
    count = len(tokens)
    total = (tokens[:, None] != tokens).sum()
    return float(total) / (count * (count - 1))


def fit_size(cost: Callable[[int], float], budget: float, *, start: int = 1, unit: int = 1) -> int:
    """Return the number of particles whose cost is nearest to the budget.

    Costs are close to proportional, so a few pilot runs do. Where a single unit costs more than
    the budget the answer is one unit.

    :param cost: ``number of particles -> cost``.
    :param budget: what is to be spent.
    :param start: first guess.
    :param unit: the number of particles is a multiple of this.
    """
    tried: dict[int, float] = {}
    size = _multiple(start, unit)
    while size not in tried and len(tried) < MAX_PILOTS:
        tried[size] = cost(size)
        if abs(tried[size] / budget - 1) <= TOLERANCE:
            break
        size = _multiple(size * budget / tried[size], unit)
    return min(tried, key=lambda n: abs(tried[n] - budget))


def _multiple(size: float, unit: int) -> int:
    return max(round(size / unit), 1) * unit


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return means over runs, and the standard errors of those that are measured.

    :param outcomes: independent runs.
    """
    names = [f.name for f in fields(Outcome) if f.name != "exact"]
    columns = {name: torch.tensor([float(getattr(o, name)) for o in outcomes]) for name in names}
    found: dict[str, Any] = {name: float(column.mean()) for name, column in columns.items()}
    for name in ("judged", "reward", "bound", "hamming"):
        found[f"{name}_se"] = standard_error(columns[name])
    return {**found, "exact": outcomes[0].exact}


def non_dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Return which points no other one beats: as good in everything and better in something.

    :param points: coordinates, the larger the better.
    """
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(other: Sequence[float], point: Sequence[float]) -> bool:
    pairs = list(zip(other, point, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
