"""Moves of finished sequences of masked chains: mask a few positions again, reveal them again.

Both leave ``p(path) G(x0)^beta`` invariant for any denoiser, and touch the positions that were
revealed last; :class:`~ppl_diffusion.smc.OrderRefresh` between them brings other positions there.
The published shortcut (mask any positions, accept by the change of ``G`` alone) is right only where
all conditionals of the denoiser belong to one joint law, which those of a network never do:
:func:`ppl_diffusion.diagnostics.order_sd` measures by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.events import RevealPlan, decode
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc.path_state import PathModel, PathMove, PathState, accept, choose, tilt
from ppl_diffusion.smc.reveals import RevealTable, reveals_alone


class RevealMove(PathMove):
    """A move that keeps when positions are revealed."""

    def check(self, chain: ReverseChain) -> None:
        """Refuse chains whose reveals are not random, or not independent of the network."""
        if not reveals_alone(chain):
            raise CapabilityError(
                f"{type(self).__name__}: it masks positions again, and the steps of "
                f"{chain.kernel!r} do not reveal them once, at moments independent of the network, "
                "with a density; use SuffixRefresh."
            )


@dataclass(frozen=True)
class Refill(RevealMove):
    """Reveal the positions again that were revealed last, weighed by the change of ``G``.

    The proposal is the conditional law of ``p`` given the order of reveals and the other tokens.
    How many positions is drawn anew for every path and move, from a law fixed beforehand: fewer are
    accepted more often. Those that share a step with them go along.

    :param num_sites: numbers of positions.
    :param odds: how often each number is drawn, up to scale; None for ``n, ..., 2, 1``.
    """

    num_sites: Sequence[int] = (1, 2, 4, 8)
    odds: Sequence[float] | None = None
    name = "refill"

    def __post_init__(self) -> None:
        if not self.num_sites or any(not isinstance(m, int) or m < 1 for m in self.num_sites):
            raise ValueError(f"Refill: num_sites must be whole and >= 1, got {self.num_sites!r}.")
        if self.odds is not None and (
            len(self.odds) != len(self.num_sites) or any(not odd > 0 for odd in self.odds)
        ):
            raise ValueError(
                f"Refill: odds must be a positive number for each of {len(self.num_sites)} "
                f"num_sites, got {self.odds!r}."
            )

    @property
    def _odds(self) -> Tensor:
        known = self.odds or range(len(self.num_sites), 0, -1)
        odds = torch.tensor(list(known), dtype=torch.float64, device="cpu")
        return odds / odds.sum()

    def num_rows(self, chain: ReverseChain) -> float:
        """Return the mean number of positions, or of steps where there are fewer."""
        sizes = torch.tensor(self.num_sites, dtype=torch.float64, device="cpu")
        return float(self._odds @ sizes.clamp_max(min(chain.length, chain.num_steps)))

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Propose other tokens for the positions revealed last."""
        table = RevealTable.of(model, state)
        last = self._last(table, generator)
        step_of, length = table.step_of, table.x0.shape[-1]
        steps = step_of.clamp_min(0)
        times = table.times(step_of.repeat_interleave(length, 0), steps.flatten())
        plan = RevealPlan.of(torch.where(last, step_of, -1), times.reshape(step_of.shape))
        start = torch.where(last, table.mask, table.x0)
        noise = uniforms(start.shape, generator=generator, device=start.device)
        drawn = decode(model.denoiser, table.mask, start, plan, noise, given=table.given)
        log_c = torch.where(last, drawn.log_c, table.log_c)
        proposed = model.state(table.path(drawn.tokens, step_of), table.whole(log_c))
        log_ratio = tilt(proposed.log_g, beta) - tilt(state.log_g, beta)
        return accept(state, proposed, log_ratio, generator)

    def _last(self, table: RevealTable, generator: torch.Generator | None) -> Tensor:
        """Return the positions to be revealed again, bool ``(B, L)``: whole steps of them."""
        step_of, length = table.step_of, table.x0.shape[-1]
        u = uniforms((len(step_of),), generator=generator, device=step_of.device)
        index = torch.searchsorted(self._odds.cumsum(0).to(u.device), u, right=True)
        sizes = torch.tensor(self.num_sites, device=u.device).clamp_max(length)
        size = sizes[index.clamp_max(len(sizes) - 1)]
        ordered = step_of.sort(-1, descending=True).values
        border = ordered.gather(-1, (size - 1)[:, None])
        return (step_of >= border) & table.free


@dataclass(frozen=True)
class SiteGibbs(RevealMove):
    """Draw each token of the last step from its own law given all others.

    ``q(v) ∝ D_l(v) G(x with l := v)^beta`` is the conditional law itself, so that nothing is ever
    refused: one network row and ``V - 1`` potential calls per position. Where several positions
    are revealed in the last step they take turns, and so do the elements of plates.
    """

    name = "gibbs"

    def num_rows(self, chain: ReverseChain) -> float:
        """Return the one row of the last step."""
        return 1.0

    def __call__(
        self,
        model: PathModel,
        state: PathState,
        *,
        beta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[PathState, Tensor]:
        """Renew the last tokens one by one; "accepted" is where any of them changed."""
        table = RevealTable.of(model, state)
        last = (table.step_of == table.step_of.amax(-1, keepdim=True)) & table.free
        log_d = _last_predictions(table, last)
        start, elements = state.x0, table.shape[2:].numel()
        sites = torch.where(last, 0, 1).sort(dim=-1, stable=True).indices
        for element in range(elements):
            for turn in range(int(last.sum(-1).amax())):
                state = _renewed(
                    table, state, log_d, last, sites[:, turn], element, beta, generator
                )
        return state, (state.x0 != start).flatten(2).any(-1)


def _last_predictions(table: RevealTable, last: Tensor) -> Tensor:
    """Return what the network says about the last positions, ``(B, L, V)``; zero elsewhere."""
    row = last.any(-1).nonzero()[:, 0]
    step = table.step_of.amax(-1)[row]
    states = torch.where(last, table.mask, table.x0)[row]
    which, site = last[row].nonzero(as_tuple=True)
    found = table.predict(row, states, table.times(table.step_of[row], step), which, site)
    log_d = torch.zeros(*last.shape, table.mask, dtype=torch.float64, device=last.device)
    log_d[row[which], site] = found
    return log_d


def _renewed(
    table: RevealTable,
    state: PathState,
    log_d: Tensor,
    last: Tensor,
    site: Tensor,
    element: int,
    beta: float,
    generator: torch.Generator | None,
) -> PathState:
    """Return states with one position of one plate element drawn anew."""
    rows = torch.arange(len(site), device=site.device)
    runs, size = table.shape[:2]
    own = rows.reshape(runs, size, -1)[..., element].flatten()  # rows of this element
    at, valid = site[own], last[own, site[own]]
    x0 = state.x0.reshape(table.x0.shape)
    current, law = x0[own, at], log_d[own, at]
    options = [state]
    scores = [law.gather(-1, current[:, None])[:, 0].reshape(runs, size)]
    for shift in range(1, table.mask):  # the present token has been rated already
        token = (current + shift) % table.mask
        worth = law.gather(-1, token[:, None])[:, 0]
        possible = valid & (worth > -torch.inf)  # the potential is not asked about the others
        token = torch.where(possible, token, current)
        other = x0.index_put((own, at), token)
        log_c = table.log_c if state.log_c is None else state.log_c.reshape(table.log_c.shape)
        known = log_c.index_put((own, at), torch.where(valid, worth, log_c[own, at]))
        path = table.path(other, table.step_of)
        options.append(table.model.state(path, table.whole(known)))
        scores.append(torch.where(valid, worth, -torch.inf).reshape(runs, size))
    pairs = zip(scores, options, strict=True)
    log_q = torch.stack([score + tilt(option.log_g, beta) for score, option in pairs], -1)
    noise = uniforms(log_q.shape, generator=generator, device=log_q.device)
    chosen = (log_q - (-noise.log()).log()).argmax(-1)
    for index, option in enumerate(options[1:], 1):
        state = choose(chosen == index, option, state)
    return state
