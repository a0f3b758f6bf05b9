"""How different the draws of a run still are, and how far a denoiser is from one joint law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.diagnostics.claims import number_or_none
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.kernels.events import predict_at
from ppl_diffusion.smc.posterior import ParticlePosterior

if TYPE_CHECKING:
    from ppl_diffusion.smc import Draws

MAX_PAIRS = 2**22
"""Distances that are held at once."""


def collapse(posterior: Draws, num: int | None = None) -> dict[str, list[float | None]]:
    """Return how far each run has collapsed, one number per run; None in a dead one.

    Collapse is a fact about single runs, which figures over pooled runs hide, and mean distances of
    pairs do, too. It is read off the *set* of ``num`` sequences that a run gives if all of them are
    to count alike, which is drawn from the particles systematically:

    - ``unique``: share of distinct sequences in the set;
    - ``nearest``: mean over the set of the share of positions in which a sequence differs from the
      nearest other one; 0 for duplicates;
    - ``vendi``: the exponential of the entropy of the eigenvalues of ``S / num``, with ``S`` the
      shares of positions in which two sequences agree (Friedman and Dieng 2023): an effective
      number of different sequences, at most ``num``;
    - ``ancestors``: effective number of root ancestors, ``1 / sum (weight of each root)^2``;
      None for Markov chains, which have no family tree.

    A trap: draws with replacement give duplicates whatever the method (63 % of them are distinct
    where all particles are), so that the set is systematic here. Another one: the nearest of many
    is nearer than that of few. Compare sets of one size only, and with sequences of the prior
    (:func:`nearest_distance`).

    :param posterior: ``R`` runs of ``N`` particles, or chains of draws; plates are read as one long
        sequence.
    :param num: size of the sets; None for ``N``.
    :raises ValueError: if it is below 2.
    """
    size = posterior.num_draws if num is None else num
    if size < 2:
        raise ValueError(f"collapse: num must be >= 2 to have any neighbours, got {size}.")
    found: dict[str, list[float | None]] = {
        name: [] for name in ("unique", "nearest", "vendi", "ancestors")
    }
    for run, alive in enumerate(posterior.alive.tolist()):
        figures = _figures(posterior, run, size) if alive else dict.fromkeys(found)
        for name, value in figures.items():
            found[name].append(value)
    return found


def systematic_set(posterior: Draws, run: int, num: int) -> Tensor:
    """Return sequences of a run that count alike, int64 ``(num, n)``: the same ones every time.

    :param run: which run; it must be alive.
    :param num: how many.
    """
    weights = posterior.weights[run]
    points = (torch.arange(num, dtype=torch.float64, device=weights.device) + 0.5) / num
    index = torch.searchsorted(weights.cumsum(0), points).clamp_max(len(weights) - 1)
    return posterior.x0[run].flatten(1)[index]


def nearest_distance(x0: Tensor) -> Tensor:
    """Return the share of positions in which each sequence differs from its nearest neighbour.

    :param x0: sequences, int64 ``(n, L)``.
    :returns: float64 ``(n,)``; infinite for a single one, which has no neighbour.
    """
    size, length = x0.shape
    rows = max(1, MAX_PAIRS // (size * length))
    itself = torch.arange(size, device=x0.device)
    parts = []
    for index in itself.split(rows):
        apart = (x0[index, None] != x0).to(torch.float64).mean(-1)
        parts.append(apart.scatter(1, index[:, None], torch.inf).amin(-1))
    return torch.cat(parts)


def _figures(posterior: Draws, run: int, num: int) -> dict[str, float | None]:
    chosen = systematic_set(posterior, run, num)
    return {
        "unique": len(chosen.unique(dim=0)) / num,
        "nearest": float(nearest_distance(chosen).mean()),
        "vendi": _vendi(chosen),
        "ancestors": _roots(posterior, run),
    }


def _roots(posterior: Draws, run: int) -> float | None:
    if not isinstance(posterior, ParticlePosterior):
        return None
    roots = posterior.eve[run]
    shares = posterior.weights.new_zeros(int(roots.max()) + 1)
    shares = shares.scatter_add(0, roots, posterior.weights[run])
    return float(1 / shares.square().sum())


def _vendi(x0: Tensor) -> float:
    rows = max(1, MAX_PAIRS // x0.numel())
    alike = [(part[:, None] == x0).to(torch.float64).mean(-1) for part in x0.split(rows)]
    share = torch.linalg.eigvalsh(torch.cat(alike) / len(x0)).clamp_min(0)
    return float(torch.special.entr(share).sum().exp())


def order_sd(
    chain: ReverseChain,
    x0: Tensor,
    num_orders: int = 8,
    window: Sequence[int] = (2, 4, 8),
    *,
    seed: int | None = None,
) -> dict[int, float | None]:
    """Return how much the likelihood of sequences depends on the order of reveals, in nats.

    An exact denoiser gives ``prod_l D_l(x_l | revealed before)`` whatever the order; a learned one
    does not. Published moves of finished sequences (mask some positions, reveal them, accept by the
    reward alone) are right as far as these numbers are small, and wrong by about as much. The moves
    of this package need no such luck.

    :param chain: a masked chain without plates.
    :param x0: clean sequences, int64 ``(n, L)``.
    :param num_orders: random orders per sequence.
    :param window: numbers of positions that are revealed last, the others being known.
    :param seed: seed of positions and orders.
    :returns: by number of positions, those of ``window`` and ``L``, the root of the mean over
        sequences of the variance over orders.
    :raises CapabilityError: if the process is not absorbing.
    :raises ValueError: if there are fewer than two orders, or a window does not fit.
    """
    if not chain.kernel.process.absorbing:
        raise CapabilityError(
            f"order_sd: there is an order of reveals in masked chains, and {chain.kernel!r} "
            "reveals nothing."
        )
    sizes = [*window, chain.length]
    if num_orders < 2 or any(not 1 <= size <= chain.length for size in sizes):
        raise ValueError(
            "order_sd: num_orders must be >= 2 and windows lie between 1 and "
            f"{chain.length}, got {num_orders} and {tuple(window)}."
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = {size: _order_log_probs(chain, x0, num_orders, size, generator) for size in sizes}
    return {size: number_or_none(float(v.var(-1).mean().sqrt())) for size, v in found.items()}


def _order_log_probs(
    chain: ReverseChain, x0: Tensor, num_orders: int, size: int, generator: Any
) -> Tensor:
    """Return ``log prod D`` of the last ``size`` positions, float64 ``(n, num_orders)``."""
    process, denoiser, count = chain.kernel.process, chain.kernel.denoiser, len(x0)
    kernel = OrderedKernel(process, denoiser, length=chain.length)
    noise = torch.rand(count, chain.length, generator=generator, device="cpu")
    sites = noise.argsort(-1)[:, :size].to(x0.device)  # the same ones in every order
    deal = torch.rand(count, num_orders, size, generator=generator, device="cpu").argsort(-1)
    order = sites[:, None].expand(-1, num_orders, -1).gather(-1, deal.to(x0.device)).flatten(0, 1)
    rows = x0.repeat_interleave(num_orders, 0)
    state, total = rows.scatter(-1, order, process.vocab_size), torch.zeros(len(rows)).double()
    first = torch.arange(len(rows), device=x0.device) * chain.length
    given = {name: value.expand(len(rows), *value.shape) for name, value in chain.given.items()}
    for site in order.unbind(-1):
        time = torch.as_tensor(kernel.prediction_time({"tokens": state}, 0), dtype=torch.float64)
        log_d = predict_at(denoiser, state, time.expand(len(rows)), first + site, given)
        log_d = clean_log_probs(log_d, site.shape, process.vocab_size)
        token = rows.gather(-1, site[:, None])
        total = total + log_d.gather(-1, token)[:, 0].cpu()
        state = state.scatter(-1, site[:, None], token)
    return total.reshape(count, num_orders)
