"""What the bound of a latent and its tokens is made of, row by row, in continuous time.

Levels are drawn, tokens and latent noised, and what the denoiser predicts is weighted as the bound
of :mod:`ppl_diffusion.processes.nelbo` weighs it, tokens and codes alike. A continuous latent pays
``-g'(u) / 2`` for a squared error, ``g`` its signal-to-noise ratio.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.latent_transformer import LatentTransformer
from ppl_diffusion.processes import nelbo_terms
from ppl_diffusion.processes.noise import uniforms


class Encoded(NamedTuple):
    """The clean latent of a batch.

    :param vectors: float32 ``(n, N, d)``, what the denoiser reads; gradients may reach the encoder.
    :param codes: int64 ``(n, N)``, or None where the latent is continuous.
    """

    vectors: Tensor
    codes: Tensor | None


@torch.no_grad()
def encoded(network: LatentTransformer, rows: Tensor) -> Encoded:
    """Return the latent of clean rows, int64 ``(n, L)``, as the network encodes them."""
    latent = network.encode(rows)
    return Encoded(network.vectors(latent), latent if network.latent.num_codes else None)


def hidden_tokens(
    program: Any, rows: Tensor, level: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Return noised tokens, int64 ``(n, L)``.

    :param level: one per row, float64 ``(n,)``.
    """
    process, u = (
        program.process,
        uniforms((2, *rows.shape), generator=generator, device=rows.device),
    )
    noised: Tensor = process.corrupt(rows, process.schedule.alpha(level)[:, None], u[0], u[1])
    return noised


def noised_latent(
    program: Any,
    clean: Encoded,
    level: Tensor,
    withheld: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the noisy latent, and the vectors that the denoiser reads of it.

    :param level: one per row, float64 ``(n,)``.
    :param withheld: bool ``(n,)``, rows of noise alone, as a chain is started. At level 1 the
        forward process of a continuous latent leaves a little signal.
    """
    process, device = program.latent_process, clean.vectors.device
    if clean.codes is not None:
        u = uniforms((2, *clean.codes.shape), generator=generator, device=device)
        alpha = process.schedule.alpha(level)[:, None]
        codes = process.corrupt(clean.codes, alpha, u[0], u[1])
        hole = (codes == program.denoiser.latent.num_codes)[..., None]
        return codes, torch.where(hole, program.denoiser.hole, clean.vectors)
    eps = torch.randn(clean.vectors.shape, generator=generator, device=device)
    latent = process.corrupt(clean.vectors, level, eps)
    if withheld is not None:
        latent = torch.where(withheld[:, None, None], eps, latent)
    return latent, latent


def token_terms(
    program: Any, rows: Tensor, noised: Tensor, log_probs: Tensor, level: Tensor
) -> Tensor:
    """Return what hidden tokens pay, float64 ``(n,)``.

    :param log_probs: ``(n, L, V)``.
    """
    each: Tensor = nelbo_terms(program.process, rows, noised, log_probs, level[:, None])
    return each.sum(-1)


def latent_terms(
    program: Any,
    clean: Encoded,
    latent: Tensor,
    predicted: Tensor,
    level: Tensor,
    cap: float = math.inf,
) -> Tensor:
    """Return what the latent pays, float64 ``(n,)``; no gradient flows into the clean one.

    Otherwise an encoder could make its latent easy to predict, by saying nothing.

    :param predicted: log-probabilities of codes ``(n, N, K)``, or the clean latent ``(n, N, d)``.
    :param cap: largest weight of a squared error.
    """
    process = program.latent_process
    if clean.codes is not None:
        each: Tensor = nelbo_terms(process, clean.codes, latent, predicted, level[:, None])
        return each.sum(-1)
    error = (predicted - clean.vectors.detach()).double().square().sum((-2, -1))
    return squared_error_weight(process, level).clamp(max=cap) * error


def squared_error_weight(process: Any, level: Tensor) -> Tensor:
    """Return ``-g'(u) / 2``, what a squared error costs per unit of level.

    :param process: a Gaussian process, with ``snr``.
    :param level: levels ``u``, float64 ``(n,)``.
    """
    with torch.enable_grad():
        u = level.detach().requires_grad_()
        slope: Tensor = torch.autograd.grad(process.snr(u).sum(), u)[0]
    return -0.5 * slope
