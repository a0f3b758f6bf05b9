"""Learned values: a small network for ``log E[G(x0) | x_k]``, fitted to paths of the chain.

Draw paths, rate their ends, and regress on states along the way. What is regressed decides what
is learned (``y = G(x0) / c`` with ``c`` the mean of ``G``, ``f`` the network's output)::

    poisson   exp(f) - y f               optimum  exp(f) = E[y | x]: the soft value
    itakura   y exp(-f) + f              the same; weighs relative errors, so that rare heights
                                         do not drown the rest
    mean      (f - log G)^2              optimum  f = E[log G | x]: the published regression, which
                                         underrates what is uncertain (Jensen)

A learned value is a twist or a guide: wrong ones cost variance and never move a weighted target.
How good one is, :func:`bellman_residuals` says: a true value is the mean of its children's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.baselines import ImportanceSampling
from ppl_diffusion.inference.bootstrap import Bootstrap
from ppl_diffusion.inference.smc import SMC
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.replay import seeded
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sources import PotentialLike
from ppl_diffusion.smc.feynman_kac import per_particle
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.twists import CallableTwist, Carry, log_mean_exp

Loss = Literal["poisson", "itakura", "mean"]

LARGEST_STEP = 10.0
"""Gradients are scaled down to this norm: one enormous potential must not undo the training."""


class ValueNetwork(nn.Module):
    """A multilayer perceptron on embedded tokens and the time.

    :param num_states: number ``S`` of states of a site, the mask included.
    :param length: number ``L`` of positions.
    :param width: units of the hidden layers.
    :param depth: hidden layers.
    :param embedding: numbers per token.
    """

    def __init__(
        self, num_states: int, length: int, *, width: int = 128, depth: int = 2, embedding: int = 8
    ) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(num_states, embedding)
        sizes = [length * embedding + 2, *[width] * depth]
        hidden = [
            layer
            for before, after in pairwise(sizes)
            for layer in (nn.Linear(before, after), nn.SiLU())
        ]
        last = nn.Linear(sizes[-1], 1)
        self.body = nn.Sequential(*hidden, last)
        # The mean of G is taken out: a fresh network that says nothing is the constant value.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Return the value up to the constant, ``(B,)``.

        :param tokens: states, int64 ``(B, L)``.
        :param t: times in ``[0, 1]``, ``(B,)``.
        """
        time = torch.stack([t, t.square()], -1)
        features = torch.cat([self.embed(tokens).flatten(1), time.to(self.embed.weight.dtype)], -1)
        value: Tensor = self.body(features)[:, 0]
        return value


@dataclass(frozen=True, eq=False)
class LearnedValue:
    """A trained value: a function ``(carry, k) -> log h (R, N)`` for twists and guidance.

    :param network: the network.
    :param times: the chain's time grid, ``(T + 1,)``.
    :param offset: what is added to the network's output.
    :param losses: the loss at every update, ``(num_updates,)``.
    :param num_evaluations: network rows of the denoiser that the training paths cost.
    :param num_potential_calls: sequences the potential was asked about.
    """

    network: ValueNetwork
    times: Tensor
    offset: float
    losses: Tensor
    num_evaluations: int
    num_potential_calls: int

    def __call__(self, carry: Carry, k: int) -> Tensor:
        """Return ``log h_k``, float64 ``(R, N)``; plates are added up.

        :param carry: ``carry["tokens"]`` holds the states, ``(R, N, *plates, L)``.
        :param k: steps taken.
        """
        return per_particle(self.log_value(carry["tokens"], k))

    def log_value(self, tokens: Tensor, k: int) -> Tensor:
        """Return the value of states, float64 ``(*batch,)``.

        :param tokens: int64 ``(*batch, L)``.
        :param k: steps taken.
        :raises ValueError: if the chain is longer or has more steps than that of the training.
        """
        self._require_same_chain(tokens.shape[-1], k)
        rows = tokens.reshape(-1, tokens.shape[-1])
        with torch.no_grad():
            value = self.network(rows, self.times[k].to(rows.device).expand(len(rows)))
        return (value.to(torch.float64) + self.offset).reshape(tokens.shape[:-1])

    def _require_same_chain(self, length: int, k: int) -> None:
        steps = len(self.times) - 1
        if length != self.network.length or k > steps:
            raise ValueError(
                f"LearnedValue: fitted to {steps} steps of length {self.network.length}, asked "
                f"about length {length} after {k} steps; fit a value to the chain that is run."
            )


def fit_value(
    target: ReverseChain | Callable[..., Any],
    potential: PotentialLike | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss = "poisson",
    num_paths: int = 4096,
    states_per_path: int = 8,
    num_updates: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    width: int = 128,
    depth: int = 2,
    max_rows: int | None = None,
    seed: int | None = None,
) -> LearnedValue:
    """Fit a value network to paths of the chain itself.

    :param target: a reverse chain, or a Pyro program with one chain site and no other latent.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :param loss: what is regressed: ``"poisson"``, ``"itakura"`` or ``"mean"``.
    :param num_paths: paths drawn; each costs ``T`` network rows and one potential call.
    :param states_per_path: states kept of each path. They share one end, so that more of them
        teach less than more paths.
    :param num_updates: steps of Adam, with a learning rate that falls to zero.
    :param batch_size: states per update.
    :param learning_rate: the rate at the start.
    :param width: units of the hidden layers.
    :param depth: hidden layers.
    :param max_rows: largest number of rows sent to the denoiser at once, None for what suits it.
    :param seed: seed of the training; the global random state is left alone if it is given.
    :raises ValueError: if a number or the loss is not usable, or no path has a potential above
        ``-inf``.
    """
    if loss not in _LOSSES:
        raise ValueError(f"fit_value: unknown loss={loss!r}; choose one of {', '.join(_LOSSES)}.")
    counts = (num_paths, states_per_path, num_updates, batch_size)
    if min(counts) < 1:
        raise ValueError(f"fit_value: numbers of paths, states and updates must be >= 1: {counts}.")
    with seeded(seed):
        sampler = SMC(
            target,
            potential,
            method=ImportanceSampling(),
            num_particles=num_paths,
            max_rows=max_rows,
        )
        chain = _only_chain(sampler.bind(args, dict(kwargs or {})), "fit_value")
        paths = sampler.run(*args, **dict(kwargs or {}))
        tokens, k, log_g = _training_states(paths, states_per_path, loss)
        offset = _offset(log_g, loss)
        states = chain.kernel.process.num_states
        network = ValueNetwork(states, chain.length, width=width, depth=depth)
        data = (tokens, paths.times[k], (log_g - offset).to(torch.float32))
        losses = _train(network, data, _LOSSES[loss], num_updates, batch_size, learning_rate)
    return LearnedValue(
        # Trained on the CPU, where posteriors are; asked where the chain moves.
        network.requires_grad_(False).eval().to(chain.kernel.device),
        paths.times,
        offset,
        losses,
        paths.num_evaluations,
        paths.num_potential_calls,
    )


def bellman_residuals(
    value: Callable[[Carry, int], Tensor],
    posterior: ParticlePosterior,
    target: ReverseChain | Callable[..., Any],
    potential: PotentialLike | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_children: int = 64,
    seed: int | None = None,
) -> Tensor:
    """Return how far a value is from the mean of its children's, along posterior paths.

    The residual of a state is ``log mean_j h_(k+1)(c_j) - log h_k(x_k)`` over children of the
    chain: zero for the true value and infinitely many children. Its variance over posterior
    states is what twisting by the value costs in log-weight at that step.

    :param value: ``(carry, k) -> log h (R, N)``.
    :param posterior: a result with stored paths.
    :param target: what it was sampled from: a chain whose steps depend on the tokens alone, or a
        program with such a chain.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :param num_children: children drawn of every state.
    :param seed: seed of the children.
    :returns: weighted variances over all runs, float64 ``(T,)``.
    :raises ValueError: if no paths were stored.
    :raises CapabilityError: if the chain remembers more than its tokens.
    """
    path = posterior.path
    if path is None:
        raise ValueError("bellman_residuals: the posterior stored no paths; set store_path=True.")
    method = Bootstrap(twist=CallableTwist(value))
    sampler = SMC(target, potential, method=method, num_particles=posterior.num_particles)
    with torch.no_grad(), seeded(seed):
        run = sampler.bind(args, dict(kwargs or {}))
        kernel = _only_chain(run, "bellman_residuals").kernel
        if not kernel.markov:
            raise CapabilityError(
                f"bellman_residuals: a step of {type(kernel).__name__} depends on more "
                "than the tokens, which is not stored; use a chain whose kernel is Markov."
            )
        states = path.to(run.device)[..., :-1, :].unbind(-2)
        found = [_residual(run, method, state, k, num_children) for k, state in enumerate(states)]
    return _weighted_variance(torch.stack(found, -1).cpu(), posterior.pooled_log_weights.exp())


def _only_chain(run: Bound, owner: str) -> ReverseChain:
    """Return the chain of a program that has one, and no latent that its value would depend on."""
    program = run.program
    if len(run.sites) > 1 or (program is not None and program.latents):
        raise CapabilityError(
            f"{owner}: a value is learned of one chain's states, and the program "
            f"{'' if program is None else program.name} has several chains, or other latents."
        )
    return run.only.chain


def _residual(run: Bound, method: Bootstrap, tokens: Tensor, k: int, num_children: int) -> Tensor:
    (runs, size), name = tokens.shape[:2], run.only.name
    carry = run.movers[name].kernel.start_carry(tokens, given=run.only.chain.given)
    zeros = torch.zeros((runs, size), dtype=torch.float64, device=tokens.device)
    state = {"sites": {name: carry}, "latents": {}, "log_r": zeros, "done": {name: k}}
    each = torch.arange(size, device=tokens.device)
    family = each.repeat_interleave(num_children).expand(runs, -1)
    children, _ = run.step(run.gather(state, family), Item(name, k), None)
    ahead = method.rated(run, children, k, None)[1]
    here = method.rate(run, state, None)
    return log_mean_exp(ahead.reshape(runs, size, num_children), -1) - here


def _weighted_variance(values: Tensor, weights: Tensor) -> Tensor:
    """Return variances over all particles, ``(T,)``; states whose children all died say nothing."""
    known = values.isfinite() & (weights[..., None] > 0)
    share = torch.where(known, weights[..., None], 0.0)
    share = share / share.sum((0, 1))
    values = torch.where(known, values, 0.0)
    mean = (share * values).sum((0, 1))
    return (share * (values - mean).square()).sum((0, 1))


def _training_states(
    paths: ParticlePosterior, states_per_path: int, loss: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, int64 ``(B, L)``, their steps, and ``log G`` of where their paths ended."""
    path, log_g = paths.path, paths.log_potential[0]
    assert path is not None
    if path.ndim > 4:  # plates are sequences of their own, whose ends share what they are worth
        log_g = log_g.repeat_interleave(path.shape[2:-2].numel())
    rows = path[0].flatten(0, -3)
    if loss == "mean":  # a mean regression needs numbers: what is forbidden gets a penalty
        log_g = log_g.clamp_min(FORBIDDEN_GUESS)
    k = torch.randint(rows.shape[1] - 1, (len(rows), states_per_path), device=rows.device)
    states = rows.gather(1, k[..., None].expand(*k.shape, rows.shape[-1]))
    return states.flatten(0, 1), k.flatten(), log_g.repeat_interleave(states_per_path)


def _offset(log_g: Tensor, loss: Loss) -> float:
    """Return the log of the mean of ``G``, or the mean of its log."""
    offset = log_g.mean() if loss == "mean" else torch.logsumexp(log_g, 0) - math.log(len(log_g))
    if not bool(torch.isfinite(offset)):
        raise ValueError(
            "fit_value: no path of the chain ended where the potential is above -inf, so there is "
            "nothing to learn from; draw more paths, or relax the constraint."
        )
    return float(offset)


def _train(
    network: ValueNetwork,
    data: tuple[Tensor, Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    num_updates: int,
    batch_size: int,
    learning_rate: float,
) -> Tensor:
    tokens, times, log_y = data
    losses = torch.empty(num_updates, device="cpu")
    with torch.enable_grad():
        optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_updates)
        for update in range(num_updates):
            size = (min(batch_size, len(tokens)),)
            rows = torch.randint(len(tokens), size, device=tokens.device)
            value = loss(network(tokens[rows], times[rows]), log_y[rows]).mean()
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), LARGEST_STEP)
            optimiser.step()
            schedule.step()
            losses[update] = value.detach()
    return losses


def _poisson(f: Tensor, log_y: Tensor) -> Tensor:
    return f.exp() - log_y.exp() * f


def _itakura(f: Tensor, log_y: Tensor) -> Tensor:
    return (log_y - f).exp() + f


def _mean(f: Tensor, log_y: Tensor) -> Tensor:
    return (f - log_y).square()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "poisson": _poisson,
    "itakura": _itakura,
    "mean": _mean,
}
