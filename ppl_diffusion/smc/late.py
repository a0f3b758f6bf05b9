"""Late looks: completions are scored while the network looks at the next state.

A slow potential and a slow network wait for each other when a state is weighed by what *its own*
completions are worth. With ``late`` fills (``Defensive(late=True)``) a step goes like this::

    start scoring the completions of x_k            in the potential's executor
    move the particles to x_{k+1}
    ask the network about x_{k+1}                   meanwhile
    wait for the scores; they are h_{k+1}(x_{0:k+1}) = f(x_k)

so that a step takes the longer of the two times and not their sum.

**The law.** A twist telescopes whatever it is: each ``h_k`` enters once, as it comes, is divided
out once, when the next one replaces it, and in the end ``G(x0)`` itself stands there, in time. All
that is needed is that ``h_k`` is known when the particles of step ``k`` are weighed, which a
function of the path so far is. Hence the target is the same and the evidence stays unbiased; what
changes is *when* runs are resampled: after step ``k + 1`` it depends on ``w(x_{0:k+1}) f(x_k)``,
so that what the last move revealed counts only after the next one. ``h_0`` is 1, and the
completions of the state before the last move are not asked about at all.

Particles that resampling dropped are dropped before their completions are sent: survivors alone
are asked about. What a step starts it also collects, between the same two times of resampling, so
that scores need not be gathered with ancestors; the completions wait in the carry, and are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.smc.evaluated_potential import Pending
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac
from ppl_diffusion.smc.twists import Carry, FillTwist

COMPLETED, PENDING = "late/completed", "late/pending"
"""Completions of the particles' states, gathered with them, and what waits for their scores."""


class LateLooks:
    """A bound Feynman-Kac model whose look-aheads arrive a step late.

    :param bound: the model, whose twist is by late fills.
    """

    def __init__(self, bound: BoundFeynmanKac) -> None:
        twist = bound.model.twist
        assert isinstance(twist, FillTwist)
        self.bound, self.twist = bound, twist
        self.init, self.gather, self.foresee = bound.init, bound.gather, bound.foresee

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Start scoring, move, and ask the network about the new states."""
        carry, fills = without_completed(carry)
        pending: Pending | None = None
        if self._is_due(k + 1):
            fills = self._fills(carry, k, generator) if fills is None else fills
            pending = self.bound.potential.submit(fills)
        carry, log_ratio = self.bound.move(carry, k, generator)
        if self._is_due(k + 1) or self._is_due(k + 2):
            carry = {**carry, COMPLETED: self._fills(carry, k + 1, generator)}
        return {**carry, PENDING: pending}, log_ratio

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return what the states before the last move promised, the potential itself at the end."""
        if k == self.bound.num_steps:
            return self.bound.log_twist(carry, k, generator)
        pending = carry.get(PENDING)
        return None if pending is None else self.bound.looked(carry, pending())

    def _is_due(self, k: int) -> bool:
        return 0 < k < self.bound.num_steps and not k % self.bound.model.twist_every

    def _fills(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor:
        return self.bound.fills(self.twist, carry, k, generator)


def without_completed(state: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return states without what late looks keep in them, and their completions, or None.

    :param state: a carry, or a state of named sites.
    """
    kept = {name: value for name, value in state.items() if name not in (COMPLETED, PENDING)}
    return kept, state.get(COMPLETED)


def looking(bound: BoundFeynmanKac) -> BoundFeynmanKac | LateLooks:
    """Return what moves and weighs particles as the twist of a model says.

    :param bound: the model.
    """
    return LateLooks(bound) if is_late(bound.model.twist) else bound


def is_late(twist: object) -> bool:
    """Return whether look-aheads arrive a step late.

    :param twist: any twist.
    """
    return isinstance(twist, FillTwist) and twist.late


def require_in_time(twist: object) -> None:
    """Refuse late look-ahead where a retained path is weighed beside its own completions.

    :param twist: any twist.
    :raises CapabilityError: if it is late.
    """
    if is_late(twist):
        raise CapabilityError(
            "conditional SMC looks ahead in time, so that paths are weighed by their own states; "
            "use a twist without late=True."
        )
