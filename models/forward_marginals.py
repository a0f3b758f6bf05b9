"""Learned forward processes: marginals from a network, and unbiased gradients of their bound.

FLDD (Bartosh, Pandeva, Karmalkar and Zazo 2026, arXiv 2605.18204) keeps a factorised reverse chain
of few steps and learns how to hide, ``q(z_t | x) = prod_i u_i(x, t)``, so that what is revealed
together depends less on one another. The joint law of neighbouring times is a coupling
(:mod:`ppl_diffusion.processes.couplings`); the bound is a sum over steps, and none is simulated::

    NELBO(x) = sum_t E_{z ~ u(x, t)} sum_i KL( P_i[z_i, :] || v_i(z, t) )

Both ends are what they must be, ``u(x, 0) = x`` and ``u(x, T) = pi``: no reconstruction or prior
term is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.processes.base import Process, whole_number
from ppl_diffusion.processes.couplings import Coupling, at_step, entropy

Reverse = Callable[[Tensor, Tensor], Tensor]
"""``(states (N, L, A), t (N,)) -> log v (N, L, A)``; states are one-hot, or soft in the warm-up.

More columns may follow, which are returned with an estimate and are none of it."""


class Marginals(torch.nn.Module):
    """``u(x, t)`` of every site and time, with hard boundaries at both ends.

    :param network: ``x (B, L) -> logits`` of the times between, ``(T - 1, B, L, A)``, or
        ``(T - 1, B, L)`` where only masks are learned: then the logit of being *revealed*, and the
        state is the token or the mask. One that ignores ``x`` gives position-only schedules.
    :param process: gives the law of a site at the noisiest time, and the number of states.
    :param num_steps: number ``T`` of steps.
    :param masks_only: learn nothing but when a token is revealed.
    :raises ValueError: if masks alone are to be learned and the process has no mask.
    """

    prior: Tensor

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        process: Process,
        num_steps: int,
        *,
        masks_only: bool = False,
    ) -> None:
        super().__init__()
        if masks_only and not process.absorbing:
            raise ValueError(f"Marginals: masks_only needs a process with a mask, got {process!r}.")
        self.network, self.masks_only = network, masks_only
        self.num_steps = whole_number(num_steps, "Marginals: num_steps")
        self.register_buffer("prior", torch.as_tensor(process.prior))

    def forward(self, x: Tensor) -> Tensor:
        """Return the marginals.

        :param x: clean tokens, int64 ``(B, L)``.
        :returns: float64 ``(T + 1, B, L, A)``, from clean to noisy.
        :raises ValueError: if the network returns another shape.
        """
        size = len(self.prior)
        clean = torch.nn.functional.one_hot(x, size).to(torch.float64)
        noisy = self.prior.expand_as(clean)
        ends = clean[None], noisy[None]
        if self.num_steps == 1:
            return torch.cat(ends)
        logits = self.network(x)
        wanted = (self.num_steps - 1, *(x.shape if self.masks_only else clean.shape))
        if logits.shape != wanted:
            raise ValueError(
                f"Marginals: the network returned shape {tuple(logits.shape)}, expected {wanted}."
            )
        logits = logits.to(torch.float64)
        if self.masks_only:
            shown = logits.sigmoid()[..., None]
            return torch.cat([ends[0], shown * clean + (1 - shown) * noisy, ends[1]])
        return torch.cat([ends[0], logits.softmax(-1), ends[1]])


class Estimate(NamedTuple):
    """An estimate of the bound, one number per sequence, nats.

    :param bound: unbiased from hard states, float64 ``(B,)``; without a gradient.
    :param loss: what to differentiate; where states are hard, its gradient is an unbiased one of
        the bound.
    :param is_bound: whether ``bound`` is one in mean: not from soft states.
    :param cost: cross-entropy of each draw, float64 ``(M, B)``, for a baseline.
    :param output: what the network returned, ``(M, B, L, columns)``.
    """

    bound: Tensor
    loss: Tensor
    is_bound: bool
    cost: Tensor
    output: Tensor


class Baseline:
    """A running mean of the cross-entropy of each step, which takes variance off the score.

    :param num_steps: number ``T`` of steps.
    :param decay: share of the past that is kept at an update.
    """

    def __init__(self, num_steps: int, decay: float = 0.99) -> None:
        self.decay = decay
        self._means = np.full(num_steps + 1, np.nan)

    def at(self, t: Tensor) -> Tensor:
        """Return the means of steps, zero of those never seen, float64 like ``t``."""
        means = torch.as_tensor(np.nan_to_num(self._means), device=t.device)
        return means[t]

    def state(self) -> list[float]:
        """Return the means, for :meth:`load`."""
        means: list[float] = self._means.tolist()
        return means

    def load(self, state: list[float]) -> None:
        """Go on with means of before."""
        self._means = np.array(state)

    def update(self, t: Tensor, cost: Tensor) -> None:
        """Take costs in: *after* the estimate they belong to, or its gradient is biased.

        :param t: steps, ``(B,)``.
        :param cost: of the draws, ``(M, B)``.
        """
        for step in t.unique().tolist():
            new = float(cost[:, t == step].mean())
            old = self._means[step]
            self._means[step] = new if np.isnan(old) else old + (1 - self.decay) * (new - old)


def estimate(
    marginals: Tensor,
    reverse: Reverse,
    coupling: Coupling,
    t: Tensor,
    *,
    draws: int = 2,
    baseline: Baseline | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate the bound at one step per sequence, and what to differentiate for its gradient.

    The gradient of the marginals is that of the score function, of the cost of *all* sites: a site
    changes what the network says of every other, so that crediting it with its own cost alone is
    biased, and has the wrong sign on two bits. Variance is taken off in ways that leave the mean
    where it is: the entropy of the coupling is summed exactly, and from the cost of a draw the mean
    of the other draws of its sequence is taken, or a running mean where there is but one.

    :param marginals: ``u``, float64 ``(T + 1, B, L, A)``, of a batch.
    :param reverse: the network of the reverse chain.
    :param coupling: of neighbouring times; independent at the last step where it must be.
    :param t: the step of each sequence, 1 to ``T``, int64 ``(B,)``. Uniform ones give the bound of
        the whole chain: the number of steps is multiplied in.
    :param draws: number ``M`` of states per sequence.
    :param baseline: running means, used where ``draws`` is 1.
    :raises ValueError: if ``draws`` is not positive, or a step does not exist.
    """
    draws, (u, w) = whole_number(draws, "estimate: draws"), _neighbours(marginals, t)
    num_steps = len(marginals) - 1
    with torch.no_grad():
        noise = torch.distributions.utils.clamp_probs(
            torch.rand((draws, *w.shape), generator=generator, device=w.device, dtype=w.dtype)
        )
        # The largest of log w plus Gumbel noise is a draw of w; a state of mass zero never wins.
        z = (w.log() - noise.neg().log1p().neg().log()).argmax(-1)
    states = torch.nn.functional.one_hot(z, w.shape[-1]).to(w.dtype)
    step = _Step(coupling, u, w, t, marginals)
    rows = step.mixed(states)
    output, cost = _cross_entropy(rows, reverse, states, t)
    chosen = torch.where(states > 0, w, 1.0)  # log 0 must not send NaN backwards
    score = chosen.log().sum((-1, -2))
    entropies = (w * step.entropies()).sum((-1, -2))
    fixed = cost.detach()
    if draws > 1:
        level = (fixed.sum(0) - fixed) / (draws - 1)
    else:
        level = torch.zeros_like(fixed) if baseline is None else baseline.at(t)
    # The score has a gradient and no value: what is returned is worth what the bound is.
    loss = (cost + (fixed - level) * (score - score.detach())).mean(0) - entropies
    bound = num_steps * (fixed.mean(0) - entropies.detach())
    return Estimate(bound, num_steps * loss, True, fixed, output)


def relaxed(
    marginals: Tensor,
    reverse: Reverse,
    coupling: Coupling,
    t: Tensor,
    temperature: float,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the loss of the warm-up: soft states, whose gradient has little variance and a bias.

    States are draws of the Concrete distribution (Maddison, Mnih and Teh 2017), the row of the
    coupling is mixed by them, and the network reads them as they are. **No bound**: the result says
    so, and :func:`estimate` gives one.

    :param temperature: of the draws, positive; they become hard as it goes to zero.
    """
    u, w = _neighbours(marginals, t)
    noise = torch.distributions.utils.clamp_probs(
        torch.rand(w.shape, generator=generator, device=w.device, dtype=w.dtype)
    )
    logits = torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), -1e9)
    states = ((logits - noise.neg().log1p().neg().log()) / temperature).softmax(-1)[None]
    rows = _Step(coupling, u, w, t, marginals).mixed(states)
    output, cost = _cross_entropy(rows, reverse, states, t)
    loss = (len(marginals) - 1) * (cost - entropy(rows).sum(-1)).mean(0)
    return Estimate(loss.detach(), loss, False, cost.detach(), output)


def _neighbours(marginals: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    last = len(marginals) - 1
    if t.shape != marginals.shape[1:2] or int(t.min()) < 1 or int(t.max()) > last:
        raise ValueError(
            f"t must hold one step of 1 to {last} for each of {marginals.shape[1]} sequences, got "
            f"shape {tuple(t.shape)}."
        )
    rows = torch.arange(len(t), device=t.device)
    return marginals[t - 1, rows], marginals[t, rows]


@dataclass(frozen=True, eq=False)
class _Step:
    """The couplings of the sequences' own steps; the last step may have another one."""

    coupling: Coupling
    u: Tensor
    w: Tensor
    t: Tensor
    marginals: Tensor

    def mixed(self, weights: Tensor) -> Tensor:
        return self._at_own(lambda coupling: coupling.mixed(self.u, self.w, weights))

    def entropies(self) -> Tensor:
        return self._at_own(lambda coupling: coupling.entropies(self.u, self.w))

    def _at_own(self, ask: Callable[[Coupling], Any]) -> Tensor:
        last = len(self.marginals) - 1
        own: Tensor = ask(self.coupling)
        prior = self.marginals[-1, 0, 0].detach().cpu()
        other = at_step(self.coupling, last, last, prior)
        if other is self.coupling:
            return own
        return torch.where((self.t == last)[:, None, None], ask(other), own)


def _cross_entropy(
    rows: Tensor, reverse: Reverse, states: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the network says, and the cost of all sites together, ``(M, B)``."""
    output = reverse(states.flatten(0, 1), t.repeat(len(states)))
    output = output.reshape(*states.shape[:-1], -1)
    log_v = output[..., : states.shape[-1]].to(rows.dtype)
    # Where nothing is to be found, a network that excludes it costs nothing: 0 log 0 = 0.
    return output, -(rows * torch.where(rows > 0, log_v, 0.0)).sum((-1, -2))
