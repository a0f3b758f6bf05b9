"""Feynman-Kac steering: score unfinished sequences now and then, and let the good ones multiply.

Singhal, Horvitz et al. (2025, arXiv:2501.06848). Particles move by the chain itself. At scored
steps a completion of each state is rated, ``r_k = log G(completion)`` (log-mean-exp over several),
and the population is weighted by a potential ``G_k``::

    difference   log G_k = r_k - r_(k-1)            max   log G_k = max of r so far
    add          log G_k = r_k                      sum   log G_k = sum of r so far

and closed at ``x0`` by ``G(x0) / prod G_k``, so that all four have the target ``p(path) G(x0)``.
They differ in where they send particles: only the difference is a twist, the others pay for their
greed with one large correction at the end. Weights accumulate over steps at which nothing is
resampled; ``-inf`` means never. The published programs close ``max`` and ``sum`` by the running
maximum and the running sum instead, which is another law: ``closing="published"`` shows it, and
its result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference._chain_program import BoundEngine, ChainProgram
from ppl_diffusion.inference._task import Task
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc.engine import Progress, SMCTrace
from ppl_diffusion.smc.feynman_kac import FeynmanKac, Proposal
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import TwistLike, as_twist

Kind = Literal["difference", "max", "sum", "add"]
Closing = Literal["exact", "published"]

RUNNING, LOG_H = "steering/running", "steering/log_h"


class FKSteering(ChainProgram):
    """Posterior sampling by Feynman-Kac steering.

    :param target: a reverse chain, or a Pyro program.
    :param potential: ``log G`` of a bare chain (a reward over its temperature); None for a program.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param kind: how scores become weights: ``"difference"``, ``"max"``, ``"sum"`` or ``"add"``.
    :param closing: ``"exact"``, or ``"published"``: ``max`` and ``sum`` end with the running value
        in place of ``log G(x0)``, and the result says ``exact=False``.
    :param every: score at every so many steps.
    :param interval: first and last step that may be scored, in steps taken, both included; all
        between the ends by default. The steps scored are ``first, first + every, ...``.
    :param twist: how states are scored: ``"argmax"``, ``"persistent"``, ``"sample"``, a fill twist
        such as ``PersistentFill(16)``, or a function ``(carry, k) -> log h (R, N)``, such as a
        trained :class:`~ppl_diffusion.inference.value_network.LearnedValue`.
    :param proposal: None moves by the chain itself; a kernel, or a proposal with a density.
    :param cache: ask the potential once per distinct sequence; changes the cost and nothing else.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :param store_path: keep the states of all steps.
    :param max_rows: largest number of rows sent to the network at once.
    :param progress: called with ``(steps done, steps in all)``.
    :raises ValueError: if a name or a number is not usable.

    Example::

        steering = FKSteering(chain, Reward(dock, temperature=0.1), every=20, interval=(20, 80))
        posterior = steering.run(seed=0)
    """

    def __init__(
        self,
        target: ReverseChain | Callable[..., Any],
        potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
        *,
        num_particles: int = 256,
        num_runs: int = 1,
        kind: Kind = "difference",
        closing: Closing = "exact",
        every: int = 1,
        interval: tuple[int, int] | None = None,
        twist: TwistLike = "argmax",
        proposal: Proposal | Kernel | None = None,
        cache: bool = True,
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
        max_rows: int | None = 4096,
        progress: Progress | None = None,
    ) -> None:
        _check_choice("kind", kind, tuple(_RULES))
        _check_choice("closing", closing, ("exact", "published"))
        _check_schedule(every, interval)
        super().__init__(
            target,
            potential,
            num_particles=num_particles,
            num_runs=num_runs,
            resampler=resampler,
            ess_threshold=ess_threshold,
            store_path=store_path,
            max_rows=max_rows,
            progress=progress,
        )
        self.kind, self.closing = kind, closing
        self.every, self.interval = every, interval
        self.twist, self.proposal, self.cache = as_twist(twist), proposal, cache
        if self.twist is None:
            raise ValueError(
                "FKSteering: twist=None scores nothing; use ImportanceSampling, or a twist."
            )

    def bind(self, task: Task) -> SteeringEngine:
        """Return the engine of one run.

        :param task: chain and potential.
        :raises ValueError: if the interval holds no step of the chain.
        """
        return SteeringEngine(task, self)

    def settings(self, engine: SteeringEngine) -> dict[str, Any]:
        """Return what was chosen, in JSON types.

        :param engine: the engine of the run.
        """
        return {
            "method": "steering",
            "kind": self.kind,
            "closing": self.closing,
            "scored_steps": engine.scored,
            "twist": engine.bound.model.settings["twist"],
            "proposal": engine.bound.model.settings["proposal"],
            "cache": self.cache,
            "resampler": self.resampler.name,
            "ess_threshold": self.ess_threshold,
        }


class SteeringEngine(BoundEngine):
    """A task during one run of :func:`~ppl_diffusion.smc.smc_loop`.

    The carry holds, besides the tokens, the running maximum or sum of each particle's scores and
    the log of the product of its potentials so far.

    :param task: chain and potential.
    :param options: the program's options.

    :ivar log_g: ``log G(x0)`` of the final states, once there are any.
    """

    log_g: Tensor

    def __init__(self, task: Task, options: FKSteering) -> None:
        self.rule = _RULES[options.kind]
        self.published = options.closing == "published" and options.kind in ("max", "sum")
        self.exact = not self.published
        self.kind = options.kind
        proposal = task.guided_proposal("FKSteering", options.proposal)
        model = FeynmanKac(task.chain, task.potential, options.twist, proposal)
        super().__init__(task, model, max_rows=options.max_rows, cache=options.cache)
        self.scored = _scored_steps(self.num_steps, options.every, options.interval)

    @property
    def target(self) -> str:
        """The law weighted particles tend to, in words."""
        if self.exact:
            return self.task.target
        value = {"max": "largest", "sum": "sum"}[self.kind]
        return (
            f"p(path) * exp(the {value} of log G over the scored completions and x0) of the "
            f"{self.num_steps}-step reverse chain, normalised, with log G = {self.task.name}: the "
            "published closing, which is not p(path) * G(x0); log_evidence estimates the log of "
            "that law's normalising constant"
        )

    def init(self, runs: int, particles: int, generator: torch.Generator | None) -> Carry:
        """Return the noisiest states; nothing is scored yet."""
        carry = self.bound.init(runs, particles, generator)
        zeros = torch.zeros((runs, particles), dtype=torch.float64)
        # Before the first score a maximum is -inf: starting it at 0 would ignore negative scores.
        start = torch.full_like(zeros, -torch.inf) if self.kind == "max" else zeros
        return {**carry, RUNNING: start, LOG_H: zeros}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Move by the chain (or the proposal), then score the new state where it is due."""
        moved, log_ratio = self.bound.move(carry, k, generator)
        if k + 1 in self.scored:
            score = self.bound.log_twist(moved, k + 1, generator)
            assert score is not None
            running, log_h = self.rule(moved[RUNNING], moved[LOG_H], score)
            moved = {**moved, RUNNING: running, LOG_H: log_h}
        return moved, log_ratio

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return the log of the product of potentials, closed by ``log G(x0)`` at the end."""
        if k < self.num_steps:
            log_h: Tensor = carry[LOG_H]
            return log_h
        log_g = self.bound.log_twist(carry, k, generator)
        assert log_g is not None
        self.log_g = log_g
        if not self.published:
            return log_g
        running: Tensor = carry[RUNNING]
        return torch.maximum(running, log_g) if self.kind == "max" else running + log_g

    def log_potential(self, trace: SMCTrace) -> Tensor:
        """Return ``log G(x0)``, which a published closing is not."""
        return self.log_g


# (running value, log prod G_j, score) -> (running value, log prod G_j), each (R, N).
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _difference(running: Tensor, log_h: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    return score, score


def _max(running: Tensor, log_h: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.maximum(running, score)
    return best, log_h + best


def _sum(running: Tensor, log_h: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    total = running + score
    return total, log_h + total


def _add(running: Tensor, log_h: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    return score, log_h + score


_RULES: dict[str, Rule] = {"difference": _difference, "max": _max, "sum": _sum, "add": _add}


def _scored_steps(num_steps: int, every: int, interval: tuple[int, int] | None) -> list[int]:
    first, last = interval or (1, num_steps)
    found = list(range(first, min(last, num_steps - 1) + 1, every))
    if interval is not None and not found:
        raise ValueError(
            f"FKSteering: interval={interval} holds no state between the ends of a "
            f"{num_steps}-step chain; give steps within 1..{num_steps - 1}."
        )
    return found


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"FKSteering: unknown {what}={value!r}; choose one of {', '.join(choices)}."
        )


def _check_schedule(every: int, interval: tuple[int, int] | None) -> None:
    if every < 1:
        raise ValueError(f"FKSteering: every must be >= 1, got {every}.")
    if interval is not None and not 1 <= interval[0] <= interval[1]:
        raise ValueError(
            f"FKSteering: interval must be (first, last) with 1 <= first <= last, got {interval}."
        )
