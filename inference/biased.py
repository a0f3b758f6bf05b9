"""Results of methods that sample no declared law: no weight, evidence or exactness they lack."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.sources import State
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler


def reweighted(posterior: ParticlePosterior, log_weights: Tensor, why: str) -> ParticlePosterior:
    """Return a result with weights that are exact for nothing, and no evidence."""
    nothing = torch.where(posterior.alive, torch.nan, -torch.inf).to(torch.float64)
    return replace(
        posterior,
        log_weights=log_weights,
        log_evidence=nothing,
        log_evidence_steps=nothing[:, None].expand_as(posterior.log_evidence_steps).clone(),
        evidence_variance=torch.full_like(posterior.evidence_variance, torch.nan),
        law=posterior.law.but(exact=False, why=why, has_evidence=False),
    )


def best_only(posterior: ParticlePosterior, keep: int, why: str) -> ParticlePosterior:
    """Return a result whose weight lies, equally, on the best particles of each run."""
    log_g = torch.where(posterior.log_weights == -torch.inf, -torch.inf, posterior.log_potential)
    best, index = log_g.topk(min(keep, log_g.shape[1]), -1)
    kept = (best > -torch.inf).sum(-1, keepdim=True).clamp_min(1)
    level = torch.where(best > -torch.inf, -kept.to(torch.float64).log(), -torch.inf)
    weights = torch.full_like(log_g, -torch.inf).scatter(-1, index, level)
    return reweighted(posterior, weights, why)


def equal_weights(posterior: ParticlePosterior, why: str) -> ParticlePosterior:
    """Return a result whose particles count alike, but for those the potential forbids."""
    return best_only(posterior, posterior.num_particles, why)


def unpaid(run: Bound, state: State) -> Tensor:
    """Return weights of particles that nothing paid for, ``(R, N)``: only ``-inf`` counts."""
    log_g: Tensor = state["log_g"]
    return torch.where(log_g == -torch.inf, log_g, 0.0)


@dataclass(frozen=True)
class Unpaid(Method):
    """A method whose moves have no weight: its particles count alike, and it has no evidence."""

    exact: ClassVar[bool] = False
    ess_threshold: ClassVar[float] = 0.0

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Particles that nothing weighs are never resampled."""
        return resampler, 0.0

    def pay(self, run: Bound, state: State) -> Tensor:
        """Return zeros, but for what the target forbids."""
        return unpaid(run, state)

    @abstractmethod
    def why(self, run: Bound) -> str:
        """Return why the particles have no declared law."""

    def law(self, run: Bound) -> Law:
        """Return the law that is aimed at, and why it is missed."""
        return run.source.law.but(exact=False, why=self.why(run), has_evidence=False)

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Return particles that count alike."""
        return equal_weights(posterior, posterior.law.why)
