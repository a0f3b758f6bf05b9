"""What the steps of paths cost under a network, estimated on held-out sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.models.latent_bound import ROWS
from ppl_diffusion.models.latent_costs import (
    LatentModel,
    Noise,
    hidden_costs,
    level_masses,
    noised_pair,
    prior_cost,
)
from ppl_diffusion.models.path_search import PathCosts
from ppl_diffusion.processes.base import whole_number
from ppl_diffusion.processes.gaussian import Gaussian


@torch.no_grad()
def estimate_costs(
    model: LatentModel,
    sequences: Tensor,
    *,
    grid: tuple[int, int],
    num_draws: int = 1,
    generator: torch.Generator | None = None,
) -> PathCosts:
    """Estimate the costs of steps from every point of a grid of equal intervals.

    The noise of a sequence is the same at all points (a token that is hidden at a level is hidden
    at all higher ones), so that differences between points are less noisy than the costs are.

    :param sequences: held-out clean tokens, int64 ``(n, L)``; the network reads
        ``(I + 1) (J + 1) num_draws`` rows of each.
    :param grid: ``I`` and ``J``, numbers of intervals of token levels and of latent levels.
    :param num_draws: draws of noise, and of drawn codes, per sequence.
    """
    axes = [np.linspace(0.0, 1.0, whole_number(n, "path_costs: grid") + 1) for n in grid]
    tables = np.zeros((2, len(axes[0]), len(axes[1])))
    encoding = model.encoding(sequences)
    rows = torch.arange(len(sequences), device=sequences.device).repeat(num_draws)
    latent = encoding.draw(rows, generator)
    noise = Noise.draw(sequences[rows], latent, generator)
    for i, j in np.ndindex(tables.shape[1:]):
        point = (float(axes[0][i]), float(axes[1][j]))
        tables[:, i, j] = _costs_at(model, sequences[rows], latent, noise, point)
    levels = [torch.tensor(axis) for axis in axes]
    masses = [level_masses(model.process, levels[0]), level_masses(model.latent_process, levels[1])]
    hidden = [1.0 - masses[0].numpy()[:, None], _hidden(model, masses[1].numpy())]
    constant = encoding.cost + prior_cost(model, encoding.point)
    tokens, codes = (
        np.divide(table, share, out=np.zeros_like(table), where=share > 0)
        for table, share in zip(tables, hidden, strict=True)
    )
    return PathCosts(
        axes[0],
        axes[1],
        tokens,
        codes,
        masses[0].numpy(),
        masses[1].numpy(),
        float(constant.mean()),
    )


def _costs_at(
    model: LatentModel, x0: Tensor, latent: Tensor, noise: Noise, point: tuple[float, float]
) -> np.ndarray:
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(x0), ROWS):
        part = slice(start, start + ROWS)
        rows, clean = x0[part], latent[part]
        levels = torch.tensor(point, dtype=torch.float64, device=x0.device).expand(len(rows), 2)
        here = (levels[:, 0], levels[:, 1])
        states = noised_pair(
            model, rows, clean, here, Noise(noise.tokens[part], noise.latent[part])
        )
        cost = hidden_costs(model, rows, clean, states, here)
        total += torch.stack([c.sum() for c in cost]).cpu()
    return (total / len(x0)).numpy()


def _hidden(model: LatentModel, masses: np.ndarray) -> np.ndarray:
    """Return by what the cost of a hidden latent is divided: an error is per unit already."""
    if isinstance(model.latent_process, Gaussian):
        return np.ones((1, len(masses)))
    return 1.0 - masses[None, :]
