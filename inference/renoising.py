"""Noise tokens again: how many masks a step leaves, where they go, and what is known meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Rng


def masks_after(kernel: Kernel, k: int, free: Tensor) -> Tensor:
    """Return how many of the free sites are masked after step ``k`` of a masked chain.

    :param free: number of sites that are not known, int64 ``(*batch)``.
    """
    ordered = isinstance(kernel, OrderedKernel)
    clean = (k + 1) / kernel.num_steps if ordered else float(kernel.alphas[k + 1])
    # A hair above, as shares of a grid are rounded: .7 of 10 sites must not be 6.
    return (free.to(torch.float64) * (1 - clean) + 1e-9).floor().long()


def is_on_grid(kernel: Kernel) -> bool:
    """Return whether the states of a chain are tokens noised to the levels of a grid of times."""
    return isinstance(kernel, InterpolatingKernel) and kernel.mixes and kernel.markov


def require_levels(kernel: Kernel) -> None:
    """Refuse kernels that do not say how noisy a state is after each step.

    :raises CapabilityError: if this one does not.
    """
    in_order = isinstance(kernel, OrderedKernel) and kernel.markov and kernel.block >= kernel.length
    if not (in_order or is_on_grid(kernel)):
        raise CapabilityError(
            f"G2D2: it noises whole sequences to a level of their own at every step, which "
            f"{kernel!r} does not have; use InterpolatingKernel, or OrderedKernel in one block."
        )


def held_law(site: ChainSite, log_d: Tensor) -> Tensor:
    """Return the law of the clean tokens with clamped ones certain, ``(*batch, L, K)``."""
    if site.clamp is None:
        return log_d
    tokens, mask = site.clamp.beside(log_d)
    known = F.one_hot(tokens, log_d.shape[-1]).to(log_d.dtype).log()
    return torch.where(mask[:, None], known, log_d)


def is_free(site: ChainSite, x0: Tensor) -> Tensor:
    """Return which sites are neither prompted nor clamped, bool ``(*batch, L)``."""
    fixed = torch.zeros_like(x0, dtype=torch.bool)
    for held in (site.chain.fixed, None if site.clamp is None else site.clamp.mask):
        fixed = fixed if held is None else fixed | held.to(fixed.device)
    return ~fixed


def is_open(log_d: Tensor) -> Tensor:
    """Return at which sites more than one token is possible, bool ``(*batch, L)``."""
    return (log_d > -torch.inf).sum(-1) > 1


def nucleus(log_p: Tensor, mass: float) -> Tensor:
    """Return log-probabilities with all but the likeliest tokens of a given mass left out.

    :param log_p: normalised, ``(*batch, K)``.
    :param mass: the smallest set of at least this mass is kept; 1 keeps all.
    """
    if mass >= 1:
        return log_p
    p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    kept = p.cumsum(-1) - p < mass  # the one that reaches the mass is kept
    return torch.where(torch.zeros_like(kept).scatter(-1, order, kept), log_p, -torch.inf)


def masked_again(x0: Tensor, count: Tensor, mask: int, free: Tensor, generator: Rng) -> Tensor:
    """Return sequences with some of their free sites masked, uniformly chosen.

    :param x0: clean tokens, int64 ``(*batch, L)``.
    :param count: how many, int64 ``(*batch)``.
    :param mask: id of the mask.
    :param free: bool ``(*batch, L)``: the others are never masked.
    """
    key = uniforms(tuple(x0.shape), generator=generator, device=x0.device)
    key = torch.where(free, key, 2.0)
    chosen = key.argsort(-1).argsort(-1) < count[..., None]
    return torch.where(chosen & free, mask, x0)
