"""From particles of several runs to one ranked table of distinct sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.smc import ParticlePosterior


@dataclass(frozen=True)
class Designs:
    """Distinct designs, heaviest first.

    :param tokens: int64 ``(M, L)``.
    :param weight: share of the pooled posterior, float64 ``(M,)``, sums to 1.
    :param run_weight: share within each live run, float64 ``(live runs, M)``, rows sum to 1.
    :param run_share: share of each live run in the pooled posterior, ``(live runs,)``, sums to 1.
    :param copies: particles that hold the sequence, int64 ``(M,)``.
    :param run: first run that found it, int64 ``(M,)``.
    :param log_potential: log-potential in nats, float64 ``(M,)``.
    """

    tokens: Tensor
    weight: Tensor
    run_weight: Tensor
    run_share: Tensor
    copies: Tensor
    run: Tensor
    log_potential: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def rank_designs(posterior: ParticlePosterior) -> Designs:
    """Merge copies and order by pooled weight, then potential, then sequence."""
    num_runs, num_particles, length = posterior.x0.shape
    weight = posterior.pooled_log_weights.exp().flatten()
    tokens, inverse = torch.unique(posterior.x0.reshape(-1, length), dim=0, return_inverse=True)
    run = torch.arange(num_runs, device=inverse.device).repeat_interleave(num_particles)

    def merged(values: Tensor, how: str) -> Tensor:
        out = values.new_zeros(len(tokens))
        return out.scatter_reduce(0, inverse, values, how, include_self=False)

    designs = Designs(
        tokens=tokens,
        weight=merged(weight, "sum"),
        run_weight=_by_run(posterior, inverse, len(tokens)),
        run_share=posterior.pooled_log_weights[posterior.alive].exp().sum(-1),
        copies=merged(torch.ones_like(run), "sum"),
        run=merged(run, "amin"),
        log_potential=merged(posterior.log_potential.flatten(), "amax"),
    )
    return _take(designs, _order(designs))


def _by_run(posterior: ParticlePosterior, inverse: Tensor, size: int) -> Tensor:
    index = inverse.reshape(posterior.log_weights.shape)[posterior.alive]
    weights = posterior.weights[posterior.alive]
    return weights.new_zeros(len(weights), size).scatter_add(1, index, weights)


def _order(designs: Designs) -> Tensor:
    # `unique` has sorted the sequences, and stable sorts keep that order among ties.
    by_potential = torch.sort(designs.log_potential, descending=True, stable=True).indices
    weight = designs.weight[by_potential]
    order = by_potential[torch.sort(weight, descending=True, stable=True).indices]
    return order[designs.weight[order] > 0]


def _take(designs: Designs, index: Tensor) -> Designs:
    kept = vars(designs) | {"tokens": designs.tokens[index]}
    per_design = vars(designs).keys() - {"tokens", "run_share"}
    return Designs(**kept | {name: kept[name][..., index] for name in per_design})
