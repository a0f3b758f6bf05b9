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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.feynman_kac import draw_step, per_particle
from ppl_diffusion.smc.path_state import PathModel as PathModel
from ppl_diffusion.smc.path_state import PathMove as PathMove
from ppl_diffusion.smc.path_state import PathState as PathState
from ppl_diffusion.smc.path_state import accept
from ppl_diffusion.smc.path_state import tilt as tilt
from ppl_diffusion.smc.resampling import Resampler, Stratified
from ppl_diffusion.smc.reveals import RevealTable, reveals_alone


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

    def num_rows(self, chain: ReverseChain) -> float:
        """Return a row for every step that is taken again."""
        return float(self.num_steps)

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
        proposed = model.state(torch.stack(states, -2), _prefix(state, start, chain))
        log_ratio = tilt(proposed.log_g, beta) - tilt(state.log_g, beta)
        return accept(state, proposed, log_ratio, generator)


@dataclass(frozen=True)
class OrderRefresh(PathMove):
    """Draw anew when positions are revealed, for the same ``x0``.

    The order of these chains does not depend on the network, so it is drawn from its own law, by
    the same kernel around a flat prediction. What the old order's reveals were worth is remembered
    from move to move, so that a move scores the new order alone.

    With a window only so many consecutive places, anywhere in the order, are dealt anew. Positions
    that are revealed in one step stand in random order. The proposal is symmetric, and what is
    conditioned on changes inside the window alone: it costs a row for each of its steps.

    :param window: places that are dealt anew; None for the whole order.
    :param tail: whether the window is that of the last places, not a random one.
    :param paid: whether the denoiser's probabilities along both orders are weighed. The published
        moves do not: that costs nothing, and is right where all conditionals of the denoiser belong
        to one joint law (:func:`ppl_diffusion.diagnostics.order_sd` is zero) and nowhere else.
    """

    window: int | None = None
    tail: bool = False
    paid: bool = True
    name = "order"
    renews = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise ValueError(f"OrderRefresh: window must be >= 2 or None, got {self.window}.")

    @property
    def exact(self) -> bool:
        """Whether it weighs what it does."""
        return self.paid

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
        return reveals_alone(chain)

    def num_rows(self, chain: ReverseChain) -> float:
        """Return a row for every step whose reveals may change."""
        if not self.paid:
            return 0.0
        if self.window is None:
            return float(chain.num_steps)
        return float(min(-(-self.window * chain.num_steps // chain.length) + 1, self.window))

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Propose another order, weighed by the denoiser's probabilities along both."""
        table = RevealTable.of(model, state)
        if self.window is None:
            step_of = _fresh_order(table, state, generator)
            first = torch.zeros_like(step_of[:, 0])
            last = first + model.chain.num_steps
        else:
            step_of, first, last = _dealt_window(table, self.window, self.tail, generator)
        if not self.paid:
            dealt = state._replace(path=table.path(table.x0, step_of), log_c=None)
            return dealt, torch.ones_like(state.log_g, dtype=torch.bool)
        changed = table.between(first, last)
        # Equal numbers of reveals are dealt in a window; a fresh order may fill other steps.
        renewed = replace(table, step_of=step_of).between(first, last)
        unknown = changed & table.at_steps(table.log_c.isnan())
        new, old = table.score([(step_of, renewed), (table.step_of, unknown)])
        before = torch.where(old.isnan(), table.log_c, old)
        ratio = torch.where(new.isnan(), 0.0, new - before).sum(-1)
        after = torch.where(new.isnan(), before, new)
        proposed = state._replace(path=table.path(table.x0, step_of), log_c=table.whole(after))
        known = state._replace(log_c=table.whole(before))
        return accept(known, proposed, per_particle(table.whole(ratio)), generator)


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
        heads = Stratified()._ancestors(uniforms, weights)
        copies = xp.broadcast_to(heads[..., None], (*heads.shape, self.length))
        return xp.reshape(copies, weights.shape)


def _prefix(state: PathState, start: int, chain: ReverseChain) -> Tensor | None:
    """Return what is still known of a path's reveals once the steps after ``start`` are gone."""
    if state.log_c is None:
        return None
    kept = state.path[..., start, :] < chain.kernel.process.vocab_size
    return torch.where(kept, state.log_c, torch.nan)


def _fresh_order(table: RevealTable, state: PathState, generator: torch.Generator | None) -> Tensor:
    """Return when each position is revealed in paths of a flat prediction, int64 ``(B, L)``."""
    chain = table.model.chain
    kernel = chain.kernel.with_denoiser(_FlatDenoiser(chain.kernel.process.vocab_size))
    # What a path shows from the start, as its length, is no matter of order.
    shown = table.whole(torch.where(table.free, -1, table.x0))
    drawn = kernel.sample_path(table.shape, chain.length, prompt=shown, generator=generator)
    assert drawn is not None
    return RevealTable.of(table.model, PathState(drawn.path, state.log_g)).step_of


def _dealt_window(
    table: RevealTable, width: int, tail: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``step_of`` with a window dealt anew, and the first and last step it touches."""
    step_of, free = table.step_of, table.free
    length = step_of.shape[-1]
    width = min(width, length)
    shape = (*step_of.shape[:-1], length + width + 1)
    noise = uniforms(shape, generator=generator, device=step_of.device)
    ties, cards, where = noise.split([length, width, 1], -1)
    places = torch.where(free, step_of + ties, torch.inf).argsort(dim=-1)
    count = free.sum(-1, keepdim=True)
    choices = (count - width + 1).clamp_min(1)
    start = choices - 1 if tail else (where * choices).floor().to(torch.int64)
    index = start + torch.arange(width, device=step_of.device)
    sites = places.gather(-1, index)
    inside = index < count
    steps = step_of.gather(-1, sites)
    # Blocks are finished one after the other, so that positions trade places within theirs.
    block = sites // getattr(table.model.chain.kernel, "block", length)
    deal = torch.where(inside, block + cards, torch.inf).argsort(dim=-1, stable=True)
    dealt = step_of.scatter(-1, sites, steps.gather(-1, deal))
    low = torch.where(inside, steps, steps.amax(-1, keepdim=True)).amin(-1)
    high = steps.amax(-1)
    same = (dealt == step_of).all(-1)
    return dealt, torch.where(same, high + 1, low), high


class _FlatDenoiser:
    """Predicts every token with the same probability: only the order of reveals is read."""

    kind: Kind = "cavity"
    time_free = True
    num_padding = 1  # whatever fills sequences up is not read either

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        size = float(self.vocab_size)
        level = -torch.log(torch.tensor(size, dtype=torch.float64, device=tokens.device))
        return level.expand(*tokens.shape, self.vocab_size)
