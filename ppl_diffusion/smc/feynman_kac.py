"""A Feynman-Kac model of a reverse chain: how particles move and what weighs them.

Target: ``p(path) G(x0)``. With a proposal ``M`` and twists ``h_k`` (``k`` counts reverse steps
taken) the weight increments are::

    log h_0(x_0)                                                     at the start
    log K_k(x'|x) - log M_k(x'|x) + log h_{k+1}(x') - log h_k(x)     at every step

with ``h_T = G``. They telescope to ``log G(x0)`` plus the proposal's correction, whatever the
twists are: skipping or spoiling them moves variance, never the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import SAMPLE_ONLY, Kernel, check_given
from ppl_diffusion.kernels.block_step import BlockStep
from ppl_diffusion.kernels.blocks import TOKENS, Value
from ppl_diffusion.kernels.event_kernel import EventKernel
from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.potentials.base import AbstractPotential, Potential
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential
from ppl_diffusion.smc.law import Base, Law, Tilt
from ppl_diffusion.smc.support import excluded_token, missing_support
from ppl_diffusion.smc.twists import (
    FILL_UNIFORMS,
    LOG_BASE,
    CallableTwist,
    Carry,
    FillTwist,
    TwistLike,
    as_twist,
    floored,
    log_mean_exp,
    mean_lookahead,
)

LOG_PROB = "log_prob"
STATE = "state"
"""What the engine keeps of a chain at every step: its flat states."""


class Proposal(Protocol):
    """How a particle moves instead of by the model's own step."""

    def __call__(self, step: TokenStep, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the distribution to draw the next state from.

        Its support must cover the model's wherever the potential allows the result. A function
        may know what that is and is not looked into; a kernel must cover all of the model's.

        :param step: the model's step (its denoiser output can be reused at no cost).
        :param carry: the carry before the move.
        :param k: step index.
        """
        ...


class FeynmanKac:
    """A chain, a potential, and how to look ahead and propose.

    :param chain: the reverse chain; plates in its batch shape belong to every particle.
    :param potential: ``log G``: a potential, or a function ``x0 (*batch, L) -> (*batch,)``.
    :param twist: ``"defensive"`` (default), ``"argmax"``, ``"persistent"``, ``"sample"``, None
        (bootstrap), a function ``(carry, k) -> log h (R, N)``, or a twist object.
    :param proposal: None moves by the chain itself; a kernel, or a :class:`Proposal`.
    :param twist_every: evaluate the twist at every so many steps only (exact by telescoping).
    :raises CapabilityError: if a proposal, or the kernel it is used with, has no density; while
        running, if a proposal kernel excludes a token that the chain predicts.
    :raises ValueError: if a proposal kernel has another time grid, other states, or visibly never
        makes a move that the chain makes.
    """

    def __init__(
        self,
        chain: ReverseChain,
        potential: AbstractPotential | Callable[[Tensor], Tensor],
        twist: TwistLike = "defensive",
        proposal: Proposal | Kernel | None = None,
        *,
        twist_every: int = 1,
    ) -> None:
        if not isinstance(chain, ReverseChain):
            raise TypeError(
                f"FeynmanKac: chain must be a ReverseChain, got {type(chain).__name__}; "
                "wrap a kernel as ReverseChain(kernel, length)."
            )
        if not chain.kernel.parts:
            raise CapabilityError(
                f"FeynmanKac: steps of {chain.kernel!r} are not random, so that copies made by "
                "resampling would never part again; take a solver with noise, such as Ancestral(), "
                "or make the noise a latent of the program (GaussianChain.noise and from_noise), "
                "which moves renew."
            )
        if isinstance(proposal, Kernel):
            _require_same_grid(chain.kernel, proposal)
            known = chain.given.keys() & proposal.conditions.keys()
            read = {name: chain.given[name] for name in known}
            check_given(proposal, read, "FeynmanKac: the proposal kernel")
        if twist_every < 1:
            raise ValueError(f"twist_every must be >= 1, got {twist_every}.")
        if proposal is not None and chain.kernel.capability == SAMPLE_ONLY:
            raise CapabilityError(
                f"a proposal needs a kernel with a density, this one is {SAMPLE_ONLY}; "
                "use proposal=None."
            )
        if isinstance(proposal, Kernel) and proposal.capability == SAMPLE_ONLY:
            raise CapabilityError(
                f"a proposal needs a density, but {type(proposal).__name__} is {SAMPLE_ONLY}; "
                "propose by a kernel with a density."
            )
        check_chain = getattr(proposal, "check_chain", None)
        if check_chain is not None:
            check_chain(chain.kernel.process)
        self.chain = chain
        self.potential = (
            potential if isinstance(potential, AbstractPotential) else Potential(potential)
        )
        self.twist = as_twist(twist)
        self.proposal = proposal
        self.twist_every = twist_every

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return self.chain.num_steps

    @property
    def law(self) -> Law:
        """What weighted particles are exact for."""
        return Law.tilted([Base.of(self.chain)], [Tilt.by(self.potential)])

    @property
    def target(self) -> str:
        """The law in words."""
        return str(self.law)

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, in JSON types."""
        twist = None if self.twist is None else self.twist.name
        proposal = None if self.proposal is None else type(self.proposal).__name__
        return {"twist": twist, "twist_every": self.twist_every, "proposal": proposal}

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal instead of along the grid.

        A function of the state, of a step or of every so many steps counts steps of the grid.
        """
        counts = self.twist_every > 1 or isinstance(self.twist, CallableTwist)
        fits = self.proposal is None or getattr(self.proposal, "any_clock", False)
        return fits and not counts

    def bind(
        self,
        *,
        max_rows: int | None = None,
        track_log_prob: bool = False,
        on_events: bool = False,
    ) -> BoundFeynmanKac:
        """Return the model with fresh caches and counters, ready for one run.

        :param max_rows: largest number of rows sent to the network at once, None for what suits it.
        :param track_log_prob: carry each path's log-probability along as ``"log_prob"``.
        :param on_events: go from reveal to reveal where that can be done.
        """
        return BoundFeynmanKac(
            self, max_rows=max_rows, track_log_prob=track_log_prob, on_events=on_events
        )


@dataclass
class BoundFeynmanKac:
    """A :class:`FeynmanKac` during one run: its caches and its costs.

    :param model: what is run.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :param track_log_prob: carry each path's log-probability along.
    :param on_events: go from reveal to reveal where that can be done
        (:class:`~ppl_diffusion.kernels.EventKernel`).
    """

    model: FeynmanKac
    max_rows: int | None = None
    track_log_prob: bool = False
    on_events: bool = False
    denoiser: EvaluatedDenoiser = field(init=False)
    potential: EvaluatedPotential = field(init=False)

    def __post_init__(self) -> None:
        kernel = self.model.chain.kernel
        if self.track_log_prob and not kernel.has_path_density:
            raise CapabilityError(
                f"the density of paths is needed here, but {type(kernel).__name__} is "
                f"{kernel.claim}; use a kernel with a density, or run_smc on the bare chain."
            )
        self.denoiser = EvaluatedDenoiser(kernel.denoiser, max_rows=self.max_rows)
        counted = kernel.with_denoiser(self.denoiser)
        chain, wanted = self.model.chain, self.on_events and self.model.on_events
        rounds = counted.on_events(chain.num_free) if wanted and not self.track_log_prob else None
        self._kernel = rounds or counted
        self._proposal, self._proposal_denoiser = self._bind_proposal()
        twist = self.model.twist
        self._twist = twist.at(self._kernel) if isinstance(twist, CallableTwist) else twist
        self.potential = EvaluatedPotential(self.model.potential)

    def _bind_proposal(self) -> tuple[Proposal | None, EvaluatedDenoiser | None]:
        proposal = self.model.proposal
        if not isinstance(proposal, Kernel):
            return proposal, None
        # One network behind model and proposal is asked once per state.
        shared = proposal.denoiser is self.model.chain.kernel.denoiser
        denoiser = (
            self.denoiser
            if shared
            else EvaluatedDenoiser(proposal.denoiser, max_rows=self.max_rows)
        )
        return KernelProposal(proposal.with_denoiser(denoiser), self.model.chain.fixed), denoiser

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        asked = {id(d): d for d in (self.denoiser, self._proposal_denoiser) if d is not None}
        return sum(denoiser.rows_evaluated for denoiser in asked.values())

    @property
    def num_potential_calls(self) -> int:
        """Distinct sequences the potential was asked about so far."""
        return self.potential.num_calls

    @property
    def kernel(self) -> Kernel:
        """The chain's kernel around the counted network."""
        return self._kernel

    @property
    def num_steps(self) -> int:
        """Number of its steps: those of the chain, or the rounds in which it is revealed."""
        return self._kernel.num_steps

    def begin(self, carry: Carry, k: int, generator: torch.Generator | None) -> tuple[Carry, bool]:
        """Return a carry that can make step ``k``, and whether nothing is left to be done in it."""
        kernel = self._kernel
        if not isinstance(kernel, EventKernel):
            return carry, False
        # What the last round reveals is settled: copies made since share it, and draw their tokens.
        if k + 1 < self.num_steps:
            carry = kernel.redrawn(carry, generator)
        return carry, kernel.rounds_left(carry) == 0

    def foresee(self, carry: Carry, k: int, generator: torch.Generator | None) -> tuple[Carry, int]:
        """Return a carry that knows its rounds, and the step that is made next.

        :param k: the step that would be next; the last one is if nothing is left after it.
        """
        kernel = self._kernel
        if not isinstance(kernel, EventKernel):
            return carry, k
        carry = kernel.planned(kernel.redrawn(carry, generator))
        return carry, k if (kernel.rounds_left(carry) or 0) > 1 else self.num_steps - 1

    @property
    def knows_path(self) -> bool:
        """Whether the carry of complete states holds their paths."""
        return isinstance(self._kernel, EventKernel)

    def path(self, carry: Carry) -> Tensor:
        """Return the whole path of complete states, ``(R, N, *plates, T + 1, L)``."""
        assert isinstance(self._kernel, EventKernel)
        return self._kernel.path(carry)

    def init(
        self,
        runs: int,
        particles: int,
        generator: torch.Generator | None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of the noisiest state, tokens ``(R, N, *plates, L)``.

        :param given: conditions of each particle, ``(R, N, *plates, *event)``; by default those of
            the chain.
        """
        chain, twist = self.model.chain, self.model.twist
        batch = (runs, particles, *chain.batch_shape)
        given = chain.given if given is None else given
        carry = self._kernel.init_carry(
            batch, chain.length, prompt=chain.prompt, generator=generator, given=given
        )
        if isinstance(twist, FillTwist):
            noise = twist.init((*batch, chain.length), generator)
            if noise is not None:
                carry[FILL_UNIFORMS] = noise.to(carry["tokens"].device)
        if isinstance(self._proposal, KernelProposal):
            carry = {**carry, **self._proposal.start(carry["tokens"], given)}
        if self.track_log_prob:
            begun = self._kernel.split(self._kernel.flat(carry))
            carry[LOG_PROB] = per_particle(self._kernel.prior_log_prob(begun, chain.prompt))
        return carry

    def record(self, carry: Carry) -> dict[str, Tensor]:
        """Return what is kept of a carry at every step."""
        return {STATE: self._kernel.flat(carry)}

    def move(
        self, carry: Carry, k: int, generator: torch.Generator | None
    ) -> tuple[Carry, Tensor | float]:
        """Return the carry after step ``k`` and ``log K - log M``, ``(R, N)`` or 0."""
        carry, idle = self.begin(carry, k, generator)
        if idle:
            return carry, 0.0
        step = self._kernel.step(carry, k, fixed=self.model.chain.fixed)
        proposal = step if self._proposal is None else self._proposal(step, carry, k)
        value = self._draw(proposal, k, generator)
        moved = self._kernel.advance(carry, value, k, step=step)
        if isinstance(self._proposal, KernelProposal):
            moved = {**moved, **self._proposal.advance(carry, value, k, proposal)}
        own = proposal is step
        if own and not self.track_log_prob:
            return moved, 0.0
        log_p = per_particle(step.log_prob(value))
        if self.track_log_prob:
            moved[LOG_PROB] = carry[LOG_PROB] + log_p
        return moved, log_p - (log_p if own else per_particle(proposal.log_prob(value)))

    def _draw(self, moves: TorchDistribution, k: int, generator: torch.Generator | None) -> Value:
        return draw_step(moves, generator)

    def log_twist(self, carry: Carry, k: int, generator: torch.Generator | None) -> Tensor | None:
        """Return ``log h_k``, ``(R, N)``: the potential at ``T``, None where not evaluated."""
        model, tokens = self.model, carry["tokens"]
        if k == self.num_steps:
            return per_particle(self.potential(tokens))
        twist = self._twist
        if twist is None or k % model.twist_every:
            return None
        if isinstance(twist, CallableTwist):
            return twist(carry, k, tuple(tokens.shape[:2]))
        values = self.potential.lookahead(self.fills(twist, carry, k, generator))
        return self.looked(carry, values)

    def looked(self, carry: Carry, values: Tensor) -> Tensor:
        """Return ``log h``, ``(R, N)``, of what completions are worth.

        :param carry: the carry that it weighs.
        :param values: look-aheads of the completions, ``(R, N, num_fills, *plates)``.
        """
        log_f = log_mean_exp(values.flatten(3).sum(-1) if values.ndim > 3 else values, 2)
        floor = self.model.twist.floor if isinstance(self.model.twist, FillTwist) else 0.0
        if not floor:
            return log_f
        return floored(log_f, mean_lookahead(log_f, carry[LOG_BASE]), floor)

    def fills(
        self, twist: FillTwist, carry: Carry, k: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return a twist's completions of the state, int64 ``(R, N, num_fills, *plates, L)``."""
        tokens = carry["tokens"]
        uniforms = twist.uniforms(carry.get(FILL_UNIFORMS), tuple(tokens.shape), generator)
        uniforms = None if uniforms is None else uniforms.to(tokens.device)
        return twist.fill(self._kernel.completions(carry, k), uniforms)

    def gather(self, carry: Carry, ancestors: Tensor) -> Carry:
        """Return the carry of the chosen ancestors, ``ancestors`` int64 ``(R, N)``."""
        gathered: Carry = take_particles(carry, ancestors)
        return gathered


class KernelProposal:
    """A kernel as a proposal; what it remembers travels in the particle's carry under a prefix."""

    PREFIX = "proposal/"

    def __init__(self, kernel: Kernel, fixed: Tensor | None) -> None:
        self.kernel, self.fixed = kernel, fixed

    def start(self, tokens: Tensor, given: Mapping[str, Tensor]) -> Carry:
        own = {name: given[name] for name in self.kernel.conditions}
        return self._inside(self.kernel.start_carry(tokens, given=own))

    def __call__(self, step: TokenStep, carry: Carry, k: int, /) -> TorchDistribution:
        own = self.kernel.step(self._own(carry), k, fixed=self.fixed)
        excluded = excluded_token(step, own)
        if excluded is not None:
            raise CapabilityError(
                f"FeynmanKac: the proposal kernel gives {excluded} at step {k} no probability, the "
                "chain does, and no weight makes up for what is never drawn; propose by a kernel "
                "that can go wherever the chain goes."
            )
        return own

    def advance(self, carry: Carry, value: Value, k: int, step: TorchDistribution) -> Carry:
        return self._inside(self.kernel.advance(self._own(carry), value, k, step=step))

    def _own(self, carry: Carry) -> Carry:
        size = len(self.PREFIX)
        own = {name[size:]: x for name, x in carry.items() if name.startswith(self.PREFIX)}
        return {"tokens": carry["tokens"], **own}

    def _inside(self, own: Carry) -> Carry:
        return {self.PREFIX + name: x for name, x in own.items() if name != "tokens"}


def _require_same_grid(model: Kernel, proposal: Kernel) -> None:
    states = (model.process.num_states, proposal.process.num_states)
    if not np.array_equal(model.times, proposal.times) or states[0] != states[1]:
        raise ValueError(
            f"FeynmanKac: the proposal kernel has {proposal.num_steps} steps and {states[1]} "
            f"states, the chain {model.num_steps} and {states[0]}; build both on one time grid "
            "and alphabet."
        )
    missing = missing_support(model, proposal)
    if missing is not None:
        raise ValueError(
            f"FeynmanKac: the proposal {missing}; no weight makes up for what is never drawn, so "
            "propose by a kernel that can go wherever the chain goes."
        )


def ends(kernel: Kernel, carry: Carry) -> dict[str, Tensor]:
    """Return the sites of a bare chain: the clean sequences ``x0``, and the blocks beside them."""
    return {"x0": carry[TOKENS], **{name: carry[name] for name in kernel.blocks}}


def per_particle(values: Tensor) -> Tensor:
    """Sum log-values over plates: ``(R, N, *plates) -> (R, N)``."""
    return values.flatten(2).sum(-1) if values.ndim > 2 else values


def take_particles(value: Any, ancestors: Tensor) -> Any:
    """Gather along the particle dimension of arrays ``(R, N, ...)``.

    :param value: a tensor of the carry, or nested dicts of them; anything else is passed through.
    :param ancestors: int64 ``(R, N)``.
    """
    if isinstance(value, Mapping):
        return {name: take_particles(item, ancestors) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    runs = torch.arange(ancestors.shape[0], device=ancestors.device)[:, None]
    return value[runs, ancestors]


def draw_step(distribution: TorchDistribution, generator: torch.Generator | None) -> Value:
    """Return a draw, from the generator where the distribution is ours and takes one."""
    if generator is not None and isinstance(distribution, StepDistribution | BlockStep):
        return distribution.sample(generator=generator)
    drawn: Value = distribution.sample()
    return drawn
