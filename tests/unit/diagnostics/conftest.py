"""Posteriors made by hand, with the attributes that the diagnostics read."""

from dataclasses import dataclass, field, replace

import pytest
import torch


@dataclass(frozen=True)
class FakePosterior:
    x0: torch.Tensor
    log_weights: torch.Tensor
    log_evidence: torch.Tensor
    evidence_variance: torch.Tensor
    ancestors: torch.Tensor
    eve: torch.Tensor
    ess: torch.Tensor
    resampled: torch.Tensor
    log_evidence_steps: torch.Tensor
    died_at: torch.Tensor
    log_potential: torch.Tensor
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    path: torch.Tensor | None = None
    num_evaluations: int = 1200
    num_potential_calls: int = 340
    exact: bool = True
    target: str = "the posterior of a hand-made program"
    settings: dict = field(default_factory=dict)
    seconds: float = 1.5

    num_runs = property(lambda self: self.x0.shape[0])
    num_particles = property(lambda self: self.x0.shape[1])
    num_steps = property(lambda self: self.ancestors.shape[0])
    times = property(lambda self: torch.linspace(1, 0, self.num_steps + 1, dtype=torch.float64))


def lineage(ancestors):
    roots = torch.arange(ancestors.shape[-1]).expand(ancestors.shape[1:])
    for parents in ancestors:
        roots = roots.gather(-1, parents)
    return roots


def random_posterior(
    runs=3, particles=40, steps=5, length=6, vocab=4, plates=(), dead=(), path=False, seed=0
):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (runs, particles, *plates, steps + 1, length), generator=g)
    resampled = torch.rand((runs, steps), generator=g, dtype=torch.float64) < 0.5
    parents = torch.randint(particles, (steps, runs, particles), generator=g)
    identity = torch.arange(particles).expand_as(parents)
    ancestors = torch.where(resampled.T[:, :, None], parents.sort(-1).values, identity)
    log_potential = torch.randn((runs, particles), generator=g, dtype=torch.float64)
    increments = 0.3 * torch.randn((runs, steps), generator=g, dtype=torch.float64)
    died_at = torch.full((runs,), -1)
    log_weights = log_potential.log_softmax(-1)
    for run in dead:
        increments[run, steps - 2 :] = -torch.inf
        log_weights[run] = log_potential[run] = -torch.inf
        died_at[run] = steps - 2
    log_evidence_steps = increments.cumsum(-1)
    x0 = tokens[..., -1, :].contiguous()
    return FakePosterior(
        x0=x0,
        log_weights=log_weights,
        log_evidence=log_evidence_steps[:, -1],
        evidence_variance=torch.full((runs,), 0.09, dtype=torch.float64),
        ancestors=ancestors,
        eve=lineage(ancestors),
        ess=particles * torch.rand((runs, steps), generator=g, dtype=torch.float64),
        resampled=resampled,
        log_evidence_steps=log_evidence_steps,
        died_at=died_at,
        log_potential=log_potential,
        samples={"x0": x0},
        path=tokens if path else None,
        settings={"resampler": "systematic", "ess_threshold": 0.5, "seed": 7, "twist": None},
    )


@pytest.fixture
def make_posterior():
    return random_posterior


@pytest.fixture
def with_fields():
    return replace
