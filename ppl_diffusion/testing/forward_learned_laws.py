"""Learned forward processes of tiny data, by enumeration: bounds, samplers and what limits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.processes.couplings import Coupling, at_step, entropy
from ppl_diffusion.testing.dense import all_states, state_index

Reverse = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class ForwardLaw:
    """A forward process of a data law, all of it as tables.

    :param law: of the data, float64 ``(X,)``.
    :param x: the data, int64 ``(X, L)``, in states of the process.
    :param marginals: ``u(x, t)``, float64 ``(T + 1, X, L, A)``; ``t = 0`` is the data.
    :param coupling: of neighbouring times.
    :param last: the coupling of the last step is this one too, where it would be independent.
    """

    law: Tensor
    x: Tensor
    marginals: Tensor
    coupling: Coupling
    last: bool = False

    @classmethod
    def of(
        cls,
        joint: Tensor,
        inner: Callable[[Tensor], Tensor],
        prior: Tensor,
        coupling: Coupling,
        *,
        last: bool = False,
    ) -> ForwardLaw:
        """Return a process with hard boundaries at both ends.

        :param joint: law of the data, ``(V,) * L``.
        :param inner: ``x (X, L) -> u (T - 1, X, L, A)``, from clean to noisy.
        :param prior: law of a site at the noisiest time, ``(A,)``.
        """
        size, length = joint.shape[0], joint.ndim
        x = all_states(size, length)
        law, x = joint.reshape(-1), x
        x, law = x[law > 0], law[law > 0]
        clean = torch.nn.functional.one_hot(x, len(prior)).to(torch.float64)[None]
        noisy = prior.to(torch.float64).expand(1, *clean.shape[1:])
        between = inner(x).to(torch.float64)
        return cls(law, x, torch.cat([clean, between, noisy]), coupling, last)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps."""
        return len(self.marginals) - 1

    @property
    def entropy(self) -> float:
        """``H(X)``, nats."""
        return float(-(self.law * self.law.log()).sum())

    def table(self, t: int) -> Tensor:
        """Return ``P`` of the step from ``t`` to ``t - 1``, ``(X, L, A, A)``."""
        prior = self.marginals[-1, 0, 0].detach()
        own = self.coupling
        if not self.last:
            own = at_step(own, t, self.num_steps, prior)
        rows: Tensor = own.table(self.marginals[t - 1], self.marginals[t])
        return rows

    def states(self) -> Tensor:
        """Return all states of the sites, ``(A ** L, L)``."""
        return all_states(self.marginals.shape[-1], self.x.shape[1])

    def law_at(self, t: int) -> Tensor:
        """Return ``q(z_t | x)`` over all states, ``(X, A ** L)``."""
        picked = self.marginals[t][:, None].expand(-1, len(self.states()), -1, -1)
        index = self.states()[None, :, :, None].expand(len(self.x), -1, -1, -1)
        return picked.gather(-1, index)[..., 0].prod(-1)

    def target(self, t: int) -> tuple[Tensor, Tensor]:
        """Return what the best reverse step predicts at each state, and how often it is there.

        :returns: ``v (A ** L, L, A)`` and ``q(z_t) (A ** L,)``.
        """
        joint = self.law[:, None] * self.law_at(t)  # (X, Z)
        rows = self.table(t)  # (X, L, A, A)
        index = self.states()  # (Z, L)
        sites = torch.arange(index.shape[1])
        each = rows[:, sites, index]  # (X, Z, L, A)
        mass = joint.sum(0)
        safe = torch.where(mass > 0, mass, 1.0)
        return torch.einsum("xz,xzla->zla", joint, each) / safe[:, None, None], mass

    def total_correlation(self, t: int) -> float:
        """Return ``E TC(z_{t-1} | z_t)``: what a factorised step ``t`` loses, nats.

        The bound exceeds the entropy by these and by what the chain forgets,
        ``I(z_{t-1}; z_{t+1..T} | z_t)``, which is zero in two steps from masks.
        """
        states, rows = self.states(), self.table(t)
        sites = torch.arange(states.shape[1])
        later = rows[:, sites, states]  # (X, Z, L, A)
        index = states[None, None, :, :, None].expand(*later.shape[:2], len(states), -1, -1)
        moves = later[:, :, None].expand(-1, -1, len(states), -1, -1).gather(-1, index)
        given = self.law[:, None] * self.law_at(t)
        joint = torch.einsum("xz,xzy->zy", given, moves[..., 0].prod(-1))
        v, mass = self.target(t)
        of_sites = (mass[:, None] * entropy(v)).sum()
        of_all = entropy(joint.flatten()) - entropy(mass)
        return float((of_sites - of_all).detach())

    def bound(self, reverse: Reverse | None = None) -> Tensor:
        """Return the bound of a reverse chain, nats, averaged over the data: no prior term is left.

        It has a gradient of the marginals, if they want one.

        :param reverse: ``(states (n, L), t) -> log v (n, L, A)`` of the steps 1 to ``T``, more
            columns may follow; the best factorised chain by default.
        """
        total = self.law.new_zeros(())
        for t in range(1, self.num_steps + 1):
            v, mass = self.target(t)
            log_v = torch.where(v > 0, v, 1.0).log()  # log 0 must not send NaN backwards
            if reverse is not None:
                log_v = torch.where(v > 0, reverse(self.states(), t)[..., : v.shape[-1]], 0.0)
            own = (self.marginals[t] * entropy(self.table(t))).sum((-1, -2))
            total = total - (mass[:, None, None] * v * log_v).sum() - (self.law * own).sum()
        return total

    def nelbo(self) -> float:
        """Return the bound of the best factorised chain as a number."""
        return float(self.bound().detach())

    def sampled(self) -> Tensor:
        """Return the law of what that chain samples, over all states, ``(A ** L,)``."""
        states = self.states()
        prior = self.marginals[-1, 0, 0]
        law = prior[states].prod(-1)
        for t in range(self.num_steps, 0, -1):
            v, mass = self.target(t)
            v = torch.where((mass > 0)[:, None, None], v, 1.0 / v.shape[-1])
            moves = v[:, None].expand(-1, len(states), -1, -1)
            moves = moves.gather(-1, states[None, :, :, None].expand(len(states), -1, -1, -1))
            law = law @ moves[..., 0].prod(-1)
        return law

    def total_variation(self) -> float:
        """Return the distance of what is sampled from the data law."""
        data = torch.zeros(len(self.states()), dtype=torch.float64)
        data[state_index(self.x, self.marginals.shape[-1])] = self.law
        return float((self.sampled() - data).abs().sum() / 2)
