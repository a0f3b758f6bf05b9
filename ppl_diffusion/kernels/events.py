"""Masked chains on event times: when each position is revealed is drawn once, before any network.

A position is masked at time ``t`` exactly while its uniform ``U`` lies below ``1 - alpha(t)``, so
one sorted list of uniforms holds the whole schedule of a row. Every way of decoding is a grouping
of that list: by the bins of a time grid (ancestral sampling on that grid), one by one (first
hitting: Zheng et al. 2024, arXiv:2409.02908), in groups of fixed size, or block
after block. Only non-empty groups cost a network call, rows advance on their own clocks, and the
vocabulary is touched at the revealed positions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.batching import rows_per_call
from ppl_diffusion.denoisers.checks import (
    clean_log_probs,
    require_normalised,
    require_rows,
    require_tensor,
    without_mask,
)
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.processes.noise import draw_normalised


def grid_bins(levels: Tensor, alphas: np.ndarray) -> Tensor:
    """Return the step of a time grid in which each position is revealed.

    :param levels: noise levels ``U`` in ``[0, 1)`` at which positions are revealed, any shape.
    :param alphas: signal levels of the grid, from 0 to 1, ``(T + 1,)``.
    :returns: int64 step indices ``0..T-1``, shaped like ``levels``.
    """
    noise = torch.as_tensor(np.ascontiguousarray(1.0 - alphas[::-1]), device=levels.device)
    return len(alphas) - 1 - torch.searchsorted(noise, levels, right=True)


def reveal_ranks(levels: Tensor, free: Tensor, block: Tensor | None = None) -> Tensor:
    """Return the place of each free position in its row's order of reveals, from 0.

    :param levels: noise levels ``U``, float64 ``(B, L)``; the highest is revealed first.
    :param free: bool ``(B, L)``, positions that are revealed at all.
    :param block: int64 ``(L,)``: positions of a lower block come first.
    :returns: int64 ``(B, L)``; positions that are not free come last.
    """
    key = 1.0 - levels if block is None else block + (1.0 - levels) / 2
    last = torch.where(free, key, torch.inf)
    return last.argsort(-1).argsort(-1)


class Round(NamedTuple):
    """One network call: which rows go on, and what they reveal.

    :param num_rows: the first so many rows (most groups first) are still under way.
    :param sites: int64 ``(m,)``, indices of the revealed positions into the flattened rows.
    """

    num_rows: int
    sites: Tensor


@dataclass(frozen=True)
class RevealPlan:
    """The order in which every row reveals its positions, in groups, empty groups left out.

    Rows are sorted by their number of groups, so that the rows under way are always a leading
    slice and no step gathers or scans a batch.

    :param rounds: the network calls, in order.
    :param times: times of the network calls of each sorted row, float64 ``(B, G)``.
    """

    rows: Tensor
    rounds: tuple[Round, ...]
    times: Tensor

    @classmethod
    def of(cls, group: Tensor, time: Tensor) -> RevealPlan:
        """Arrange groups into rounds; this reads the group sizes back to the host, once.

        :param group: int64 ``(B, L)``: the group of each position, revealed in increasing order;
            -1 where nothing is revealed.
        :param time: float64 ``(B, L)``: time of the call that reveals each position; that of the
            first position counts where a group has several.
        """
        place = _compact(group)
        counts = place.amax(-1) + 1  # groups of each row
        rows = counts.argsort(dim=0, descending=True, stable=True)
        place, time, counts = place[rows], time[rows], counts[rows]
        depth = int(counts[0]) if len(counts) else 0
        times = time.new_full((len(rows), depth + 1), -torch.inf)
        times = times.scatter_reduce(1, torch.where(place < 0, depth, place), time, "amax")
        flat = place.flatten()
        order = flat.argsort(dim=0, stable=True)
        sizes = torch.bincount(flat + 1, minlength=depth + 1).tolist()
        rounds = torch.arange(depth, device=counts.device)
        active = (counts[:, None] > rounds).sum(0).tolist()
        sites = order[sizes[0] :].split(sizes[1:])
        return cls(rows, tuple(map(Round, active, sites)), times[:, :depth])

    @property
    def num_rows(self) -> int:
        """Network rows in all."""
        return sum(r.num_rows for r in self.rounds)


class RoundAhead(NamedTuple):
    """What happens in one round.

    :param sites: revealed positions, indices into the flattened states, ascending int64 ``(m,)``.
    :param rows: the rows under way, int64 ``(n,)``; None for all of them.
    :param pending: the positions revealed in this round and in later ones, int64.
    """

    sites: Tensor
    rows: Tensor | None
    pending: Tensor


def rounds_ahead(group: Tensor) -> tuple[RoundAhead, ...]:
    """Return what is revealed in each round: every row's first group, then every second, ...

    :param group: int64 ``(B, L)``: the group of each position, revealed in increasing order; -1
        where nothing is revealed.
    """
    place = _compact(group)
    flat, last = place.flatten(), place.amax(-1)
    order, rows = flat.argsort(dim=0, stable=True), last.argsort(descending=True, stable=True)
    sizes, ends = torch.bincount(flat + 1), torch.bincount(last + 1)
    # One read: how many sites each round has, and how many rows end after it.
    read = torch.cat([sizes, ends]).tolist()
    known, counts, ended = read[0], read[1 : len(sizes)], read[len(sizes) :]
    under_way, left = [], len(group)
    for gone in ended[: len(counts)]:
        left -= gone
        under_way.append(None if left == len(group) else rows[:left])
    if not counts:
        return ()
    later = [order[known + sum(counts[:j]) :] for j in range(len(counts))]
    return tuple(map(RoundAhead, order[known:].split(counts), under_way, later))


def _compact(group: Tensor) -> Tensor:
    """Renumber the groups of each row without gaps, keeping -1."""
    ordered, order = group.sort(dim=-1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = (fresh & (ordered >= 0)).cumsum(-1) - 1
    return torch.empty_like(group).scatter_(-1, order, place)


class Decoded(NamedTuple):
    """What :func:`decode` returns.

    :param tokens: clean tokens, int64 ``(B, L)``.
    :param log_c: log-probability of every revealed token under the prediction it was drawn from,
        float64 ``(B, L)``; zero elsewhere.
    :param hidden_gradient: whether the first prediction asked for a gradient (see ``probe``).
    """

    tokens: Tensor
    log_c: Tensor
    hidden_gradient: bool


def decode(
    denoiser: Denoiser,
    vocab_size: int,
    tokens: Tensor,
    plan: RevealPlan,
    uniforms: Tensor,
    *,
    given: Mapping[str, Tensor] | None = None,
    probe: bool = False,
) -> Decoded:
    """Reveal the masked positions of a batch according to a plan.

    Rounds of many rows are cut into calls of as many as suit the network. Nothing is read back to
    the host between calls; predictions are checked once at the end.

    :param denoiser: predictor of clean tokens; its ``hidden`` and ``head`` are used where it has
        them, so that the vocabulary is computed for the revealed positions only.
    :param tokens: states to start from, int64 ``(B, L)``.
    :param plan: what is revealed when.
    :param uniforms: numbers in ``[0, 1)``, ``(B, L)``: which token each position gets.
    :param given: conditions of each row, ``(B, *event)``.
    :param probe: make the first call with gradients enabled, to see whether it has any.
    :raises ValueError: if the denoiser's output is no distribution over the clean tokens.
    """
    state = tokens[plan.rows]
    known = {name: value[plan.rows] for name, value in (given or {}).items()}
    order = torch.cat([state.new_zeros(0), *(sites for _, sites in plan.rounds)])
    noise = uniforms[plan.rows].flatten()
    length, most = tokens.shape[-1], rows_per_call(denoiser, tokens.shape[-1])
    shares = _shares(plan, length, most)
    draws = iter(noise[order].split([share for own in shares for share in own]))
    log_p, totals = [noise.new_zeros(0)], [noise.new_zeros(0)]
    hidden_gradient = False
    for index, ((size, sites), own_shares) in enumerate(zip(plan.rounds, shares, strict=True)):
        tokens_drawn = []
        for part, start in zip(sites.split(own_shares), range(0, size, most), strict=True):
            window = slice(start, min(start + most, size))
            with torch.set_grad_enabled(probe and index == 0):
                own = {name: value[window] for name, value in known.items()}
                times = plan.times[window, index]
                rows = predict_at(denoiser, state[window], times, part - start * length, own)
            hidden_gradient = hidden_gradient or rows.requires_grad
            rows = without_mask(rows.detach(), part.shape, vocab_size)
            drawn, total = draw_normalised(rows, next(draws))
            tokens_drawn.append(drawn)
            log_p.append(rows.gather(-1, drawn[:, None])[:, 0])
            totals.append(total)
        # Not in place: a denoiser may have kept the state it was shown.
        state = state.flatten().index_put((sites,), torch.cat(tokens_drawn)).view(state.shape)
    total = torch.cat(totals)
    require_normalised((total - 1).abs().amax() if len(total) else total.sum())
    log_c = torch.zeros_like(noise).index_put((order,), torch.cat(log_p) - total.log())
    home = plan.rows.argsort()
    return Decoded(state[home], log_c.reshape(state.shape)[home], hidden_gradient)


def _shares(plan: RevealPlan, length: int, most: int) -> list[list[int]]:
    """Return how many sites of each round fall into each of its calls of ``most`` rows."""
    if len(plan.rows) <= most:
        return [[len(r.sites)] for r in plan.rounds]
    # Sites are in ascending order, and every row under way reveals one: no call is empty.
    counts = [torch.bincount(r.sites // (most * length)) for r in plan.rounds]
    host = iter(torch.cat(counts).tolist() if counts else [])
    return [[next(host) for _ in own] for own in counts]


def score(
    denoiser: Denoiser,
    vocab_size: int,
    states: Tensor,
    times: Tensor,
    reveals: Tensor,
    answers: Tensor,
    *,
    given: Mapping[str, Tensor] | None = None,
    max_rows: int | None = None,
) -> Tensor:
    """Return the log-probabilities of known reveals, float64 ``(M,)``, differentiable.

    :param states: states before the reveals, int64 ``(M, L)``.
    :param times: time of each state, float64 ``(M,)``.
    :param reveals: bool ``(M, L)``, the positions that are revealed next.
    :param answers: clean tokens, int64 ``(M, L)``.
    :param given: conditions of each state, ``(M, *event)``.
    :param max_rows: rows per network call, None for what suits the network.
    :raises ValueError: if the denoiser's output is no distribution over the clean tokens.
    """
    if not len(states):  # a network need not take empty batches
        return torch.zeros(0, dtype=torch.float64, device=states.device)
    parts, given = [], given or {}
    max_rows = max_rows or rows_per_call(denoiser, states.shape[-1])
    chunks = (x.split(max_rows) for x in (states, times, reveals, answers, *given.values()))
    for z, t, chosen, x, *values in zip(*chunks, strict=True):
        sites, own = chosen.flatten().nonzero()[:, 0], dict(zip(given, values, strict=True))
        rows = clean_log_probs(predict_at(denoiser, z, t, sites, own), sites.shape, vocab_size)
        site = rows.gather(-1, x.flatten()[sites][:, None])[:, 0]
        parts.append(site.new_zeros(len(z)).index_add(0, sites // z.shape[1], site))
    return torch.cat(parts)


def predict_at(
    denoiser: Denoiser, tokens: Tensor, times: Tensor, sites: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """Return the denoiser's log-probabilities at chosen positions only.

    :param tokens: states, int64 ``(B, L)``.
    :param times: float64 ``(B,)``; not read if the denoiser is time-free.
    :param sites: int64 ``(m,)``, indices into the flattened ``(B, L)``.
    :param given: conditions of each row, ``(B, *event)``.
    :returns: ``(m, V)``, or ``(m, V + 1)`` where the denoiser has a column for the mask.
    """
    t = 1.0 if denoiser.time_free else times
    if has_head(denoiser):
        hidden = denoiser.hidden(tokens, t, **given)  # type: ignore[attr-defined]
        require_rows(hidden, tokens, denoiser.vocab_size)
        rows: Tensor = denoiser.head(hidden.flatten(0, 1)[sites])  # type: ignore[attr-defined]
        require_tensor(rows, (*sites.shape, denoiser.vocab_size))
        return rows
    output = denoiser(tokens, t, **given)
    require_rows(output, tokens, denoiser.vocab_size)
    return output.flatten(0, 1)[sites]
