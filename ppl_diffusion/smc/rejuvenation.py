"""Moves of whole paths by masking again: what ancestor sampling cannot do for masked chains.

A state of a masked chain nearly determines its ancestor, so particles that coalesced stay so. These
Metropolis-Hastings moves leave ``p(path) G(x0)^beta`` invariant for *any* denoiser:

- *suffix refresh*: forget the last steps of a path and take them again by the chain itself; the
  proposal is the conditional law under ``p``, so only the change of ``G`` is weighed;
- *order refresh*: keep ``x0`` and draw anew when each position was revealed; ``G`` does not
  change, and only the change of the denoiser's probabilities is weighed (an exact denoiser, one
  position per step, always accepts). The next suffix then touches other positions.

Waste-free resampling (Dau and Chopin 2022, JRSS-B 84) keeps every state such moves pass through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.kernels.base import SAMPLE_ONLY
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.feynman_kac import draw_step, per_particle
from ppl_diffusion.smc.resampling import Resampler, Stratified


class PathState(NamedTuple):
    """Paths of particles and the potential of their ends.

    :param path: int64 ``(R, N, *plates, T + 1, L)``.
    :param log_g: ``log G(x0)``, float64 ``(R, N)``.
    """

    path: Tensor
    log_g: Tensor

    @property
    def x0(self) -> Tensor:
        """Clean sequences, int64 ``(R, N, *plates, L)``."""
        return self.path[..., -1, :]


class PathModel:
    """What path moves need: a chain behind a cache, and a potential.

    :param chain: the reverse chain; plates in its batch shape belong to every particle.
    :param log_potential: ``x0 (R, N, *plates, L) -> log G (R, N)`` or ``(R, N, *plates)``.
    :param max_rows: largest number of rows sent to the network at once.
    """

    def __init__(
        self,
        chain: ReverseChain,
        log_potential: Callable[[Tensor], Tensor],
        *,
        max_rows: int | None = 4096,
    ) -> None:
        known = chain.kernel.denoiser
        if not isinstance(known, EvaluatedDenoiser):  # else its answers are shared
            known = EvaluatedDenoiser(known, max_rows=max_rows)
        self.denoiser = known
        kernel = chain.kernel.with_denoiser(self.denoiser)
        same = ReverseChain(kernel, chain.length, prompt=chain.prompt, given=chain.given)
        self.chain = same.expand(chain.batch_shape)
        self._log_potential = log_potential

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far."""
        return self.denoiser.rows_evaluated

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``log G``, float64 ``(R, N)``.

        :param x0: int64 ``(R, N, *plates, L)``.
        """
        return per_particle(self._log_potential(x0))

    def state(self, path: Tensor) -> PathState:
        """Return the state of given paths.

        :param path: int64 ``(R, N, *plates, T + 1, L)``.
        """
        return PathState(path, self.log_potential(path[..., -1, :]))

    def log_prob(self, path: Tensor) -> Tensor:
        """Return the log-probability of paths, float64 ``(R, N)``.

        :param path: int64 ``(R, N, *plates, T + 1, L)``.
        """
        return per_particle(self.chain.log_prob(path))


class PathMove(ABC):
    """A Markov kernel on paths that leaves ``p(path) G(x0)^beta`` invariant."""

    name: ClassVar[str]

    @abstractmethod
    def check(self, chain: ReverseChain) -> None:
        """Refuse a chain this move is wrong for.

        :raises CapabilityError: if it is.
        """

    @abstractmethod
    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Return the states after one move, and whether it was accepted, bool ``(R, N)``.

        :param model: chain and potential.
        :param state: states of positive probability.
        :param beta: power of the potential in the invariant law.
        """


@dataclass(frozen=True)
class SuffixRefresh(PathMove):
    """Take the last steps again: costs that many network calls per particle, at most.

    :param num_steps: how many steps ``m`` are forgotten; on a chain with one reveal per step that
        many reveals.
    """

    num_steps: int
    name = "suffix"

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"SuffixRefresh: num_steps must be >= 1, got {self.num_steps}.")

    def check(self, chain: ReverseChain) -> None:
        """Refuse chains that cannot be entered at a state, or are shorter than the suffix."""
        if not chain.kernel.markov:
            raise CapabilityError(
                f"SuffixRefresh: a {type(chain.kernel).__name__} remembers more than its tokens, "
                "so its steps cannot be taken again from a state; use OrderRefresh or no move."
            )
        if self.num_steps > chain.num_steps:
            raise ValueError(
                f"SuffixRefresh: {self.num_steps} steps are more than the chain's "
                f"{chain.num_steps}; shorten the suffix."
            )

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Propose the chain's own continuation, weighed by the change of the potential."""
        chain, start = model.chain, model.chain.num_steps - self.num_steps
        carry = chain.kernel.start_carry(state.path[..., start, :], given=chain.given)
        states = list(state.path[..., : start + 1, :].unbind(-2))
        for k in range(start, chain.num_steps):
            step = chain.kernel.step(carry, k, fixed=chain.fixed)
            carry = chain.kernel.advance(carry, draw_step(step, generator), k, step=step)
            states.append(carry["tokens"])
        proposed = model.state(torch.stack(states, -2))
        log_ratio = tilt(proposed.log_g, beta) - tilt(state.log_g, beta)
        return _accept(state, proposed, log_ratio, generator)


@dataclass(frozen=True)
class OrderRefresh(PathMove):
    """Draw the reveal order again for the same ``x0``: two scorings of a whole path.

    The order of these chains does not depend on the network, so it is drawn from its own law, by
    the same kernel around a flat prediction.
    """

    name = "order"

    def check(self, chain: ReverseChain) -> None:
        """Refuse chains whose reveals are not random, or not independent of the network."""
        if not self.fits(chain):
            raise CapabilityError(
                "OrderRefresh: the order of reveals must be random and independent of the network, "
                f"with a density, which {chain.kernel!r} does not promise; use SuffixRefresh."
            )

    @staticmethod
    def fits(chain: ReverseChain) -> bool:
        """Return whether this move is right for a chain."""
        kernel = chain.kernel
        if type(kernel) is OrderedKernel:
            return kernel.capability != SAMPLE_ONLY
        # A subclass may let the network decide what is revealed.
        plain = type(kernel) is InterpolatingKernel
        return plain and kernel.process.absorbing and kernel.ancestral  # type: ignore[attr-defined]

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Propose another order, weighed by the denoiser's probabilities along both."""
        flat = _flat_chain(model.chain)
        mask = flat.kernel.process.vocab_size
        # Conditions of each particle are batch dimensions of the chain already.
        lead = state.path.shape[: state.path.ndim - 2 - len(flat.batch_shape)]
        order = flat.sample(lead, generator=generator)
        path = torch.where(order == mask, mask, state.x0[..., None, :])
        # Against the flat chain the law of the order cancels and the reveals are left.
        new, old = (model.log_prob(p) - per_particle(flat.log_prob(p)) for p in (path, state.path))
        return _accept(state, PathState(path, state.log_g), new - old, generator)


@dataclass(frozen=True)
class WasteFree(Resampler):
    """``N / P`` stratified draws, each standing for a chain of ``P`` states yet to be made.

    ``E[copies of i] = N w_i`` as for any scheme. The ``P`` copies lie side by side; whoever moves
    the population turns them into the ``P`` successive states of one chain.

    :param length: states ``P`` per chain; it must divide the number of particles.
    """

    length: int
    name = "waste-free"

    def num_uniforms(self, num_particles: int) -> int:
        """One uniform per chain.

        :raises ValueError: if ``P`` does not divide ``N``.
        """
        if self.length < 1 or num_particles % self.length:
            raise ValueError(
                f"waste-free resampling: {num_particles} particles are no whole number of chains "
                f"of {self.length} states; change one of them."
            )
        return num_particles // self.length

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        heads = Stratified().draw(uniforms, xp.log(weights))
        copies = xp.broadcast_to(heads[..., None], (*heads.shape, self.length))
        return xp.reshape(copies, weights.shape)


def tilt(log_g: Tensor, beta: float) -> Tensor:
    """Return ``beta log G``, with ``G^0 = 1`` also where ``G`` is zero.

    :param log_g: log-potentials.
    :param beta: power, at least 0.
    """
    return beta * log_g if beta > 0 else torch.zeros_like(log_g)


def _accept(
    state: PathState, proposed: PathState, log_ratio: Tensor, generator: torch.Generator | None
) -> tuple[PathState, Tensor]:
    u = uniforms(log_ratio.shape, generator=generator, device=log_ratio.device)
    accepted = u.log() < log_ratio  # never where the ratio is NaN: a dead particle stays
    wide = accepted.reshape(*accepted.shape, *[1] * (state.path.ndim - 2))
    path = torch.where(wide, proposed.path, state.path)
    return PathState(path, torch.where(accepted, proposed.log_g, state.log_g)), accepted


def _flat_chain(chain: ReverseChain) -> ReverseChain:
    kernel = chain.kernel.with_denoiser(_FlatDenoiser(chain.kernel.process.vocab_size))
    return ReverseChain(kernel, chain.length, prompt=chain.prompt).expand(chain.batch_shape)


class _FlatDenoiser:
    """Predicts every token with the same probability."""

    kind: Kind = "cavity"
    time_free = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        size = float(self.vocab_size)
        level = -torch.log(torch.tensor(size, dtype=torch.float64, device=tokens.device))
        return level.expand(*tokens.shape, self.vocab_size)
