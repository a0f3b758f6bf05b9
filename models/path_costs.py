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
    encoding = model.encoding(sequences)
    rows = torch.arange(len(sequences), device=sequences.device).repeat(num_draws)
    latent = encoding.draw(rows, generator)
    noise = Noise.draw(sequences[rows], latent, generator)
    tables = np.zeros((2, len(axes[0]), len(axes[1])))
    for i, j in np.ndindex(tables.shape[1:]):
        point = (float(axes[0][i]), float(axes[1][j]))
        tables[:, i, j] = _costs_at(model, sequences[rows], latent, noise, point)
    masses = [
        level_masses(process, torch.tensor(axis)).numpy()
        for process, axis in zip((model.process, model.latent_process), axes, strict=True)
    ]
    constant = encoding.cost + prior_cost(model, encoding.point)
    return PathCosts(
        token_levels=axes[0],
        latent_levels=axes[1],
        tokens=tables[0],
        latent=tables[1],
        token_mass=masses[0],
        latent_mass=masses[1],
        constant=float(constant.mean()),
    )


def _costs_at(
    model: LatentModel, x0: Tensor, latent: Tensor, noise: Noise, point: tuple[float, float]
) -> np.ndarray:
    """Return the costs per unit of mass at a point, of tokens and of the latent, ``(2,)``.

    What is hidden is divided by how much *was* hidden, times the number of positions, not by how
    much is on average: the two vary together.
    """
    cost, hidden = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
    for start in range(0, len(x0), ROWS):
        part = slice(start, start + ROWS)
        rows, clean = x0[part], latent[part]
        levels = torch.tensor(point, dtype=torch.float64, device=x0.device).expand(len(rows), 2)
        here, drawn = (levels[:, 0], levels[:, 1]), Noise(noise.tokens[part], noise.latent[part])
        states = noised_pair(model, rows, clean, here, drawn)
        paid = hidden_costs(model, rows, clean, states, here)
        cost += torch.stack([each.sum() for each in paid]).cpu()
        hidden += torch.tensor(_shares_hidden(model, states), dtype=torch.float64)
    return (cost / hidden.clamp_min(1e-300)).numpy()


def _shares_hidden(model: LatentModel, states: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the hidden share of tokens and codes, summed over rows; all of a continuous latent."""
    (z, y), process = states, model.latent_process
    tokens = float((z == model.process.vocab_size).double().mean(1).sum())
    if isinstance(process, Gaussian):
        return tokens, float(len(y))
    return tokens, float((y == process.vocab_size).double().mean(1).sum())
