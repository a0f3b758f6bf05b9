"""What coarse noise does to a categorical draw, in closed form: the power of precision tests.

Gumbel-max is the race ``argmin E_i / p_i`` of exponential clocks. Noise on a lattice gives no
clock below some ``e0``: ``2^-24`` for torch's float32 uniforms, ``2^-23`` for JAX's. Conditioned
on ``E >= e0`` a clock is ``e0`` later, so class ``i`` starts only at time ``e0 / p_i`` (Zheng et
al. 2024, arXiv:2409.02908, proposition 5.2).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TORCH_FLOOR = 2.0**-24
"""Smallest exponential of a float32 race in torch."""

JAX_FLOOR = 2.0**-23
"""Smallest exponential of a float32 race in JAX."""


def trunc_probs(p: np.ndarray, e0: float) -> np.ndarray:
    """Return the law of a race whose exponentials are never below ``e0``.

    With the classes in descending order, ``R_k`` their cumulative mass and ``tau_k = e0 / p_k``
    the time at which class ``k`` starts, class ``i`` wins with probability ``p_i sum_{k >= i}
    beta_k``, where ``beta_k R_k`` is the probability that somebody wins between ``tau_k`` and
    ``tau_{k+1}``.

    :param p: probabilities, ``(n,)``; zeros never win.
    :param e0: the floor, at least 0.
    :returns: float64 ``(n,)``, sums to one.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(-p, kind="stable")
    order = order[p[order] > 0]
    q = p[order]
    mass, start = np.cumsum(q), e0 / q
    ahead = np.arange(1, len(q) + 1) * e0  # the clocks that run have lost this much
    alive_at_start = np.exp(ahead - mass * start)
    alive_at_end = np.append(np.exp(ahead[:-1] - mass[:-1] * start[1:]), 0.0)
    beta = (alive_at_start - alive_at_end) / mass
    law = np.zeros_like(p)
    law[order] = q * np.cumsum(beta[::-1])[::-1]
    return law


def floored_race(log_p: Tensor, e0: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw by a race whose exponentials are never below ``e0``: the fault, on purpose.

    :param log_p: log-probabilities, ``(..., n)``.
    :param e0: the floor.
    :returns: int64 ``(...)``.
    """
    clocks = torch.empty_like(log_p, dtype=torch.float64).exponential_(generator=generator) + e0
    return (clocks.log() - log_p).argmin(-1)
