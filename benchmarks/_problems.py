"""Markov-chain problems whose answers are known: the ground the accuracy benchmark stands on.

The *ideal* posterior is ``P(x) G(x) / Z`` with ``P`` the Markov chain. A reverse chain of ``T``
factorised steps has a law of its own, ``P^T``, and SMC is exact for ``P^T(x) G(x)``, the
*declared* target. Both normalising constants are computed here without sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel, Kernel, Process, Uniform
from ppl_diffusion.testing import all_states, state_index

DATA = Path(__file__).with_name("problems.json")


@dataclass(frozen=True, eq=False)
class Problem:
    """A Markov chain with a pair potential and, for short chains, one between the two ends.

    :param name: how tables call it.
    :param length: number ``L`` of positions.
    :param initial: law of the first token, ``(V,)``.
    :param transition: row-stochastic, ``(V, V)``.
    :param pair: log-potential of each pair of neighbours, ``(V, V)``.
    :param ends: log-potential of equal first and last tokens.
    :param log_z: published log normalising constant of the ideal posterior.
    """

    name: str
    length: int
    initial: Tensor
    transition: Tensor
    pair: Tensor
    ends: float
    log_z: float

    @classmethod
    def load(cls, name: str) -> Problem:
        """Read a problem from ``problems.json``.

        :param name: ``"B0"`` or ``"B1"``.
        """
        entry = json.loads(DATA.read_text(encoding="utf-8"))[name]
        transition = torch.tensor(entry["transition"], dtype=torch.float64)
        pair = torch.zeros_like(transition)
        pair[tuple(entry["pair"])] = entry["pair_weight"]
        initial = torch.tensor(entry["initial"], dtype=torch.float64)
        ends, log_z = entry["ends_weight"], entry["log_z"]
        return cls(name, entry["length"], initial, transition, pair, ends, log_z)

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of tokens."""
        return len(self.initial)

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return ``log G(x0)``, float64 ``(*batch,)``.

        :param x0: int64 ``(*batch, L)``.
        """
        pairs = self.pair[x0[..., :-1], x0[..., 1:]].sum(-1)
        return pairs + self.ends * (x0[..., 0] == x0[..., -1]).to(torch.float64)

    def log_prior(self, x0: Tensor) -> Tensor:
        """Return ``log P(x0)``, float64 ``(*batch,)``.

        :param x0: int64 ``(*batch, L)``.
        """
        moves = self.transition.log()[x0[..., :-1], x0[..., 1:]]
        return self.initial.log()[x0[..., 0]] + moves.sum(-1)

    def chain(self, num_steps: int) -> ReverseChain:
        """Return the masked reverse chain with the exact denoiser.

        :param num_steps: number ``T`` of equal time steps.
        """
        return self._chain(Absorbing(self.vocab_size), num_steps)

    def uniform_chain(self, num_steps: int) -> ReverseChain:
        """Return the reverse chain of uniform noise with the exact denoiser.

        :param num_steps: number ``T`` of equal time steps.
        """
        return self._chain(Uniform(self.vocab_size), num_steps)

    def _chain(self, process: Process, num_steps: int) -> ReverseChain:
        denoiser = MarkovDenoiser(self.initial, self.transition, process)
        kernel = InterpolatingKernel(process, denoiser, num_steps=num_steps)
        return ReverseChain(kernel, length=self.length)

    def scaled(self, scale: float) -> Problem:
        """Return the problem with ``scale`` times the potential.

        :param scale: the factor.
        """
        return replace(self, pair=self.pair * scale, ends=self.ends * scale)

    def annealed(self, beta: float) -> Problem:
        """Return the problem with ``P**beta``, not normalised, in place of ``P``.

        :param beta: the power.
        """
        return replace(self, initial=self.initial**beta, transition=self.transition**beta)

    @cached_property
    def posterior(self) -> ExactPosterior:
        """The ideal posterior: by enumeration if the ends interact, by messages otherwise."""
        return _enumerated_posterior(self) if self.ends else _message_posterior(self)


@dataclass(frozen=True, eq=False)
class ExactPosterior:
    """What is known about a posterior without sampling it by SMC.

    :param log_z: log normalising constant.
    :param marginals: law of the token at each position, ``(L, V)``.
    :param table: law of the whole sequence, ``(V ** L,)``, or None for long ones.
    :param draw: ``(n, generator) -> int64 (n, L)``, exact independent draws.
    """

    log_z: float
    marginals: Tensor
    table: Tensor | None
    draw: Callable[[int, torch.Generator], Tensor]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the L1 distance over the last axis.

    :param p: probabilities.
    :param q: probabilities.
    """
    return (p - q).abs().sum(-1) / 2


def _enumerated_posterior(problem: Problem) -> ExactPosterior:
    sequences = all_states(problem.vocab_size, problem.length)
    log_joint = problem.log_prior(sequences) + problem.log_potential(sequences)
    return tabulated(log_joint, problem.vocab_size, problem.length)


def tabulated(log_joint: Tensor, vocab_size: int, length: int) -> ExactPosterior:
    """Return everything about a law whose unnormalised table is known.

    :param log_joint: ``(V ** L,)``, in the order of :func:`all_states`.
    :param vocab_size: number ``V`` of tokens.
    :param length: number ``L`` of positions.
    """
    sequences = all_states(vocab_size, length)
    log_z = torch.logsumexp(log_joint, 0)
    table = (log_joint - log_z).exp()
    hits = torch.nn.functional.one_hot(sequences, vocab_size).to(torch.float64)
    marginals = torch.einsum("s,slv->lv", table, hits)

    def draw(num: int, generator: torch.Generator) -> Tensor:
        return sequences[torch.multinomial(table, num, replacement=True, generator=generator)]

    return ExactPosterior(float(log_z), marginals, table, draw)


def _message_posterior(problem: Problem) -> ExactPosterior:
    """Transfer matrices: ``m_l(v) = sum of P G over everything after position l``."""
    transfer = problem.transition * problem.pair.exp()
    messages, log_scale = [torch.ones_like(problem.initial)], 0.0
    for _ in range(problem.length - 1):
        message = transfer @ messages[-1]
        log_scale += math.log(float(message.sum()))
        messages.append(message / message.sum())
    messages.reverse()
    first = problem.initial * messages[0]
    moves = [transfer * message for message in messages[1:]]
    moves = [move / move.sum(-1, keepdim=True) for move in moves]
    marginals = [first / first.sum()]
    for move in moves:
        marginals.append(marginals[-1] @ move)

    def draw(num: int, generator: torch.Generator) -> Tensor:
        start = torch.multinomial(marginals[0], num, replacement=True, generator=generator)
        tokens = [start]
        for move in moves:
            rows = move[tokens[-1]]
            tokens.append(torch.multinomial(rows, 1, generator=generator)[:, 0])
        return torch.stack(tokens, -1)

    log_z = math.log(float(first.sum())) + log_scale
    return ExactPosterior(log_z, torch.stack(marginals), None, draw)


def declared_log_z(problem: Problem, num_steps: int) -> float:
    """Return ``log E[G(x0)]`` under the ``T``-step reverse chain, exactly.

    :param problem: the problem.
    :param num_steps: number ``T`` of equal time steps.
    """
    if not problem.ends:
        return _gap_log_z(problem, num_steps)
    log_g = problem.log_potential(all_states(problem.vocab_size, problem.length))
    return math.log(float((chain_table(problem, num_steps) * log_g.exp()).sum()))


def chain_table(problem: Problem, num_steps: int) -> Tensor:
    """Return the law ``P^T`` of the clean sequence of a short chain, float64 ``(V ** L,)``.

    Only moves that reveal are followed; what a move costs beyond the denoiser's probabilities
    depends on how many sites it reveals and how many it leaves masked.

    :param problem: a problem with few sequences.
    :param num_steps: number ``T`` of equal time steps.
    """
    kernel, mask = problem.chain(num_steps).kernel, problem.vocab_size
    before, after = _refinements(mask, problem.length)
    revealed = (before == mask) & (after != mask)
    log_d = kernel.denoiser(before, 0.5).gather(-1, after.clamp_max(mask - 1)[..., None])[..., 0]
    tokens = torch.where(revealed, log_d, 0.0).sum(-1).exp()
    num_revealed, num_masked = revealed.sum(-1), (after == mask).sum(-1)
    origin, goal = state_index(before, mask + 1), state_index(after, mask + 1)
    law = torch.zeros((mask + 1) ** problem.length, dtype=torch.float64)
    law[-1] = 1.0
    for reveal in torch.tensor(_reveal_probs(kernel), dtype=torch.float64):
        move = tokens * reveal**num_revealed * (1 - reveal) ** num_masked
        law = torch.zeros_like(law).index_add(0, goal, law[origin] * move)
    return law[state_index(all_states(mask, problem.length), mask + 1)]


def _refinements(mask: int, length: int) -> tuple[Tensor, Tensor]:
    """Return all pairs of a masked state and one with the same or fewer masks."""
    pairs = [(v, v) for v in range(mask)] + [(mask, s) for s in range(mask + 1)]
    chosen = torch.tensor(pairs)[all_states(len(pairs), length)]
    return chosen[..., 0], chosen[..., 1]


def _reveal_probs(kernel: Kernel) -> list[float]:
    """Return the probability that a masked site is revealed in each step."""
    return [
        float((b - a) / (1 - a)) for a, b in zip(kernel.alphas, kernel.alphas[1:], strict=False)
    ]


def _gap_log_z(problem: Problem, num_steps: int) -> float:
    """Return :func:`declared_log_z` of a pair potential at any length.

    Revealed tokens cut the sequence into gaps that evolve independently: with the exact denoiser
    of a Markov chain a site's law inside a gap depends on the gap's two ends only. So a gap's
    expected potential obeys a recursion in its length and in the number of steps taken.
    """
    size, length = problem.vocab_size, problem.length
    laws = _gap_laws(problem)
    expected = torch.zeros(length + 1, size + 1, size + 1, dtype=torch.float64)
    expected[0] = 1.0
    expected[0, :size, :size] = problem.pair.exp()
    for reveal in reversed(_reveal_probs(problem.chain(num_steps).kernel)):
        expected = _gap_step(expected, laws, reveal)
    return math.log(float(expected[length, size, size]))


def _gap_step(expected: Tensor, laws: Tensor, reveal: float) -> Tensor:
    """Return the expected potential of every gap one reverse step earlier.

    :param expected: ``(L + 1, V + 1, V + 1)``: by number of masked sites, left end and right end
        of the gap; index ``V`` is an open end, beyond which there is nothing.
    :param laws: ``(L + 1, V + 1, V + 1, L, V)``: law of each site inside such a gap.
    :param reveal: probability that a masked site is revealed in this step.
    """
    size, length = laws.shape[-1], laws.shape[-2]
    hidden = (1 - reveal) ** torch.arange(length + 1, dtype=torch.float64)
    stay = hidden[:, None, None] * expected
    # reached[..., p, v]: expected potential left of p when p is the last site revealed so far.
    reached = torch.zeros_like(laws)
    for p in range(length):
        before = stay[p, :, :size][None, :, None, :].expand(*laws.shape[:3], size)
        if p > 0:
            inner = stay[:p, :size, :size].flip(0)
            before = before + torch.einsum("nabqu,quv->nabv", reached[..., :p, :], inner)
        reached[..., p, :] = reveal * laws[..., p, :] * before
    earlier = stay.clone()
    for n in range(1, length + 1):
        after = stay[:n, :size, :].flip(0)
        earlier[n] = earlier[n] + torch.einsum("abpv,pvb->ab", reached[n, :, :, :n], after)
    return earlier


def _gap_laws(problem: Problem) -> Tensor:
    """Return the law of site ``p`` of a gap with ``n`` masked sites, ``(L + 1, V+1, V+1, L, V)``.

    Entries with ``p >= n`` are zero.
    """
    size, length = problem.vocab_size, problem.length
    left, right = _reach(problem)
    laws = torch.zeros(length + 1, size + 1, size + 1, length, size, dtype=torch.float64)
    for n in range(1, length + 1):
        weights = left[1 : n + 1, :, None] * right[1 : n + 1].flip(0).mT[:, None]
        laws[n, :, :, :n] = (weights / weights.sum(-1, keepdim=True)).permute(1, 2, 0, 3)
    return laws


def _reach(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return ``P(v at distance d | left end)`` and ``P(right end at distance d | v)``.

    Shapes ``(L + 1, V + 1, V)`` and ``(L + 1, V, V + 1)``; distance 0 is not used.
    """
    powers = [torch.eye(problem.vocab_size, dtype=torch.float64)]
    for _ in range(problem.length):
        powers.append(powers[-1] @ problem.transition)
    stacked = torch.stack(powers)
    starts = torch.stack([problem.initial @ powers[max(d - 1, 0)] for d in range(len(powers))])
    left = torch.cat([stacked, starts[:, None]], 1)
    right = torch.cat([stacked, torch.ones_like(stacked[..., :1])], -1)
    return left, right
