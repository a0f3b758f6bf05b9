"""Soft-value guidance: draw a few children of every lineage, keep one by what it promises.

Li et al. (2024, arXiv:2408.08252) choose among ``M`` children ``c_j ~ K(. | x)`` of each lineage::

    j ~ softmax(v(c_j) / alpha),     v(x) a guess of log E[G(x0) | x],     v(x0) = log G(x0)

with ``v`` the potential of the completed child (*posterior mean*) or a network trained on paths of
the chain (*Monte Carlo*, :mod:`~ppl_diffusion.inference.value_network`). As published nothing pays
for having chosen, and the outcome has no law anyone can write down. Here, unless
``weighted=False``, the choice is paid for (nested sequential Monte Carlo: Naesseth et al. 2015)::

    log w += log (1/M) sum_j s_j - log s_J + v(c_J) - v(x),     s_j = exp(v(c_j) / alpha)

which makes the weights exact for ``p(path) G(x0)`` for every guess ``v``, every ``M`` and every
``alpha > 0``. Lineages meet only where they are resampled: ``ess_threshold=0`` keeps them
independent, each with an evidence of its own. All children are one flat batch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppl_diffusion.inference.biased import equal_weights
from ppl_diffusion.inference.bootstrap import LookingAhead
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method, register
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import TwistLike, log_mean_exp

LOG_H = "soft_value/log_h"

LEAST_CHANCE = -36.0
"""Log of the least probability that a uniform number in float64 can draw, about ``2**-52``."""

LEAST_SHARE = math.log(1e-12)
"""Log of the share of a family below which nobody would miss a child."""

GREED = 2.0
"""Nats by which the log of the particles there are must exceed that of those a step takes."""


@register
@dataclass(frozen=True)
class SoftValueGuidance(LookingAhead):
    """Keep one of ``M`` children by what it promises, and pay for the choice.

    :param twist: the guess of the value: ``"defensive"`` (the default with weights), ``"argmax"``
        (without), ``"persistent"``, ``"sample"`` or a fill twist (posterior mean), or a function
        ``(carry, k) -> log h (R, N)``, such as a trained
        :class:`~ppl_diffusion.inference.value_network.LearnedValue` (Monte Carlo).
    :param proposal: where children are drawn from: None is the chain itself; a kernel, or a
        proposal with a density.
    :param num_children: children ``M`` drawn per lineage and step.
    :param alpha: temperature of the choice, in units of ``log G``: 1 chooses by the value itself,
        0 takes the best child (ties at random; only without weights). Below 1 it leaves behind
        children that the target wants: where values differ by ``d`` it takes about
        ``exp((1 / alpha - 1) d)`` particles for the weights to make up for that. Too few are
        warned of; a child that no random number can choose any more makes ``exact=False``.
    :param weighted: pay for the choice. False is the published program: equal weights, no
        resampling, no evidence, ``exact=False``.
    :param cache: ask the potential once per distinct sequence; changes the cost and nothing else.
    :raises ValueError: if a number is not usable, or ``alpha=0`` is to be weighted.

    Example::

        method = SoftValueGuidance(num_children=20)
        posterior = SMC(chain, Reward(dock, temperature=0.1), method=method).run(seed=0)
    """

    twist: TwistLike = "auto"
    num_children: int = 10
    alpha: float = 1.0
    weighted: bool = True
    cache: bool = True

    name: ClassVar[str] = "soft-value"

    def __post_init__(self) -> None:
        if self.twist == "auto":  # what nothing pays for is as published
            object.__setattr__(self, "twist", "defensive" if self.weighted else "argmax")
        super().__post_init__()
        _check_selection(self.num_children, self.alpha, self.weighted)
        if self.twist is None:
            raise ValueError(
                "SoftValueGuidance: twist=None promises nothing to choose by; use "
                "ImportanceSampling, or a twist."
            )

    @classmethod
    def variants(cls, source: Source) -> dict[str, Method]:
        """Return what else ``check`` tries: fewer children, which are paid for one by one."""
        return {f"{cls.name}-4": cls(num_children=4)}

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Lineages that nothing weighs are never resampled."""
        return resampler, ess_threshold if self.weighted else 0.0

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """The value of the noisiest states is taken to be constant."""
        return {**state, LOG_H: run.zeros}

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Draw children, choose one of each family, and return what the choice costs."""
        state = run.open(state, group, generator)
        first = torch.arange(run.shape[1], device=run.device) * self.num_children  # of each family
        children, log_ratio, log_h = self._children(run, state, group, generator)
        gain = (log_h + log_ratio).reshape(*run.shape, -1)
        log_score = self._log_score(gain)
        if self.weighted and self.alpha < 1:
            self._check_greed(run, gain, log_score, group)
        chosen = self._choose(log_score, generator)
        index = first + chosen
        kept = children if self.num_children == 1 else run.gather(children, index)
        moved = {**kept, LOG_H: log_h.gather(1, index)}
        if not self.weighted:
            return moved, 0.0
        taken = log_score.gather(-1, chosen[..., None])[..., 0]
        paid = log_mean_exp(log_score, -1) - taken
        # A family without a child of positive value is dead, which its value will say.
        paid = torch.where(taken == -torch.inf, 0.0, paid)
        return moved, paid + log_ratio.gather(1, index)

    def _children(
        self, run: Bound, state: State, group: int, generator: Rng
    ) -> tuple[State, Tensor, Tensor]:
        """Return all children side by side, ``log K - log M`` and values, each ``(R, N * M)``."""
        repeated = state
        if self.num_children > 1:
            lineages = torch.arange(run.shape[1], device=run.device)
            family = lineages.repeat_interleave(self.num_children)
            repeated = run.gather(state, family.expand(run.shape[0], -1))
        children, log_ratio = super().move(run, repeated, group, generator)
        children, log_h = self.rated(run, children, group, generator)
        return children, (log_h.new_zeros(()) + log_ratio).expand_as(log_h), log_h

    def _check_greed(self, run: Bound, gain: Tensor, log_score: Tensor, k: int) -> None:
        """Take exactness back, or warn, where the choice is greedier than weights can undo."""
        alive = gain.amax(-1) > -torch.inf
        log_share, log_chance = gain[alive].log_softmax(-1), log_score[alive].log_softmax(-1)
        lost = (log_chance < LEAST_CHANCE) & (log_share > LEAST_SHARE)
        run.notes["lost"] = run.notes.get("lost", False) or bool(lost.any())
        # Importance sampling takes about exp(relative entropy) draws (Chatterjee, Diaconis 2018).
        excess = torch.where(log_share > -torch.inf, log_share - log_chance, 0.0)
        needed = _upper_decile((log_share.exp() * excess).sum(-1))
        if run.notes.get("warned") or needed <= max(1.0, math.log(run.shape[1]) - GREED):
            return
        run.notes["warned"] = True
        warnings.warn(
            f"SoftValueGuidance: alpha={self.alpha:g} chooses so greedily at step {k} that "
            f"the weights take about exp({needed:.1f}) particles to undo it, not {run.shape[1]}; "
            "raise alpha or use weighted=False.",
            stacklevel=2,
        )

    def _log_score(self, gain: Tensor) -> Tensor:
        """Return the log of what children are chosen in proportion to, ``(R, N, M)``."""
        if self.alpha > 0:
            return gain / self.alpha
        return torch.where(gain == gain.amax(-1, keepdim=True), 0.0, -torch.inf)

    def _choose(self, log_score: Tensor, generator: Rng) -> Tensor:
        """Return the chosen child of each family, int64 ``(R, N)``."""
        if log_score.shape[-1] == 1:
            return log_score.new_zeros(log_score.shape[:-1], dtype=torch.int64)
        top = log_score.amax(-1, keepdim=True)
        level = torch.where(top == -torch.inf, 0.0, log_score - top)
        noise = uniforms(tuple(log_score.shape[:-1]), generator=generator, device=log_score.device)
        chosen: Tensor = draw_categorical(level, noise)
        return chosen

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the value of each lineage; without weights nothing counts."""
        log_h: Tensor = state[LOG_H]
        return log_h if self.weighted else None

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the value of each lineage: that of the child that was chosen."""
        return super().ahead(run, state, group) if group else None

    def renewed(self, state: State, log_h: Tensor) -> State:
        """Return lineages of another value."""
        return {**state, LOG_H: log_h}

    def pay(self, run: Bound, state: State) -> Tensor:
        """Return the value of the last chosen child; without weights only what is forbidden."""
        log_h: Tensor = state[LOG_H]
        return log_h if self.weighted else torch.where(log_h == -torch.inf, log_h, 0.0)

    def law(self, run: Bound) -> Law:
        """Return the law of the particles, if there is one."""
        law, alpha, steps = run.source.law, self.alpha, run.num_steps
        if self.weighted and not run.notes.get("lost"):
            return law
        if self.weighted:
            why = (
                f"with alpha={alpha:g} some children were too unlikely ever to be chosen, and no "
                "weight makes up for what is never drawn"
            )
            return law.but(exact=False, why=why)
        rule = f"exp(value / {alpha:g})" if alpha else "the largest value"
        limit = f"G(x0)**{1 / alpha:g}" if alpha else "1[G(x0) is largest]"
        why = (
            f"no declared law: one of {self.num_children} children was kept at each of {steps} "
            f"steps by {rule}, and nothing paid for it; equal weights, which for an exact value "
            f"and ever more children come close to p(path) * {limit} with log G = "
            f"{' + '.join(tilt.of for tilt in law.tilts)}"
        )
        return law.but(exact=False, why=why, has_evidence=False)

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Without weights all lineages count alike and there is no evidence."""
        return posterior if self.weighted else equal_weights(posterior, posterior.law.why)


def _upper_decile(values: Tensor) -> float:
    """Return what a tenth of the values exceed; 0 where there are none."""
    return float(values.sort().values[int(0.9 * len(values))]) if len(values) else 0.0


def _check_selection(num_children: int, alpha: float, weighted: bool) -> None:
    if num_children < 1:
        raise ValueError(f"SoftValueGuidance: num_children must be >= 1, got {num_children}.")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"SoftValueGuidance: alpha must be a finite number >= 0, got {alpha}.")
    if weighted and alpha == 0:
        raise ValueError(
            "SoftValueGuidance: alpha=0 never keeps any but the best child, which no weight can "
            "undo; use weighted=False, or lower the temperature of the potential instead."
        )
