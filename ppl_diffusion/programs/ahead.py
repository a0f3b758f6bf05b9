"""The look-ahead behind a carried twist, as a function of the latents.

Latents are renewed by kernels that leave ``p(path) r(latents) h(path, latents)`` alone, with ``h``
the very look-ahead that particles carry: read from the same completions, tempered and floored by
the same numbers. Those numbers are chosen before the run. A floor found from the particles that are
moved makes ``h`` another function in every run, and the evidence is then biased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.smc.run_memory import remembers
from ppl_diffusion.smc.twists import log_mean_exp

State = dict[str, Any]


class Rated(NamedTuple):
    """What particles would be worth with other latents.

    :param log_h: their look-ahead, float64 ``(R, N)``.
    :param log_r: log of what the latents are drawn with, float64 ``(R, N)``.
    :param slots: what else of the state changes with them.
    :param log_path: log-probability of their paths so far, float64 ``(R, N)``; None where it does
        not depend on what is moved.
    """

    log_h: Tensor
    log_r: Tensor
    slots: State
    log_path: Tensor | None = None


@dataclass(frozen=True)
class Ahead:
    """A look-ahead of particles whose latents may be any.

    :param kept: what it is read from, gathered with the particles.
    :param rate: ``(kept, latents) -> Rated``; latents ``(R, N, ...)``, all that are drawn.
    :param smooth: whether it has a gradient that can be followed: equal latents get equal answers
        (otherwise each draws noise, of the law that it has in the program), and no network reads
        them.
    """

    kept: State
    rate: Callable[[State, Mapping[str, Tensor]], Rated]
    smooth: bool = True

    def __call__(self, latents: Mapping[str, Tensor]) -> Rated:
        """Return what the particles would be worth."""
        return self.rate(self.kept, latents)

    def take(self, index: Tensor) -> Ahead:
        """Return the look-ahead of other particles.

        :param index: int64 ``(R, N')``.
        """
        return replace(self, kept=take_particles(self.kept, index))


@remembers("log_c")
@dataclass
class Levels:
    """What look-aheads are tempered by and floored at, so that latents may move.

    ``h = floor(f ** ((g + 1) / (T + 1)))`` after ``g`` of ``T`` groups, over constants of the floor
    that are found while it learns, and stay what they are afterwards.

    :param tempered: whether look-aheads are tempered.
    :param learning: whether the constants are those of the particles at hand.
    :param log_c: the constants, by the number of moves made, ``(R, 1)`` or ``(1, 1)``.
    """

    tempered: bool = True
    learning: bool = True
    log_c: dict[int, Tensor] = field(default_factory=dict)

    def power(self, share: float, num_groups: int) -> float:
        """Return the power of a look-ahead.

        :param share: groups made so far, with the part of one that is not complete.
        """
        return (share + 1) / (num_groups + 1) if self.tempered else 1.0

    def constant(self, made: int, found: Callable[[], Tensor]) -> Tensor:
        """Return the log of the floor's constant, ``(R, 1)``.

        :param made: moves made so far.
        :param found: returns that of the particles, ``(R, 1, ...)``.
        """
        if self.learning:
            own = found().flatten(1)
            self.log_c[made] = log_mean_exp(own, 1)[:, None]
        if made not in self.log_c:  # the scout died before: no floor, and no harm to the law
            return torch.full((1, 1), -math.inf, dtype=torch.float64, device="cpu")
        return self.log_c[made]
