"""Results of methods that sample no declared law: no weight, evidence or exactness they lack."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ppl_diffusion.smc.posterior import ParticlePosterior


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
