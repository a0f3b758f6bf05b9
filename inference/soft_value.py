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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._biased import equal_weights
from ppl_diffusion.inference._chain_program import BoundEngine, ChainProgram
from ppl_diffusion.inference._task import Task
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.smc.engine import Progress, SMCTrace
from ppl_diffusion.smc.feynman_kac import FeynmanKac, Proposal
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import TwistLike, as_twist, log_mean_exp

LOG_H = "soft_value/log_h"

LEAST_CHANCE = -36.0
"""Log of the least probability that a uniform number in float64 can draw, about ``2**-52``."""

LEAST_SHARE = math.log(1e-12)
"""Log of the share of a family below which nobody would miss a child."""

GREED = 2.0
"""Nats by which the log of the particles there are must exceed that of those a step takes."""


class SoftValueGuidance(ChainProgram):
    """Posterior sampling by choosing among children.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain (a reward over its temperature); None for a program.
    :param num_particles: lineages ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param num_children: children ``M`` drawn per lineage and step.
    :param alpha: temperature of the choice, in units of ``log G``: 1 chooses by the value itself,
        0 takes the best child (ties at random; only without weights). Below 1 it leaves behind
        children that the target wants: where values differ by ``d`` it takes about
        ``exp((1 / alpha - 1) d)`` particles for the weights to make up for that. Too few are
        warned of; a child that no random number can choose any more makes ``exact=False``.
    :param value: the guess of the value: ``"argmax"``, ``"persistent"``, ``"sample"`` or a fill
        twist (posterior mean), or a function ``(carry, k) -> log h (R, N)``, such as a trained
        :class:`~ppl_diffusion.inference.value_network.LearnedValue` (Monte Carlo).
    :param weighted: pay for the choice. False is the published program: equal weights, no
        resampling, no evidence, ``exact=False``.
    :param proposal: where children are drawn from: None is the chain itself; a kernel, or a
        proposal with a density.
    :param cache: ask the potential once per distinct sequence; changes the cost and nothing else.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``; 0 keeps
        lineages independent.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.
    :raises ValueError: if a number is not usable, or ``alpha=0`` is to be weighted.

    Example::

        guided = SoftValueGuidance(chain, Reward(dock, temperature=0.1), num_children=20)
        posterior = guided.run(seed=0)
    """

    def __init__(
        self,
        target: ReverseChain | Callable[..., Any],
        potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        num_children: int = 10,
        alpha: float = 1.0,
        value: TwistLike = "argmax",
        weighted: bool = True,
        proposal: Proposal | Kernel | None = None,
        cache: bool = True,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        _check_selection(num_children, alpha, weighted)
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=resampler,
            ess_threshold=ess_threshold if weighted else 0.0,
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.num_children, self.alpha, self.weighted = num_children, float(alpha), weighted
        self.value, self.proposal, self.cache = as_twist(value), proposal, cache
        if self.value is None:
            raise ValueError(
                "SoftValueGuidance: value=None promises nothing to choose by; use "
                "ImportanceSampling, or a value."
            )

    def bind(self, task: Task) -> SoftValueEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        """
        return SoftValueEngine(task, self)

    def finish(self, posterior: ParticlePosterior, trace: SMCTrace) -> ParticlePosterior:
        """Return the lineages; without weights all count alike and there is no evidence.

        :param posterior: the lineages.
        :param trace: the run behind them.
        """
        return posterior if self.weighted else equal_weights(posterior, posterior.target)

    def settings(self, engine: SoftValueEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {
            "method": "soft-value",
            "num_children": self.num_children,
            "alpha": self.alpha,
            "value": engine.bound.model.settings["twist"],
            "weighted": self.weighted,
            "proposal": engine.bound.model.settings["proposal"],
            "cache": self.cache,
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_threshold,
        }


class SoftValueEngine(BoundEngine):
    """A task during one run of :func:`~ppl_diffusion.smc.smc_loop`.

    The carry holds, besides the tokens, the value of each lineage's last chosen child.

    :param task: chain and potential.
    :param options: the program's options.
    """

    def __init__(self, task: Task, options: SoftValueGuidance) -> None:
        self.options, self.exact, self._warned = options, options.weighted, False
        proposal = task.guided_proposal("SoftValueGuidance", options.proposal)
        model = FeynmanKac(task.chain, task.potential, options.value, proposal)
        super().__init__(task, model, max_rows=options.max_rows, cache=options.cache)

    @property
    def target(self) -> str:
        """The law of the particles, in words."""
        children, alpha = self.options.num_children, self.options.alpha
        if self.exact:
            return self.task.target
        if self.options.weighted:
            return (
                f"approximately {self.task.target}; with alpha={alpha:g} some children were too "
                "unlikely ever to be chosen, and no weight makes up for what is never drawn"
            )
        rule = f"exp(value / {alpha:g})" if alpha else "the largest value"
        return (
            f"no declared law: one of {children} children was kept at each of {self.num_steps} "
            f"steps by {rule}, and nothing paid for it; equal weights, which for an exact value "
            "and ever more children come close to p(path) * "
            + (f"G(x0)**{1 / alpha:g}" if alpha else "1[G(x0) is largest]")
            + f" with log G = {self.task.name}"
        )

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states; their value is taken to be constant."""
        carry = self.bound.init(runs, particles, generator)
        return {**carry, LOG_H: torch.zeros((runs, particles), dtype=torch.float64)}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Draw children, choose one of each family, and return what the choice costs."""
        first = torch.arange(carry[LOG_H].shape[1]) * self.options.num_children  # of each family
        children, log_ratio, log_h = self._children(carry, k, generator)
        gain = (log_h + log_ratio).reshape(*carry[LOG_H].shape, -1)
        log_score = self._log_score(gain)
        if self.options.weighted and self.options.alpha < 1:
            self._check_greed(gain, log_score, k)
        chosen = self._choose(log_score, generator)
        index = first + chosen
        moved = {**self.gather(children, index), LOG_H: log_h.gather(1, index)}
        if not self.options.weighted:
            return moved, 0.0
        taken = log_score.gather(-1, chosen[..., None])[..., 0]
        paid = log_mean_exp(log_score, -1) - taken
        # A family without a child of positive value is dead, which its value will say.
        paid = torch.where(taken == -torch.inf, 0.0, paid)
        return moved, paid + log_ratio.gather(1, index)

    def _children(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor, Tensor]:
        """Return all children side by side, ``log K - log M`` and values, each ``(R, N * M)``."""
        runs, lineages = carry[LOG_H].shape
        family = torch.arange(lineages).repeat_interleave(self.options.num_children)
        repeated = self.gather(carry, family.expand(runs, -1))
        children, log_ratio = self.bound.move(repeated, k, generator)
        log_h = self.bound.log_twist(children, k + 1, generator)
        assert log_h is not None
        return children, torch.as_tensor(log_ratio).expand_as(log_h), log_h

    def _check_greed(self, gain: Tensor, log_score: Tensor, k: int) -> None:
        """Take exactness back, or warn, where the choice is greedier than weights can undo."""
        alive = gain.amax(-1) > -torch.inf
        log_share, log_chance = gain[alive].log_softmax(-1), log_score[alive].log_softmax(-1)
        lost = (log_chance < LEAST_CHANCE) & (log_share > LEAST_SHARE)
        self.exact = self.exact and not bool(lost.any())
        # Importance sampling takes about exp(relative entropy) draws (Chatterjee, Diaconis 2018).
        excess = torch.where(log_share > -torch.inf, log_share - log_chance, 0.0)
        needed = _upper_decile((log_share.exp() * excess).sum(-1))
        if self._warned or needed <= max(1.0, math.log(carried := gain.shape[1]) - GREED):
            return
        self._warned = True
        warnings.warn(
            f"SoftValueGuidance: alpha={self.options.alpha:g} chooses so greedily at step {k} that "
            f"the weights take about exp({needed:.1f}) particles to undo it, not {carried}; raise "
            "alpha or use weighted=False.",
            stacklevel=2,
        )

    def _log_score(self, gain: Tensor) -> Tensor:
        """Return the log of what children are chosen in proportion to, ``(R, N, M)``."""
        if self.options.alpha > 0:
            return gain / self.options.alpha
        return torch.where(gain == gain.amax(-1, keepdim=True), 0.0, -torch.inf)

    def _choose(self, log_score: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the chosen child of each family, int64 ``(R, N)``."""
        if log_score.shape[-1] == 1:
            return torch.zeros(log_score.shape[:-1], dtype=torch.int64)
        top = log_score.amax(-1, keepdim=True)
        level = torch.where(top == -torch.inf, 0.0, log_score - top)
        noise = uniforms(tuple(log_score.shape[:-1]), generator=generator)
        chosen: Tensor = draw_categorical(level, noise)
        return chosen

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return the value of each lineage; without weights only what is forbidden counts."""
        log_h: Tensor = carry[LOG_H]
        if self.options.weighted:
            return log_h
        if k < self.num_steps:
            return None
        return torch.where(log_h == -torch.inf, log_h, 0.0)

    def log_potential(self, trace: SMCTrace) -> Tensor:
        """Return ``log G(x0)``, the value of the last chosen child."""
        log_h: Tensor = trace.carry[LOG_H]
        return log_h


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
