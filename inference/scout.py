"""When latents are moved, how far and how often: found by a run that nobody reports.

Kernels tuned on the particles they move bias the evidence: what a particle becomes then depends on
what the others are worth, and an invariant kernel is right on average only. So one more run of a
few particles, the *scout*, is tuned on itself, and hands what it found to all reported runs: steps
at which latents are moved (where it was resampled), covariances, step sizes, numbers of moves, and
the constants of the floor. Given the scout all of this is fixed, and the evidence is unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.clouds import BLIND_MOVES, clinging, number_of, root_of
from ppl_diffusion.inference.latent_moves import MAX_ASKED, RealMove, Spot, gibbs
from ppl_diffusion.inference.latent_sites import Coordinates, LatentSites
from ppl_diffusion.programs.ahead import Ahead, Rated
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.run import same_values
from ppl_diffusion.programs.sources import Rng, State
from ppl_diffusion.smc.portable import portable
from ppl_diffusion.smc.run_memory import remembers
from ppl_diffusion.smc.twists import LOG_BASE

SCOUTS = 64
"""Particles of a scout run at most."""

MOST_MOVES, CLING = 20, 0.5
"""Moves per step at most, and correlation with where latents were that is moved on from."""

LOW, LEAST_SCALE = 0.1, 2.0**-6
"""Acceptance below which steps are halved, and the shortest of them."""

FEW_COORDINATES = 3
"""Coordinates up to which a random walk does as well as gradients, at a fifth of the rows."""

CHEAP_SWEEP = 4
"""Rows of a sweep over discrete latents that go with every move of the others."""

SLOTS = ("log_g", "values")
"""Entries of the state that depend on latents, where there are any."""


@dataclass(frozen=True)
class LatentMoves:
    """How latents that were drawn before the sequences are renewed.

    :param kernel: for continuous ones together: ``"auto"`` (a random walk in up to three
        dimensions, else Hamiltonian moves), ``"random-walk"`` or ``"hmc"``.
    :param number: moves at each step; None finds out how many it takes, and makes one of latents
        that a chain depends on, whose paths are replayed.
    :param tuning: ``"scout"``: by one more run of at most 64 particles, after which the evidence
        is unbiased. ``"own"``: by the particles that are moved, at no further cost; the evidence is
        then consistent and *not* unbiased.
    :param tempering: look ahead by growing powers, so that latents are not narrowed down early.
    :raises ValueError: if a name or the number is not usable.

    Example::

        SMC(assay, moves=LatentMoves(number=5)).run(data, seed=0)
    """

    kernel: Literal["auto", "random-walk", "hmc"] = "auto"
    number: int | None = None
    tuning: Literal["scout", "own"] = "scout"
    tempering: bool = True

    def __post_init__(self) -> None:
        _check("kernel", self.kernel, ("auto", "random-walk", "hmc"))
        _check("tuning", self.tuning, ("scout", "own"))
        whole = isinstance(self.number, Integral) and not isinstance(self.number, bool)
        if self.number is not None and not (whole and self.number >= 1):
            raise ValueError(
                f"LatentMoves: number must be >= 1 and whole, or None, got {self.number!r}."
            )


@portable
@dataclass(frozen=True)
class Tuned:
    """What is done at one step.

    :param move: the move of continuous latents, if there are any.
    :param number: how often it is made, and discrete latents are drawn anew.
    """

    move: RealMove | None
    number: int


@remembers(
    *("steps", "acceptance", "waiting", "_copied"),
    *("num_rows", "num_gradients", "num_network_rows"),
)
class LatentMover:
    """The moves of latents during one run.

    :param options: what was asked for.
    :param sites: what can be moved.
    :param known: what is done at which step, the last one included; None finds out.

    :ivar steps: what was done, by step.
    :ivar acceptance: shares of moves that were accepted, by step.
    :ivar num_rows: rows of the program evaluated, ``num_gradients`` of them differentiated.
    :ivar num_network_rows: rows of networks evaluated.
    :ivar waiting: whether particles were resampled and could not be moved since.
    :ivar then: moves of other latents, made after these.
    """

    asked = MAX_ASKED

    def __init__(
        self, options: LatentMoves, sites: LatentSites, known: Mapping[int, Tuned] | None = None
    ) -> None:
        self.options, self.sites, self.learning = options, sites, known is None
        self.steps: dict[int, Tuned] = dict(known or {})
        self.acceptance: dict[int, float] = {}
        self.num_rows = self.num_gradients = self.num_network_rows = 0
        self.waiting = False
        self.then: LatentMover | None = None
        self._copied: Tensor | None = None

    @property
    def every(self) -> list[LatentMover]:
        """These moves and those that come after."""
        return [self] if self.then is None else [self, *self.then.every]

    def resampled(self, ancestors: Tensor) -> None:
        """Note that particles were copied.

        :param ancestors: int64 ``(R, N)``.
        """
        identity = torch.arange(ancestors.shape[1], device=ancestors.device)
        for mover in self.every:
            mover.waiting, mover._copied = True, (ancestors != identity).any(1)

    def renew(
        self, method: Method, run: Bound, state: State, log_h: Tensor, group: int, generator: Rng
    ) -> tuple[State, Tensor]:
        """Return states with other latents and their look-ahead, where that is due.

        :param log_h: the carried look-ahead, ``(R, N)``.
        :param group: groups made so far.
        """
        for mover in self.every:
            state, log_h = mover.renewed(method, run, state, log_h, group, generator)
        return state, log_h

    def renewed(
        self, method: Method, run: Bound, state: State, log_h: Tensor, group: int, generator: Rng
    ) -> tuple[State, Tensor]:
        """Return what :meth:`renew` does by these moves alone."""
        copied, self._copied = self._copied, None
        due = self.is_due(run, group) and any(name in state["latents"] for name in self.sites.names)
        ahead = self.ahead(method, run, state, group) if due else None
        if ahead is None:
            return state, log_h
        self.waiting = False
        weights = torch.softmax(state[LOG_BASE] + log_h, 1).nan_to_num(1 / log_h.shape[1])
        if copied is not None:  # they count alike now
            weights = torch.where(copied[:, None], 1 / log_h.shape[1], weights)
        state, moved = self.moved(run, state, log_h, ahead, group, weights, generator)
        return method.renewed(state, moved), moved

    def is_due(self, run: Bound, group: int) -> bool:
        """Return whether latents are moved now."""
        return self.waiting if self.learning else group in self.steps

    def ahead(self, method: Method, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead that is carried, as a function of latents."""
        return method.ahead(run, state, group)

    def ends(self, run: Bound, state: State, paths: Mapping[str, Tensor] | None) -> Ahead:
        """Return the potential of finished states, likewise."""
        return run.ends(state, paths=paths)

    def spot(self, run: Bound, state: State, log_h: Tensor) -> Spot:
        """Return where particles stand."""
        slots = {name: state[name] for name in SLOTS if name in state}
        return Spot(state["latents"], log_h, state["log_r"], slots)

    def moved(
        self,
        run: Bound,
        state: State,
        log_h: Tensor,
        ahead: Ahead,
        group: int,
        weights: Tensor,
        generator: Rng,
    ) -> tuple[State, Tensor]:
        """Return states whose latents were moved, and their look-ahead.

        :param ahead: the look-ahead as a function of latents.
        :param weights: how much particles count, ``(R, N)``, for what is still to be found out.
        """
        spot = self.spot(run, state, log_h)
        before, asked = run.source.num_calls, run.num_evaluations
        if self.learning:
            spot = self._learn(spot, ahead, group, weights, generator)
        else:
            spot = self._apply(spot, ahead, group, generator)
        self.num_rows += run.source.num_calls - before
        self.num_network_rows += run.num_evaluations - asked
        state = {**state, "latents": spot.latents, "log_r": spot.log_r, **spot.slots}
        return state, spot.log_h

    def _apply(self, spot: Spot, ahead: Ahead, group: int, generator: Rng) -> Spot:
        """Do what is known."""
        tuned, shares = self.steps[group], []
        for n in range(tuned.number):
            spot, share = self._sweep(spot, ahead, tuned.move, n, generator)
            shares.append(share)
        self.acceptance[group] = float(torch.stack(shares).mean())
        return spot

    def _sweep(
        self, spot: Spot, ahead: Ahead, move: RealMove | None, n: int, generator: Rng
    ) -> tuple[Spot, Tensor]:
        """Move continuous latents together, and draw discrete ones anew; return what moved."""
        moved = torch.ones_like(spot.log_h)
        if move is not None:
            fills = next((x.shape[2] for x in ahead.kept.values() if isinstance(x, Tensor)), 1)
            spot, taken = move(spot, ahead, self.sites.real.of(spot.latents), generator)
            self.num_gradients += move.gradients * taken.numel() * fills
            moved = taken.to(torch.float64)
        for site in self.sites.discrete:
            if site.name in spot.latents and n % self._rest(spot) == 0:
                spot, changed = gibbs(spot, ahead, site, generator, self.asked)
                moved = changed if move is None else moved
        return spot, moved.mean()

    def _rest(self, spot: Spot) -> int:
        """Return how many moves of continuous latents go with one sweep over discrete ones."""
        rows = 0
        for site in self.sites.discrete:
            if site.name in spot.latents:
                elements = site.index(spot.latents[site.name]).shape[-1]
                rows += min((len(site.values) - 1) * elements, self.asked)
        return max(1, math.ceil(rows / CHEAP_SWEEP)) if self.sites.real.sites else 1

    def _learn(self, spot: Spot, ahead: Ahead, group: int, weights: Tensor, generator: Rng) -> Spot:
        """Move until latents have left where they were, and note what that took."""
        self.require_same_law(spot, ahead(spot.latents))
        real = self.sites.real.of(spot.latents)
        move, shares, before = None, [], None
        if real.sites:
            before = real.flat(spot.latents)
            move = RealMove(self._kernel(spot, ahead, real), root_of(before, weights))
            move, spot, share = self._scaled(move, spot, ahead, generator)
            shares.append(share)
        number = self.options.number or (int(number_of(shares[0])) if shares else BLIND_MOVES)
        while True:
            while len(shares) < number:
                spot, share = self._sweep(spot, ahead, move, len(shares), generator)
                shares.append(share)
            if self.options.number or before is None or number >= MOST_MOVES:
                break
            if float(clinging(before, real.flat(spot.latents), weights)) <= CLING:
                break
            number = min(2 * number, MOST_MOVES)
        self.steps[group] = Tuned(move, number)
        self.acceptance[group] = float(torch.stack(shares).mean())
        return spot

    def _scaled(
        self, move: RealMove, spot: Spot, ahead: Ahead, generator: Rng
    ) -> tuple[RealMove, Spot, Tensor]:
        """Halve the step until some moves are accepted."""
        while True:
            spot, share = self._sweep(spot, ahead, move, 0, generator)
            if float(share) >= LOW or move.scale <= LEAST_SCALE:
                return move, spot, share
            move = replace(move, scale=move.scale / 2)

    def require_same_law(self, spot: Spot, rated: Rated) -> None:
        """Refuse latents that the program draws by another law than they were drawn by.

        :param rated: what particles are worth where they stand, found again.
        """
        # They are moved under the law that the program states; weights divide by the one they had.
        known = spot.log_r > -torch.inf
        if not same_values(rated.log_r[known], spot.log_r[known]):
            raise CapabilityError(
                "SMC: the law of latents that are drawn before the sequences changes with the "
                "sequences, so that they cannot be moved; pass moves=None."
            )

    def _kernel(self, spot: Spot, ahead: Ahead, real: Coordinates) -> str:
        chosen, few = self.options.kernel, real.size(spot.latents) <= FEW_COORDINATES
        # Where an answer draws noise it has no gradient that could be followed.
        if not ahead.smooth or chosen == "random-walk" or (chosen == "auto" and few):
            return "random-walk"
        return "hmc"


def _check(what: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"LatentMoves: unknown {what}={value!r}; choose one of {', '.join(choices)}."
        )
