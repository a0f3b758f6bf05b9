"""The three-way mixture, with the prediction asked for only where it enters."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import absorbing_weights, three_way

Levels = tuple[float, float, float | Tensor]


def sparse_log_prob(
    process: Process, z: Tensor, j: Tensor, prediction: Prediction, levels: Levels
) -> Tensor:
    """Return ``log p(j | z)`` per site.

    :param z: current states, int64 ``(*batch, L)``.
    :param j: next states, int64 ``(*batch, L)``.
    :param prediction: of the clean tokens, ``(*batch, L, V)``.
    :param levels: ``(alpha_t, alpha_s, kappa)``.
    :returns: float64 ``(*batch, L)``.
    """
    size = process.vocab_size
    where = (j < size) & (z == size) if process.absorbing else None
    ids = torch.stack([z, j], -1).clamp_max(size - 1)
    c_z, c_j = prediction.probabilities(ids, where).unbind(-1)
    stay, den, prior = _weights(process, z, c_z, levels)
    p = torch.where(j == z, stay, 0.0) + den * c_j + prior * process.prior_prob(j)
    possible = p > 0
    return torch.where(possible, torch.where(possible, p, 1.0).log(), -torch.inf)


def sparse_draw(
    process: Process,
    z: Tensor,
    prediction: Prediction,
    levels: Levels,
    u_move: Tensor,
    u_token: Tensor,
) -> Tensor:
    """Draw next states; rows are made only of the sites that draw from the denoiser.

    :param z: current states, int64 ``(*batch, L)``.
    :param prediction: of the clean tokens, ``(*batch, L, V)``.
    :param levels: ``(alpha_t, alpha_s, kappa)``.
    :param u_move: uniforms ``(*batch, L)``: which move.
    :param u_token: uniforms ``(*batch, L)``: which token.
    """
    c_z = torch.zeros_like(u_move)
    if not process.absorbing:
        c_z = prediction.probabilities(z[..., None], None)[..., 0]
    stay, den, prior = _weights(process, z, c_z, levels)
    from_prior = u_move < prior
    stays = (u_move >= prior + den) & (stay > 0)
    kept = torch.where(from_prior, process.draw_prior(u_token), z)
    return prediction.draw(u_token, ~(stays | from_prior), kept)


def _weights(
    process: Process, z: Tensor, c_z: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    if process.absorbing:
        return absorbing_weights(process, z, *levels)
    return three_way(*levels, c_z, process.prior_prob(z))
