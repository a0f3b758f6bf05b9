"""Prior draws that are never resampled: what a look-ahead would cost, seen before it costs it.

Resampling by ``h`` at a step multiplies the variance that is to come by about
``E[h] E[G^2 / h] / E[G^2]`` against plain importance sampling, expectations under the chain's own
law. A completion that guesses a good state wrong makes it huge, and the run itself cannot see
that: the state is gone. Draws that nothing drops can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.sources import Rng, State
from ppl_diffusion.smc.engine import Engine, smc_loop
from ppl_diffusion.smc.resampling import Systematic
from ppl_diffusion.smc.run_memory import remembers
from ppl_diffusion.smc.twists import LOG_BASE, log_mean_exp


@remembers("seen")
class Watched:
    """An engine whose look-aheads are kept.

    :param engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.init, self.move, self.gather = engine.init, engine.move, engine.gather
        self.foresee: Callable[..., tuple[State, int]] = engine.foresee  # type: ignore[attr-defined]
        self.close: Callable[..., tuple[State, Tensor]] = engine.close  # type: ignore[attr-defined]
        self.look = engine.log_twist
        self.seen: list[Tensor | None] = []

    def log_twist(self, carry: State, k: int, generator: Rng) -> Tensor | None:
        value = self.look(carry, k, generator)
        self.seen.append(value)
        return value


def require_sentinels(method: Method, num: int) -> int:
    """Return how many there are.

    :raises ValueError: if that is no number of draws.
    :raises CapabilityError: if the method does not look ahead along its chain.
    """
    if not isinstance(num, Integral) or num < 0:
        raise ValueError(f"SMC: num_sentinels must be >= 0 and whole, got {num}.")
    if num and method.keeps_paths:
        raise CapabilityError(
            f"SMC: sentinels judge a look-ahead along the chain, and {method.name!r} moves whole "
            "paths; leave num_sentinels out."
        )
    return int(num)


def sentinels(
    engine: Engine,
    num_steps: int,
    num: int,
    threshold: float,
    record: Callable[[State], dict[str, Tensor]] | None,
) -> dict[str, Any]:
    """Return the entry of a result's settings about a look-ahead, in JSON types.

    :param engine: of one run of so many particles.
    :param num: how many draws.
    :param threshold: share of the particles below which the run resamples.
    :param record: what is kept of the states of all steps, if anything.
    """
    watched = Watched(engine)
    trace = smc_loop(watched, num_steps, num, 1, Systematic(), 0.0, None, record=record)
    log_h = [value[0] for value in watched.seen if value is not None]
    cost = lookahead_cost(log_h, trace.log_potential[0], trace.carry[LOG_BASE][0], threshold)
    return {"lookahead": {"cost": cost, "sentinels": num}}


def lookahead_cost(
    log_h: list[Tensor], log_g: Tensor, log_base: Tensor, threshold: float = 0.5
) -> float:
    """Return the largest factor at those steps where a population would be resampled; 0 if none.

    :param log_h: look-aheads, in order, each ``(N,)``.
    :param log_g: the potential in the end, ``(N,)``.
    :param log_base: what each draw stands for in the chain's own law, ``(N,)``.
    :param threshold: share of the particles below which it is.
    """

    def mean(log_value: Tensor) -> Tensor:
        return log_mean_exp(log_base + log_value, -1)

    worst, last = 0.0, torch.zeros_like(log_g)
    if threshold <= 0 or not bool((log_g > -math.inf).any()):
        return worst
    for h in log_h:
        # The population follows h_last, its weights are h / h_last.
        if 2 * mean(h) - mean(last) - mean(2 * h - last) < math.log(threshold):
            factor = mean(h) + mean(2 * log_g - h) - mean(2 * log_g)
            worst, last = max(worst, float(factor.exp())), h
    return worst
