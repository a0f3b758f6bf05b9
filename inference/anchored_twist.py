"""A look-ahead at a measurement from the denoiser's table alone: moments of what is yet masked.

Under a table ``d`` the embeddings of a sequence have independent sites of known mean ``m_i`` and
covariance ``V_i``. Where data are ``y = A(e) + sigma n``, a Gaussian with the moments of ``A(e)``,
linearised at the mean, is integrated in closed form::

    psi(z) = N(y; A(m), sigma^2 I + sum_i J_i V_i J_i^T),        J = dA/de at m

Nothing is left to integrate once all is revealed: ``psi_T`` is the likelihood itself. In between it
is one table, one Jacobian and one ``m x m`` factorisation for each distinct state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference.anchored_guidance import distinct_states
from ppl_diffusion.inference.mean_field import jacobian_of
from ppl_diffusion.kernels.base import GIVEN, Carry, Kernel
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement


def moment_lookahead(guide: GaussianMeasurement, tokens: Tensor, log_d: Tensor) -> Tensor:
    """Return ``log psi`` of states, float64 ``(n,)``.

    :param guide: the measurement.
    :param tokens: int64 ``(n, L)``, the mask has id ``V``.
    :param log_d: the denoiser's table at each of them, ``(n, L, V)``.
    """
    mean, cov = moments(guide.codebook, tokens, log_d)
    residual, jacobian = linearised(guide, mean)
    return gaussian(residual.double(), jacobian.double(), cov.double(), guide.sigma)


def carried_lookahead(
    guide: EmbeddedPotential,
    kernel: Kernel,
    carry: Carry,
    k: int,
    clamp: ClampProposal | None = None,
) -> Tensor:
    """Return ``log psi`` of the states of a chain, ``(*batch,)``; equal ones are asked about once.

    The table is the one that the next step asks for, and kept for it by whoever counts rows.

    :param guide: a measurement.
    :param k: steps made so far.
    :param clamp: tokens that are known before they are revealed.
    """
    assert isinstance(guide, GaussianMeasurement)
    tokens = carry[TOKENS]
    log_d = kernel.predict(carry, k).dense()
    if clamp is not None:
        known, where = clamp.beside(tokens)
        hot = torch.nn.functional.one_hot(known, log_d.shape[-1]).to(log_d).log()
        log_d = torch.where(where[:, None], hot, log_d)
    first, inverse = distinct_states(tokens, carry.get(GIVEN))
    rows, table = tokens.reshape(-1, tokens.shape[-1]), log_d.reshape(-1, *log_d.shape[-2:])
    found = moment_lookahead(guide, rows[first], table[first])
    return found[inverse].reshape(tokens.shape[:-1])


def moments(codebook: Tensor, tokens: Tensor, log_d: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean ``(n, L, b)`` and covariance ``(n, L, b, b)`` of the embedding of each site.

    :param codebook: ``(V, b)``.
    """
    size = len(codebook)
    hot = torch.nn.functional.one_hot(tokens.clamp_max(size - 1), size)
    d = torch.where((tokens == size)[..., None], log_d.exp(), hot).to(codebook)
    mean = d @ codebook
    second = torch.einsum("nlv,vb,vc->nlbc", d, codebook, codebook)
    cov = second - mean[..., :, None] * mean[..., None, :]
    return mean, torch.where((tokens == size)[..., None, None], cov, 0.0)


def linearised(guide: GaussianMeasurement, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``y - A(e)``, ``(n, m)``, and the Jacobian of ``A``, ``(n or 1, m, L, b)``.

    :param e: points of the embedding space, ``(n, L, b)``.
    """
    jacobian, _ = jacobian_of(guide, e[:1] if guide.linear else e)
    return guide.residual(e), jacobian


def gaussian(residual: Tensor, jacobian: Tensor, cov: Tensor, sigma: float) -> Tensor:
    """Return the log-density of residuals, ``(n,)``, with what the covariance of sites adds.

    :param residual: ``(n, m)``.
    :param jacobian: ``(n or 1, m, L, b)``.
    :param cov: of the sites, ``(n, L, b, b)``.
    """
    count = residual.shape[-1]
    own = jacobian.expand(len(residual), *jacobian.shape[1:])
    spread = torch.einsum("nmlb,nlbc,nklc->nmk", own, cov, own)
    noise = sigma**2 * torch.eye(count, dtype=spread.dtype, device=spread.device)
    factor = torch.linalg.cholesky(spread + noise)
    scaled = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * scaled.square().sum(-1) - log_det - 0.5 * count * math.log(2 * math.pi)
