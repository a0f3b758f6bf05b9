"""Paths that particles remember, so that they can be scored again under other conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.kernels.blocks import widened
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.smc.feynman_kac import LOG_PROB, per_particle

TRAIL = "trail"
"""Entry of the state: by chain and number of own steps, its flat states, ``(R, N, ...)``."""

State = dict[str, Any]


def remember(state: State, site: ChainSite) -> State:
    """Return states that remember what one chain has drawn by now.

    :param state: states.
    :param site: the chain.
    """
    name, kernel = site.name, site.chain.kernel
    kept = kernel.flat(state["sites"][name])
    if not kernel.blocks:  # tokens alone are small
        kept = kept.to(torch.uint8 if kernel.process.num_states <= 256 else torch.int32)
    trails = state.get(TRAIL, {})
    own = {**trails.get(name, {}), state["done"][name]: kept}
    return {**state, TRAIL: {**trails, name: own}}


def retrace(
    kernel: Kernel,
    site: ChainSite,
    carry: Carry,
    states: tuple[Tensor, Mapping[int, Tensor]],
    given: Mapping[str, Tensor],
) -> Carry:
    """Return the carry that the same path would have led to under other conditions.

    Its ``"log_prob"`` is that of the path; a network row per step and particle is what it costs.

    :param kernel: the kernel of the chain.
    :param site: the chain.
    :param carry: the carry as it is; what does not depend on conditions is kept.
    :param states: the noisiest state, and the others by number of steps.
    :param given: the conditions, each ``(R, N, *plates, *event)``.
    """
    first, trail = states
    start = kernel.split(first)
    told = kernel.resume(start, given)
    log_p = kernel.prior_log_prob(start, site.chain.prompt)
    for k, kept in enumerate(trail[n] for n in sorted(trail)):
        step = kernel.step(told, k, fixed=site.chain.fixed)
        value = kernel.split(widened(kept))
        log_p = log_p + step.log_prob(value)
        told = kernel.advance(told, value, k, step=step)
    return {**carry, **told, LOG_PROB: per_particle(log_p)}
