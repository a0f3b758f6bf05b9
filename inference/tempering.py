"""Tempering at the level of data: from the chain's own law to the tilted one, path by path.

Whole paths are drawn first; the potential is then switched on by powers ``0 = b_0 < ... < b_S = 1``
(Del Moral, Doucet and Jasra 2006, JRSS-B 68), with targets ``p(path) G(x0)^b``::

    weight by G(x0)^(b_j - b_{j-1}),  resample,  move by kernels that leave p(path) G(x0)^b_j alone

The moves mask again and reveal again (:mod:`ppl_diffusion.smc.rejuvenation`). Powers are chosen by
a pilot run: each is as large as the effective sample size allows, found by bisection (Jasra et al.
2011). The run itself keeps them fixed, which makes its evidence unbiased; powers adapted on the
very particles they weigh would cost a bias of order ``1/N``. Waste-free (Dau and Chopin 2022)
resamples ``N/P`` particles and keeps all ``P`` states of the moves of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference.arguments import require_moves
from ppl_diffusion.inference.path_moves import checked_moves, moved, side_by_side, small_type
from ppl_diffusion.kernels.base import GIVEN
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method, Needs, register
from ppl_diffusion.programs.sources import Moved, Rng, State
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.rejuvenation import (
    OrderRefresh,
    PathMove,
    SuffixRefresh,
    WasteFree,
    tilt,
)
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.weights import Weights

MAX_STAGES = 200
"""A ladder longer than this means that the potential is too steep for the particles."""
_BISECTIONS = 60


@register
@dataclass(frozen=True)
class Tempering(Method):
    """Mask whole paths again and reveal them again, under a potential that grows.

    ``ess_threshold`` of the runner is what the pilot aims at: powers are such that the ESS falls to
    this fraction of the particles whose potential is not zero. Every stage is resampled.

    :param moves: path moves of one sweep, in order; by default a suffix of half the steps and,
        where the reveals are random and independent of the network, the order.
    :param num_sweeps: sweeps of the moves per stage (not used by waste-free).
    :param powers: the ladder from 0 to 1; None finds it by a pilot run.
    :param waste_free: states ``P`` kept per resampled particle, a divisor of ``N``; None for the
        plain algorithm.
    """

    moves: Sequence[PathMove] | None = None
    num_sweeps: int = 1
    powers: Sequence[float] | None = None
    waste_free: int | None = None

    name: ClassVar[str] = "tempering"
    needs: ClassVar[Needs] = Needs(own_moves=True, free_chains=True)
    holds_clamps: ClassVar[bool] = False
    keeps_paths: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.moves is not None:
            object.__setattr__(self, "moves", require_moves("Tempering", self.moves))
        if self.powers is not None:
            object.__setattr__(self, "powers", _check_powers(self.powers))

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Moves are made for equally weighted particles: always resample."""
        if not 0 < ess_threshold < 1 or self.num_sweeps < 1:
            raise ValueError(
                "Tempering: ess_threshold must lie between 0 and 1 and num_sweeps be >= 1, got "
                f"{ess_threshold} and {self.num_sweeps}."
            )
        return resampler if self.waste_free is None else WasteFree(self.waste_free), 2.0

    def prepare(self, run: Bound, resampler: Resampler, ess_threshold: float) -> None:
        """Choose moves, and a ladder by a pilot run."""
        moves = {site.name: self._moves_of(site.chain) for site in run.source.chains}
        run.notes |= {"moves": moves, "share": ess_threshold}
        run.notes["powers"] = self.powers or self._find_powers(run, resampler, ess_threshold)

    def _moves_of(self, chain: ReverseChain) -> Sequence[PathMove]:
        return checked_moves(default_moves(chain) if self.moves is None else self.moves, chain)

    def num_steps(self, run: Bound) -> int:
        """Return the stages of the ladder."""
        return len(run.notes["powers"]) - 1

    def times(self, run: Bound) -> Tensor:
        """Return ``1 - b`` of the stages."""
        return 1.0 - torch.tensor(run.notes["powers"], dtype=torch.float64, device="cpu")

    def begin(self, run: Bound, generator: Rng) -> State:
        """Draw latents from their law, and whole paths from the chains."""
        state: State = {"sites": {}, "latents": {}, "log_r": run.zeros}
        if run.needs_program:
            state = run.start(generator)
        paths = {}
        for name, site in run.sites.items():
            given = state["sites"].get(name, {}).get(GIVEN)
            chain = run.chain(name, given)
            batched = len(chain.batch_shape) > len(site.chain.batch_shape)
            paths[name] = chain.sample(() if batched else run.shape, generator=generator)
        sites = {
            name: {**state["sites"].get(name, {}), "tokens": path[..., -1, :]}
            for name, path in paths.items()
        }
        kept = {name: path.to(small_type(run, name)) for name, path in paths.items()}
        return run.final({**state, "sites": sites, "paths": kept})

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move by kernels that leave the target of the stage invariant."""
        if group == 0:  # the chains' own law: these are independent draws of it
            return state, 0.0
        power = run.notes["powers"][group]
        after = self._chains(run, state, power, generator)
        # The loop weighs by the tilt of the new state over that of the old; the kernel, reversed
        # under its invariant law, gives the old tilt over the new one at the same power.
        old, new = (tilt(s["log_g"], power) for s in (state, after))
        return after, old - new

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the log of the potential to the power of the stage."""
        return tilt(state["log_g"], run.notes["powers"][group])

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the potential to the power of the stage; at power 0 latents are fresh draws."""
        power = run.notes["powers"][group]
        moved = power > 0 and run.program is not None
        return run.ends(state, power) if moved else None

    def _chains(self, run: Bound, state: State, power: float, generator: Rng) -> State:
        """Move every particle, or make each resampled one the head of a waste-free chain."""
        length = self.waste_free
        if length is None:
            for _ in range(self.num_sweeps):
                state = self._sweep(run, state, power, generator)
            return state
        heads = torch.arange(0, state["log_g"].shape[1], length, device=run.device)
        states = [run.gather(state, heads.expand(len(state["log_g"]), -1))]
        for _ in range(length - 1):
            states.append(self._sweep(run, states[-1], power, generator))
        return side_by_side(states)

    def _sweep(self, run: Bound, state: State, power: float, generator: Rng) -> State:
        for name, moves in run.notes["moves"].items():
            for move in moves:
                state = moved(run, state, name, move, power, generator)
        return state

    def _find_powers(self, run: Bound, resampler: Resampler, share: float) -> list[float]:
        """Return a ladder found by one pilot run of ``N`` particles."""
        size = run.shape[1]
        pilot, powers = run.at((1, size)), [0.0]
        state = self.begin(pilot, None)
        for _ in range(MAX_STAGES):
            power = next_power(state["log_g"][0], powers[-1], share)
            weights = Weights(tilt(state["log_g"], power) - tilt(state["log_g"], powers[-1]))
            powers.append(power)
            if power == 1.0:
                return powers
            noise = uniforms((1, resampler.num_uniforms(size)), device=run.device)
            state = run.gather(state, resampler(noise, weights.log))
            state = self._chains(pilot, state, power, None)
        raise ValueError(
            f"Tempering: {MAX_STAGES} stages reach power {powers[-1]:.3g} only; use more "
            "particles, a lower ess_threshold, or powers of your own."
        )

    def paths(self, run: Bound, state: State) -> dict[str, Tensor] | None:
        """Return the paths that particles carry."""
        return dict(state["paths"])

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Leave out what a ladder does not tell."""
        # What G forbids is gone after one stage, with all that it stood for: no look-ahead lost it.
        posterior = replace(posterior, log_mass=None)
        if self.waste_free is None:
            return posterior
        # States of one waste-free chain are no offspring of resampling.
        unknown = torch.full_like(posterior.log_evidence, torch.nan)
        return replace(posterior, evidence_variance=unknown)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was chosen, in JSON types."""
        moves = [move.name for moves in run.notes["moves"].values() for move in moves]
        return {
            **super().settings(run),
            "moves": list(dict.fromkeys(moves)),
            "powers": list(run.notes["powers"]),
            "ess_threshold": run.notes["share"],
        }


def default_moves(chain: ReverseChain) -> tuple[PathMove, ...]:
    """Return a suffix of half the steps and, where it is right, a new order of reveals."""
    suffix = SuffixRefresh(max(1, (chain.num_steps + 1) // 2))
    return (OrderRefresh(), suffix) if OrderRefresh.fits(chain) else (suffix,)


def next_power(log_g: Tensor, power: float, share: float) -> float:
    """Return the largest next power at which the effective sample size is what is asked for."""
    alive = log_g[log_g > -torch.inf]
    if not len(alive):
        raise ValueError(
            f"Tempering: none of {len(log_g)} pilot particles has a positive potential; use more "
            "particles or a method that looks ahead, such as TwistedSampler."
        )

    def enough(b: float) -> bool:
        return float(Weights((b - power) * alive).ess) >= share * len(alive)

    if enough(1.0):
        return 1.0
    low, high = power, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high if low == power else low


def _check_powers(powers: Sequence[float]) -> list[float]:
    ladder = [float(power) for power in powers]
    if (
        len(ladder) < 2
        or ladder[0] != 0
        or ladder[-1] != 1
        or any(a >= b for a, b in pairwise(ladder))
    ):
        raise ValueError(
            f"Tempering: powers must increase from exactly 0 to exactly 1, got {ladder}."
        )
    return ladder
