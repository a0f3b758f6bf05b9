"""The training loss of a model of tokens and a latent: its bound in continuous time."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_diffusion.models.latent_costs import (
    LatentModel,
    Noise,
    hidden_costs,
    noised_pair,
    prior_cost,
)
from ppl_diffusion.models.latent_objective import squared_error_weight
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.processes.noise import uniforms

# Keeps the rates finite at a cost far below the noise of any loss.
_MARGIN = 1e-6


def training_loss(
    model: LatentModel,
    x0: Tensor,
    *,
    free_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the continuous-time bound of a latent that is finished first, one point per row.

    Half of the rows are at a latent level, with all tokens hidden, the other half at a token level
    beside a finished latent; levels are stratified. That trains what SEQ reads and no more.

    :param x0: clean tokens, int64 ``(n, L)``.
    :param free_share: share of the rows that are at independent levels of tokens and latent
        instead, which trains what other paths read. With such rows the loss bounds nothing.
    :returns: nats per sequence, a differentiable float64 scalar.
    :raises ValueError: if the share is none.
    """
    if not 0.0 <= free_share <= 1.0:
        raise ValueError(f"loss: free_share must lie in [0, 1], got {free_share}.")
    encoding = model.encoding(x0)
    latent = encoding.draw(torch.arange(len(x0), device=x0.device), generator)
    pairs, shares = training_levels(x0, free_share, generator)
    levels, wanted = (pairs[:, 0], pairs[:, 1]), (shares[:, 0] > 0, shares[:, 1] > 0)
    states = noised_pair(model, x0, latent, levels, Noise.draw(x0, latent, generator))
    cost = torch.stack(hidden_costs(model, x0, latent, states, levels, wanted=wanted), -1)
    rates = torch.stack(
        [_rate(model.process, levels[0]), _rate(model.latent_process, levels[1])], -1
    )
    # A level at which nothing is asked may be one where the rate is infinite.
    total = (cost * torch.where(shares > 0, shares * rates, 0.0)).sum(-1)
    return (total + encoding.cost + prior_cost(model, latent)).mean()


def training_levels(
    x0: Tensor, free_share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return levels ``(n, 2)``, and by how much the costs of tokens and latent count, ``(n, 2)``.

    A row of SEQ counts twice for one of the two, as half of the rows are there.
    """
    count, device = len(x0), x0.device
    source = device if generator is None else generator.device
    order = [torch.randperm(count, generator=generator, device=source) for _ in range(2)]
    jitter = uniforms((count, 3), generator=generator, device=device)
    place = ((torch.stack(order, -1).to(device) + jitter[:, :2]) / count).clamp(
        _MARGIN, 1 - _MARGIN
    )
    later = place[:, 0] < 0.5  # the half of the chain in which tokens are revealed
    level = (2.0 * place[:, 0] % 1.0).clamp_min(_MARGIN)
    at_tokens = torch.stack([level, torch.zeros_like(level)], -1)
    at_latent = torch.stack([torch.ones_like(level), level], -1)
    seq = torch.where(later[:, None], at_tokens, at_latent)
    twice = 2.0 * torch.stack([later, ~later], -1).to(torch.float64)
    free = (jitter[:, 2] < free_share)[:, None]
    return torch.where(free, place, seq), torch.where(free, 1.0, twice)


def _rate(process: Process | Gaussian, level: Tensor) -> Tensor:
    """Return what a unit of cost weighs per unit of level, the limit of the weights of steps."""
    if isinstance(process, Gaussian):
        return squared_error_weight(process, level)
    schedule = process.schedule
    hazard: Tensor = -schedule.alpha_prime(level) / torch.exp(schedule.log1m_alpha(level))
    return hazard
