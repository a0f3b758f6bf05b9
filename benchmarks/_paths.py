"""Path laws of short chains by enumeration: what finite chains declare, and exact draws of it.

A target here is Markov over all ``S ** L`` states: a start, a non-negative row of weights per step
and state, and an end. Messages backwards give its normalising constant, forwards its law of ``x0``,
and both together independent draws of whole paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel, Process
from ppl_diffusion.testing import all_states, site_rows

MAX_ELEMENTS = 4_000_000  # of the rows held at once

Expert = tuple[ReverseChain, float]


@dataclass(frozen=True, eq=False)
class PathTarget:
    """A law of paths over enumerated states.

    :param states: int64 ``(n, L)``, in lexicographic order.
    :param vocab_size: number ``V`` of clean tokens.
    :param start: weights of the noisiest state, ``(n,)``.
    :param rows: ``(k, states (m, L)) -> (m, n)``, weights of the next state.
    :param num_steps: number ``T`` of steps.
    :param end: weights of the last state, zero where it is not clean, ``(n,)``.
    """

    states: Tensor
    vocab_size: int
    start: Tensor
    rows: Callable[[int, Tensor], Tensor]
    num_steps: int
    end: Tensor

    @cached_property
    def _messages(self) -> tuple[list[Tensor], float]:
        """Return scaled sums over everything after each step, and the log of the scale."""
        messages, log_scale = [self.end], 0.0
        for k in reversed(range(self.num_steps)):
            parts = [self.rows(k, part) @ messages[-1] for part in self._parts(self.states)]
            message = torch.cat(parts)
            log_scale += math.log(float(message.max()))
            messages.append(message / message.max())
        return messages[::-1], log_scale

    @property
    def log_z(self) -> float:
        """Log normalising constant."""
        messages, log_scale = self._messages
        return math.log(float(self.start @ messages[0])) + log_scale

    def x0_law(self) -> Tensor:
        """Return the law of the clean sequence, float64 ``(V ** L,)``."""
        law = self.start
        for k in range(self.num_steps):
            live = law.nonzero()[:, 0]
            states, mass = self._parts(self.states[live]), self._parts(law[live])
            law = sum((m @ self.rows(k, s) for s, m in zip(states, mass, strict=True)), 0 * law)
            law = law / law.sum()
        law = (law * self.end)[(self.states < self.vocab_size).all(-1)]
        return law / law.sum()

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return independent paths, int64 ``(num, T + 1, L)``.

        :param num: how many.
        :param generator: source of randomness.
        """
        messages, _ = self._messages
        state = torch.multinomial(self.start * messages[0], num, True, generator=generator)
        path = [state]
        for k in range(self.num_steps):
            path.append(self._next(k, path[-1], messages[k + 1], generator))
        return self.states[torch.stack(path, 1)]

    def _next(self, k: int, state: Tensor, message: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next state of each path, given everything that is to come."""
        kinds, which = state.unique(return_inverse=True)
        moves = torch.empty_like(state)
        for part in self._parts(torch.arange(len(kinds))):
            here = (which >= part[0]) & (which <= part[-1])
            rows = self.rows(k, self.states[kinds[part]]) * message
            cdf = rows.cumsum(-1)[which[here] - part[0]]
            u = torch.rand(len(cdf), 1, dtype=torch.float64, generator=generator)
            found = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
            moves[here] = found[:, 0]
        return moves

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, MAX_ELEMENTS // len(self.states)))


def chain_target(
    chain: ReverseChain, log_potential: Callable[[Tensor], Tensor] | None = None
) -> PathTarget:
    """Return ``p(path) G(x0)`` of any chain whose step depends on the tokens alone.

    :param chain: a short chain.
    :param log_potential: ``log G``, none by default.
    """
    kernel = chain.kernel
    states = all_states(kernel.process.num_states, chain.length)

    def rows(k: int, tokens: Tensor) -> Tensor:
        step = kernel.step(kernel.start_carry(tokens, given=chain.given), k)
        found: Tensor = step.log_prob(states[:, None]).mT.exp()
        return found

    start = kernel.prior_log_prob(states).exp()
    end = _end(states, kernel.process, log_potential)
    return PathTarget(states, kernel.process.vocab_size, start, rows, kernel.num_steps, end)


def power_target(
    experts: Sequence[Expert], log_potential: Callable[[Tensor], Tensor] | None = None
) -> PathTarget:
    """Return the path-power target of chains on one time grid, from its definition.

    Every step weighs ``prod_m K_m(x'|x)**b_m q(x|x')**(1 - B)``, site by site.

    :param experts: chains with their exponents.
    :param log_potential: ``log G``, none by default.
    """
    kernel, length = experts[0][0].kernel, experts[0][0].length
    assert isinstance(kernel, InterpolatingKernel)
    process, order = kernel.process, sum(b for _, b in experts)
    states = all_states(process.num_states, length)
    prior = torch.as_tensor(process.prior)
    start = _outer((prior**order).expand(1, length, -1))[0]

    def rows(k: int, tokens: Tensor) -> Tensor:
        return _outer(_site_factors(experts, k, tokens))

    end = _end(states, process, log_potential)
    return PathTarget(states, process.vocab_size, start, rows, kernel.num_steps, end)


def ordered_paths(x0: Tensor, mask: int, generator: torch.Generator) -> Tensor:
    """Return paths that reveal sequences one site at a time in a random order, ``(n, L + 1, L)``.

    :param x0: int64 ``(n, L)``.
    :param mask: id of the mask.
    :param generator: source of randomness.
    """
    rank = torch.rand(x0.shape, generator=generator).argsort(-1)
    revealed = rank[:, None] < torch.arange(x0.shape[-1] + 1)[:, None]
    return torch.where(revealed, x0[:, None], mask)


def ordered(chain: ReverseChain) -> ReverseChain:
    """Return the chain that reveals one site per step with the denoiser of a masked chain.

    :param chain: the masked chain.
    """
    kernel = chain.kernel
    made = OrderedKernel(kernel.process, kernel.denoiser, length=chain.length)
    return ReverseChain(made, length=chain.length)


def _site_factors(experts: Sequence[Expert], k: int, tokens: Tensor) -> Tensor:
    """Return the weight of every next state of every site, ``(m, L, S)``."""
    kernel = experts[0][0].kernel
    a, b = float(kernel.alphas[k]), float(kernel.alphas[k + 1])
    order = sum(exponent for _, exponent in experts)
    forward = _forward(kernel.process, tokens, a / b)
    possible = forward > 0
    total = torch.where(forward > 0, forward, 1.0) ** (1 - order)
    for chain, exponent in experts:
        cavity = chain.kernel.cavity_log_probs({"tokens": tokens}, k).exp()
        reverse = site_rows(kernel.process, tokens, cavity, a, b)
        possible = possible & (reverse > 0)
        total = total * torch.where(reverse > 0, reverse, 1.0) ** exponent
    return torch.where(possible, total, 0.0)


def _forward(process: Process, tokens: Tensor, keep: float) -> Tensor:
    """Return ``q(x_l | v)`` of each earlier state ``v``, ``(m, L, S)``."""
    here = torch.nn.functional.one_hot(tokens, process.num_states).to(torch.float64)
    return keep * here + (1 - keep) * torch.as_tensor(process.prior)[tokens][..., None]


def _outer(factors: Tensor) -> Tensor:
    """Return products over sites for every state, ``(m, L, S) -> (m, S ** L)``."""
    rows = factors[:, 0]
    for site in factors.unbind(1)[1:]:
        rows = (rows[:, :, None] * site[:, None, :]).flatten(1)
    return rows


def _end(
    states: Tensor, process: Process, log_potential: Callable[[Tensor], Tensor] | None
) -> Tensor:
    clean = (states < process.vocab_size).all(-1)
    end = clean.to(torch.float64)
    if log_potential is not None:
        end[clean] = log_potential(states[clean]).exp()
    return end
