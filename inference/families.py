"""Several ends for each particle, one of which is kept by what it is worth.

With ends ``x_j`` drawn from a proposal and gains ``w_j = K(x_j) G(x_j) / Q(x_j)``, one is kept with
probability ``w_j / sum_j w_j``, and stands for their mean (nested sequential Monte Carlo: Naesseth
et al. 2015, arXiv:1502.02536)::

    log w = log (1/M) sum_j w_j

which is exact for every ``M``. Ends have no look-ahead to make, so that they are cheap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.sources import Moved, Rng, State
from ppl_diffusion.smc.twists import log_mean_exp


def best_end(
    run: Bound,
    state: State,
    num_children: int,
    end: Callable[[State], Moved],
    generator: Rng = None,
) -> Moved:
    """Return finished states that know ``log_g``, and the log of what they are weighed by.

    :param num_children: ends ``M`` drawn for each particle.
    :param end: makes the last move of any number of particles.
    """
    runs, size = run.shape
    first = torch.arange(size, device=run.device) * num_children
    family = torch.arange(size, device=run.device).repeat_interleave(num_children)
    children, ratio = end(run.gather(state, family.expand(runs, -1)))
    ended = run.final(children)
    log_ratio: Tensor = ended["log_g"].new_zeros(()) + ratio
    log_ratio = log_ratio.expand_as(ended["log_g"])
    gain = (ended["log_g"] + log_ratio).reshape(runs, size, num_children)
    noise = uniforms((runs, size), generator=generator, device=run.device)
    dead = gain.amax(-1) == -torch.inf
    chosen: Tensor = draw_categorical(torch.where(dead[..., None], 0.0, gain), noise)
    index = first + chosen
    kept = run.gather(ended, index)
    # The engine adds the potential of the end that is kept.
    paid = log_mean_exp(gain, -1) - gain.gather(-1, chosen[..., None])[..., 0]
    return kept, torch.where(dead, 0.0, paid) + log_ratio.gather(1, index)
