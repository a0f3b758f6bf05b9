"""Tables of token probabilities at masked sites, and the codes that stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ppl_diffusion.denoisers.lfq import lfq_codebook, lfq_ids
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.sources import Rng

FLOOR = -70.0
"""Least log-probability of a prediction: logits are finite. Near it no gradient is felt."""

Quantiser = Literal["straight-through", "soft", "gumbel", "entropy-mix"]
Nearest = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Expectation:
    """What a quantised expectation found, ``n`` rows of ``L`` sites.

    :param log_r: log of the table of the iterate that is kept, float64 ``(n, L, K)``; a visible
        site is a point mass.
    :param anchors: its codes, int64 ``(n, L)``; a visible site keeps its token.
    :param logits: its ``Phi``, ``(n, L, K)``, for a warm start.
    :param loss: its loss, float64 ``(n,)``.
    :param num_losses: rows that were decoded, with or without a gradient.
    :param log_average: log of the average of the table over the iterates, ``(n, L, K)``; where the
        anchor flips between codes, only the average knows which is likelier.
    """

    log_r: Tensor
    anchors: Tensor
    logits: Tensor
    loss: Tensor
    num_losses: int
    log_average: Tensor

    def at(self, rows: Tensor) -> Expectation:
        """Return what was found for some rows, each as often as it is asked for.

        :param rows: int64 ``(n',)``.
        """
        return replace(
            self,
            log_r=self.log_r[rows],
            anchors=self.anchors[rows],
            logits=self.logits[rows],
            loss=self.loss[rows],
            log_average=self.log_average[rows],
        )


@dataclass(frozen=True)
class MaskedSites:
    """The masked sites of all rows in one list of ``P``, and the codes of the others.

    :param codebook: ``(K, b)``.
    :param tokens: int64 ``(n, L)``.
    :param masked: bool ``(n, L)``.
    :param rows: the row of each masked site, int64 ``(P,)``.
    :param log_d: its prediction, normalised, in the dtype of the codes, ``(P, K)``.
    """

    codebook: Tensor
    tokens: Tensor
    masked: Tensor
    rows: Tensor
    log_d: Tensor

    @classmethod
    def of(cls, codebook: Tensor, tokens: Tensor, log_d: Tensor) -> MaskedSites:
        """Return the sites of a batch.

        :raises ValueError: if shapes do not fit.
        """
        size = len(codebook)
        if tokens.ndim != 2 or tuple(log_d.shape) != (*tokens.shape, size):
            raise ValueError(
                f"QuantisedExpectation: {size} codes take tokens (n, L) and a prediction "
                f"(n, L, {size}), got {tuple(tokens.shape)} and {tuple(log_d.shape)}."
            )
        masked = tokens == size
        # Half precision would let rare tokens underflow, and their gradient with them.
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        prediction = log_d[masked].detach().to(dtype).clamp_min(FLOOR).log_softmax(-1)
        return cls(codebook.to(dtype), tokens, masked, masked.nonzero()[:, 0], prediction)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.codebook.dtype

    def table(self, values: Tensor) -> Tensor:
        """Return log-probabilities of masked sites beside point masses, float64 ``(n, L, K)``."""
        size = len(self.codebook)
        known = self.tokens.clamp_max(size - 1)[..., None] == torch.arange(
            size, device=self.tokens.device
        )
        full = torch.where(known, 0.0, -torch.inf).to(torch.float64)
        return full.masked_scatter(self.masked[..., None], values.to(torch.float64))

    def embeddings(self, points: Tensor, live: Tensor) -> Tensor:
        """Return the embeddings of some rows, ``(live, L, b)``.

        :param points: of the masked sites of these rows.
        :param live: which rows, bool ``(n,)``.
        """
        codes = self.codebook[self.tokens[live].clamp_max(len(self.codebook) - 1)]
        return codes.masked_scatter(self.masked[live][..., None], points)


def nearest_code(codebook: Tensor) -> Nearest:
    """Return the map from points ``(*batch, b)`` to ids of the nearest codes, int64 ``(*batch,)``.

    Ties go to the lowest id. Codes that are all of ``{-1, +1}^b`` in binary order (lookup-free
    quantisation: Yu et al. 2023, arXiv:2310.05737) need no distances: bit by bit, ``+1`` iff the
    coordinate is positive, so that 0 gives -1.

    :param codebook: ``(K, b)``.
    """
    size, dim = codebook.shape
    if size == 2**dim and torch.equal(codebook, lfq_codebook(dim, codebook.device).to(codebook)):
        return lfq_ids

    def nearest(points: Tensor) -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"  # products would round ties away
        rows = points.detach().reshape(-1, dim)
        return torch.cdist(rows, codebook, compute_mode=exact).argmin(-1).reshape(points.shape[:-1])

    return nearest


def quantised(
    logits: Tensor,
    codebook: Tensor,
    quantiser: Quantiser = "straight-through",
    *,
    nearest: Nearest | None = None,
    tau: float = 1.0,
    generator: Rng = None,
) -> tuple[Tensor, Tensor]:
    """Return where the loss is taken, with its gradient in the logits, and the anchors.

    :param logits: ``Phi``, ``(P, K)``.
    :param codebook: ``(K, b)``.
    :param quantiser: see :class:`QuantisedExpectation`.
    :param nearest: of the codebook, where it is known.
    :param tau: temperature of the Gumbel-softmax.
    :param generator: its noise.
    :returns: points ``(P, b)`` and ids ``(P,)``.
    """
    nearest = nearest or nearest_code(codebook)
    log_r = logits.log_softmax(-1)
    mean = log_r.exp() @ codebook
    if quantiser == "soft":
        return mean, nearest(mean)
    if quantiser == "gumbel":
        noise = uniforms(logits.shape, generator=generator, device=logits.device)
        noisy = logits - (-noise.clamp_min(1e-300).log()).log().to(logits.dtype)
        mean, ids = (noisy / tau).softmax(-1) @ codebook, noisy.argmax(-1)
    else:
        ids = nearest(mean)
    share: Tensor | float = 1.0
    if quantiser == "entropy-mix":
        entropy = -(log_r.exp() * log_r).sum(-1, keepdim=True)
        share = entropy / math.log(len(codebook))
    return mean + (share * (codebook[ids] - mean)).detach(), ids
