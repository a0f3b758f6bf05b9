"""What a particle believes about its own end, and about each of its possible children.

A :class:`Lookahead` keeps one *guess* per particle: completions of its sequence, or the law they
come from. From the guess follow the twist of the state, ``log h(x)``, and the twists of the states
that differ from it in one site, ``log h(x with site l := v)``: all ``V`` children times all
completions are one flat batch for the potential. Shapes: ``*B = (R, N, *plates)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential
from ppl_diffusion.smc.twists import CallableTwist, FillTwist, log_mean_exp

MAX_SEQUENCES = 2**14
"""Longest list of sequences that an exhaustive look-ahead will go through."""

IMPOSSIBLE = -50.0
"""Stand-in for a look-ahead of ``-inf`` (nats): an exhaustive one knows, but must stay finite."""


class Lookahead(ABC):
    """How a guess is made and read."""

    name: str

    @abstractmethod
    def guess(self, carry: Carry, log_x0: Tensor, k: int, uniforms: Tensor | None) -> Tensor:
        """Return the guess of every state, ``(*B, ...)``.

        :param carry: the states after ``k`` steps.
        :param log_x0: ``log p(x0 | x_k)`` per site, ``(*B, L, V)``.
        :param k: steps taken.
        :param uniforms: noise of the completions, ``(R, N, F, *plates, L)``, or None.
        """

    @abstractmethod
    def score(self, guess: Tensor, k: int) -> Tensor:
        """Return ``log h_k``, float64 ``(*B,)``.

        :param guess: the guesses.
        :param k: steps taken.
        """

    @abstractmethod
    def children(self, guess: Tensor, sites: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Return ``log h`` of the states with one site set, float64 ``(*B, m, s)``.

        :param guess: the guesses.
        :param sites: int64 ``(*B, m)``, the sites, each changed alone.
        :param tokens: int64 ``(*B, m, s)``, what each is set to.
        :param k: steps taken by the child.
        """

    @abstractmethod
    def moved(self, guess: Tensor, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the guess with several sites set at once: the parent's guess about its child.

        :param guess: the guesses.
        :param tokens: int64 ``(*B, L)``, the child.
        :param changed: bool ``(*B, L)``, the sites it was given.
        """


class FillLookahead(Lookahead):
    """Completions by a fill twist; ``log h`` is the log-mean-exp of their potentials.

    The guess is the completions, int64 ``(*B, F, L)``.

    :param twist: how completions are drawn.
    :param potential: the potential.
    """

    def __init__(self, twist: FillTwist, potential: EvaluatedPotential) -> None:
        self.twist, self.potential = twist, potential
        self.name = twist.name

    def guess(self, carry: Carry, log_x0: Tensor, k: int, uniforms: Tensor | None) -> Tensor:
        """Return the completions."""
        return self.twist.fill(log_x0, uniforms).movedim(2, -2)

    def score(self, guess: Tensor, k: int) -> Tensor:
        """Return the log-mean-exp over completions."""
        return log_mean_exp(self.values(guess), -1)

    def values(self, guess: Tensor) -> Tensor:
        """Return the potential's look-ahead of every completion, float64 ``(*B, F)``.

        :param guess: the completions.
        """
        return require_finite(self.potential.lookahead(guess), self.potential.potential.name)

    def children(self, guess: Tensor, sites: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Ask about all children's completions in one batch."""
        each = guess[..., None, None, :, :]
        return self.score(with_sites(each, sites[..., None, None], tokens[..., None]), k)

    def moved(self, guess: Tensor, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the completions with the child's tokens in place."""
        return torch.where(changed[..., None, :], tokens[..., None, :], guess)


class ExhaustiveLookahead(Lookahead):
    """Every completion, weighted by its probability: the limit of infinitely many sampled ones.

    The guess is the law the completions come from, ``log p(x0 | x_k)`` per site ``(*B, L, V)``,
    sites independent: it is *not* the conditional expectation of the potential. For tiny problems,
    where it shows what sampling completions costs.

    :param potential: the potential; asked once about every sequence.
    :param vocab_size: number ``V`` of clean tokens.
    :param length: number ``L`` of positions.
    :raises ValueError: if there are more than :data:`MAX_SEQUENCES` sequences.
    """

    name = "exhaustive"

    def __init__(self, potential: EvaluatedPotential, vocab_size: int, length: int) -> None:
        if vocab_size**length > MAX_SEQUENCES:
            raise ValueError(
                f"TwistedSampler: twist='exhaustive' lists all {vocab_size}**{length} sequences, "
                f"more than {MAX_SEQUENCES}; use a fill such as PersistentFill(16)."
            )
        grid = torch.cartesian_prod(*[torch.arange(vocab_size)] * length)
        self.sequences = grid.reshape(-1, length)
        self.log_g = potential(self.sequences)
        self.vocab_size = vocab_size

    def guess(self, carry: Carry, log_x0: Tensor, k: int, uniforms: Tensor | None) -> Tensor:
        """Return the law of the completions."""
        return log_x0

    def score(self, guess: Tensor, k: int) -> Tensor:
        """Return the log of the expectation over completions."""
        return torch.logsumexp(self._log_terms(guess), -1).clamp_min(IMPOSSIBLE)

    def children(self, guess: Tensor, sites: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Return the expectations with one site held, from one pass over the sequences per site."""
        held = torch.zeros_like(guess[..., :1]).expand_as(guess)
        here = torch.arange(guess.shape[-2]) == sites[..., None]  # (*B, m, L)
        free = torch.where(here[..., None], held[..., None, :, :], guess[..., None, :, :])
        terms, token = self._log_terms(free), self.sequences.T[sites]  # (*B, m, S)
        top = terms.amax(-1, keepdim=True).clamp_min(IMPOSSIBLE)
        mass = terms.new_zeros((*terms.shape[:-1], self.vocab_size))
        by_token = mass.scatter_add(-1, token, (terms - top).exp()).log() + top
        return by_token.gather(-1, tokens).clamp_min(IMPOSSIBLE)

    def moved(self, guess: Tensor, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the law with the child's tokens certain."""
        certain = torch.nn.functional.one_hot(
            tokens.clamp_max(self.vocab_size - 1), self.vocab_size
        )
        return torch.where(changed[..., None], certain.to(guess.dtype).log(), guess)

    def _log_terms(self, guess: Tensor) -> Tensor:
        """Return the log-probability of every sequence plus its log-potential, ``(*B, S)``."""
        total = self.log_g.expand(*guess.shape[:-2], -1)
        for site, token in enumerate(self.sequences.T):
            total = total + guess[..., site, :][..., token]
        return total


class StateLookahead(Lookahead):
    """A function of the state, ``(carry, k) -> log h``: a learned or an exact twist.

    The guess is the state itself, int64 ``(R, N, L)``; children are shown as further particles,
    in a carry that holds tokens alone.

    :param twist: the function.
    """

    name = "callable"

    def __init__(self, twist: CallableTwist) -> None:
        self.twist = twist

    def guess(self, carry: Carry, log_x0: Tensor, k: int, uniforms: Tensor | None) -> Tensor:
        """Return the state."""
        state: Tensor = carry["tokens"]
        return state

    def score(self, guess: Tensor, k: int) -> Tensor:
        """Return the twist of the state."""
        return self.twist({"tokens": guess}, k, (guess.shape[0], guess.shape[1]))

    def children(self, guess: Tensor, sites: Tensor, tokens: Tensor, k: int) -> Tensor:
        """Return the twists of all children, from one call."""
        states = with_sites(guess[..., None, None, :], sites[..., None], tokens)
        return self.score(states.flatten(1, 3), k).reshape(tokens.shape)

    def moved(self, guess: Tensor, tokens: Tensor, changed: Tensor) -> Tensor:
        """Return the child."""
        return tokens


class UncachedPotential(EvaluatedPotential):
    """A potential asked about every row it is shown: for comparison, and for random potentials."""

    def _evaluate(self, x0: Tensor, *, final: bool) -> Tensor:
        ask: Callable[[Tensor], Tensor] = self.potential if final else self.potential.lookahead
        rows = x0.reshape(-1, x0.shape[-1])
        self.num_calls += len(rows)
        return ask(rows).to(torch.float64).reshape(x0.shape[:-1])


def with_sites(x: Tensor, sites: Tensor, values: Tensor) -> Tensor:
    """Return copies of sequences with one site set in each, int64 ``(*C, L)``.

    :param x: sequences, broadcastable to ``(*C, L)``.
    :param sites: int64, broadcastable to ``C``.
    :param values: int64, broadcastable to ``C``.
    """
    shape = torch.broadcast_shapes(x.shape[:-1], sites.shape, values.shape)
    index, value = (t.expand(shape)[..., None] for t in (sites, values))
    return x.expand(*shape, x.shape[-1]).scatter(-1, index, value)


def require_finite(value: Tensor, name: str) -> Tensor:
    """Return look-aheads after checking that they are finite.

    :param value: look-aheads.
    :param name: the potential's name.
    :raises PotentialError: if one is not.
    """
    if not bool(torch.isfinite(value).all()):
        raise PotentialError(
            f"the look-ahead of {name} is not finite for {int((~value.isfinite()).sum())} of "
            f"{value.numel()} guesses, which would exclude tokens the target may need; return a "
            "penalty instead of -inf."
        )
    return value
