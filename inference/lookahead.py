"""What a particle believes about its own end, and about each of its possible children.

A :class:`Lookahead` keeps one *guess* per particle: completions of its sequences, or the law they
come from. From the guess follow the twist of the state, ``log h(x)``, and the twists of the states
that differ from it in one position: all children times all completions are one flat batch.
Shapes: ``*B = (R, N, *plates)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.sources import Changes, Rng, State, with_sites
from ppl_diffusion.smc.feynman_kac import per_particle
from ppl_diffusion.smc.twists import CallableTwist, FillTwist, log_mean_exp

MAX_SEQUENCES = 2**14
"""Longest list of sequences that an exhaustive look-ahead will go through."""

IMPOSSIBLE = -50.0
"""Stand-in for a look-ahead of ``-inf`` (nats): an exhaustive one knows, but must stay finite."""


class Lookahead(ABC):
    """How a guess is made and read.

    :param run: the run.
    """

    name: str

    def __init__(self, run: Bound) -> None:
        self.run = run

    @abstractmethod
    def guess(self, state: State, generator: Rng) -> Any:
        """Return the guess of every state."""

    @abstractmethod
    def score_each(self, state: State, guess: Any, site: str) -> Tensor:
        """Return ``log h``, float64, broadcastable to ``(*B,)`` of a site."""

    def score(self, state: State, guess: Any) -> Tensor:
        """Return ``log h``, float64 ``(R, N)``."""
        return per_particle(self.score_each(state, guess, next(iter(self.run.sites))))

    @abstractmethod
    def children(self, state: State, guess: Any, changes: Changes, *, last: bool) -> Tensor:
        """Return ``log h`` of the states with one position set, float64 ``(*B, m, s)``.

        :param changes: what is set.
        :param last: nothing is left to be guessed then: return the potential itself.
        """

    def _ends(self, state: State, changes: Changes) -> Tensor:
        """Return what children are worth that complete the state, which needs no guess then."""
        own = {changes.site: state["sites"][changes.site]["tokens"][:, :, None]}
        return self.run.source.children(own, changes, state, last=True)

    @abstractmethod
    def moved(self, guess: Any, site: str, tokens: Tensor, changed: Tensor) -> Any:
        """Return the guess with several positions set: the parent's guess about its child.

        :param site: the site that moved.
        :param tokens: int64 ``(*B, L)``, the child.
        :param changed: bool ``(*B, L)``, the positions it was given.
        """


class Fills(Lookahead):
    """Completions by a fill twist; ``log h`` is the log-mean-exp of what they promise.

    :param run: the run.
    :param twist: how completions are drawn.
    """

    def __init__(self, run: Bound, twist: FillTwist) -> None:
        super().__init__(run)
        self.twist, self.name = twist, twist.name

    def guess(self, state: State, generator: Rng) -> dict[str, Tensor]:
        """Return the completions of every site."""
        return self.run.guess(state, generator, self.twist)

    def score_each(self, state: State, guess: Any, site: str) -> Tensor:
        """Return the log-mean-exp over completions."""
        value = log_mean_exp(self.run.source.look(guess, state), 2)
        idle = guess[site].ndim - 2 - value.ndim  # plates of a program, which share one density
        return value.reshape(*value.shape, *[1] * idle)

    def children(self, state: State, guess: Any, changes: Changes, *, last: bool) -> Tensor:
        """Ask about all children's completions in one batch."""
        return self.run.source.children(guess, changes, state, last=last)

    def moved(self, guess: Any, site: str, tokens: Tensor, changed: Tensor) -> Any:
        """Return the completions with the child's tokens in place."""
        own = torch.where(changed[:, :, None], tokens[:, :, None], guess[site])
        return {**guess, site: own}


class Exhaustive(Lookahead):
    """Every completion, weighted by its probability: the limit of infinitely many sampled ones.

    The guess is the law the completions come from, ``log p(x0 | x_k)`` per position ``(*B, L, V)``,
    positions independent: it is *not* the conditional expectation of the potential. For tiny
    problems, where it shows what sampling completions costs.

    :param run: the run; every sequence is asked about once.
    :raises ValueError: if there are more than :data:`MAX_SEQUENCES` sequences.
    :raises CapabilityError: if a program has other latents.
    """

    name = "exhaustive"

    def __init__(self, run: Bound) -> None:
        super().__init__(run)
        site = run.only
        if site.chain.kernel.blocks:
            raise CapabilityError(
                "TwistedSampler: twist='exhaustive' lists sequences, and the chain draws "
                f"{', '.join(site.chain.kernel.blocks)} beside them; use a fill such as "
                "PersistentFill(16)."
            )
        size, length = site.chain.kernel.process.vocab_size, site.chain.length
        if size**length > MAX_SEQUENCES:
            raise ValueError(
                f"TwistedSampler: twist='exhaustive' lists all {size}**{length} sequences, "
                f"more than {MAX_SEQUENCES}; use a fill such as PersistentFill(16)."
            )
        if run.program is not None and (run.program.latents or site.chain.batch_shape):
            raise CapabilityError(
                "TwistedSampler: twist='exhaustive' rates sequences alone, and the program has "
                "other latents, or plates; use a fill such as PersistentFill(16)."
            )
        grid = torch.cartesian_prod(*[torch.arange(size, device=run.device)] * length)
        self.sequences, self.vocab_size = grid.reshape(-1, length), size
        ends = {"sites": {site.name: {"tokens": self.sequences[None]}}, "latents": {}}
        ends["log_r"] = grid.new_zeros((1, len(self.sequences)), dtype=torch.float64)  # type: ignore[assignment]
        self.log_g = run.source.final(ends)[0][0]

    def guess(self, state: State, generator: Rng) -> Tensor:
        """Return the law of the completions."""
        name = self.run.only.name
        kernel = self.run.movers[name].kernel
        return kernel.posterior_mean(state["sites"][name], state["done"][name])

    def score_each(self, state: State, guess: Any, site: str) -> Tensor:
        """Return the log of the expectation over completions."""
        return torch.logsumexp(self._log_terms(guess), -1).clamp_min(IMPOSSIBLE)

    def children(self, state: State, guess: Any, changes: Changes, *, last: bool) -> Tensor:
        """Return the expectations with one position held, from one pass over the sequences each."""
        if last:
            return self._ends(state, changes)
        _, positions, tokens = changes
        held = torch.zeros_like(guess[..., :1]).expand_as(guess)
        here = (
            torch.arange(guess.shape[-2], device=guess.device) == positions[..., None]
        )  # (*B, m, L)
        free = torch.where(here[..., None], held[..., None, :, :], guess[..., None, :, :])
        terms, token = self._log_terms(free), self.sequences.T[positions]  # (*B, m, S)
        top = terms.amax(-1, keepdim=True).clamp_min(IMPOSSIBLE)
        mass = terms.new_zeros((*terms.shape[:-1], self.vocab_size))
        by_token = mass.scatter_add(-1, token, (terms - top).exp()).log() + top
        return by_token.gather(-1, tokens).clamp_min(IMPOSSIBLE)

    def moved(self, guess: Any, site: str, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the law with the child's tokens certain."""
        certain = torch.nn.functional.one_hot(
            tokens.clamp_max(self.vocab_size - 1), self.vocab_size
        )
        return torch.where(changed[..., None], certain.to(guess.dtype).log(), guess)

    def _log_terms(self, guess: Tensor) -> Tensor:
        """Return the log-probability of every sequence plus its log-potential, ``(*B, S)``."""
        total = self.log_g.expand(*guess.shape[:-2], -1)
        for position, token in enumerate(self.sequences.T):
            total = total + guess[..., position, :][..., token]
        return total


class OfState(Lookahead):
    """A function of the state, ``(carry, k) -> log h``: a learned or an exact twist.

    The guess is the state itself, int64 ``(R, N, L)``; children are shown as further particles,
    in a carry that holds tokens alone.

    :param run: the run.
    :param twist: the function.
    :raises CapabilityError: if the chain has plates.
    """

    name = "callable"

    def __init__(self, run: Bound, twist: CallableTwist) -> None:
        super().__init__(run)
        site = run.only
        if site.chain.batch_shape:
            raise CapabilityError(
                "TwistedSampler: a twist given by a function sees whole particles, not the "
                f"plates {tuple(site.chain.batch_shape)} of the chain; run the sequences apart."
            )
        self.twist, self.site = twist, site.name

    def guess(self, state: State, generator: Rng) -> Tensor:
        """Return the state."""
        tokens: Tensor = state["sites"][self.site]["tokens"]
        return tokens

    def score_each(self, state: State, guess: Any, site: str) -> Tensor:
        """Return the twist of the state."""
        return self._at(guess, state["done"][self.site])

    def _at(self, states: Tensor, k: int) -> Tensor:
        return self.twist({"tokens": states}, k, (states.shape[0], states.shape[1]))

    def children(self, state: State, guess: Any, changes: Changes, *, last: bool) -> Tensor:
        """Return the twists of all children, from one call."""
        if last:
            return self._ends(state, changes)
        site, positions, tokens = changes
        states = with_sites(guess[..., None, None, :], positions[..., None], tokens)
        return self._at(states.flatten(1, 3), state["done"][site] + 1).reshape(tokens.shape)

    def moved(self, guess: Any, site: str, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the child."""
        return tokens
