"""Moves of latents that a chain depends on: paths are scored again under the new conditions.

With other latents the steps already made have another law, so that moves leave ``p(path | latents)
r(latents) h(path, latents)`` alone: particles remember their paths, a candidate's path is replayed
under the conditions that the program gives it, its completions are those of its own network, and
the ratio of the two path laws joins the acceptance. Each candidate costs a network row per step
made so far, hence few moves, after a quarter, a half and three quarters of the steps and at the
end: chosen before the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.latent_moves import Spot, chosen_of
from ppl_diffusion.inference.latent_sites import LatentSites, movable
from ppl_diffusion.inference.scout import LatentMover, LatentMoves, Tuned
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.programs.ahead import Ahead, Rated
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.run import same_values
from ppl_diffusion.programs.sources import MAX_ROWS, State
from ppl_diffusion.programs.trails import TRAIL, retrace
from ppl_diffusion.smc.feynman_kac import LOG_PROB, BoundFeynmanKac

MOVES, MOST_ASKED = 1, 4
"""Moves at each stop, and rows that a sweep over discrete latents asks for, per particle."""


class PathMover(LatentMover):
    """The moves of latents that chains depend on, during one run."""

    asked = MOST_ASKED

    def __init__(
        self, options: LatentMoves, sites: LatentSites, known: Mapping[int, Tuned] | None = None
    ) -> None:
        few = replace(options, kernel="random-walk", number=options.number or MOVES)
        super().__init__(few, sites, known)

    def is_due(self, run: Bound, group: int) -> bool:
        """Return whether latents are moved now: at stops that nothing seen can change."""
        return group in (stops(len(run.groups)) if self.learning else self.steps)

    def ahead(self, method: Method, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead along replayed paths, where the method carries one."""
        return None if method.ahead(run, state, group) is None else path_ahead(run, state)

    def ends(self, run: Bound, state: State, paths: Mapping[str, Tensor] | None) -> Ahead:
        """Return the potential of replayed paths."""
        return path_ends(run, state, paths)

    def spot(self, run: Bound, state: State, log_h: Tensor) -> Spot:
        """Return where particles stand, their path's law included."""
        spot = super().spot(run, state, log_h)
        log_path = log_path_of(run, state["sites"])
        return replace(spot, slots={**spot.slots, "sites": state["sites"]}, log_path=log_path)

    def require_same_law(self, spot: Spot, rated: Rated) -> None:
        """Refuse paths also that have another probability when they are replayed."""
        super().require_same_law(spot, rated)
        assert spot.log_path is not None
        assert rated.log_path is not None
        if not same_values(rated.log_path, spot.log_path):
            raise CapabilityError(
                "SMC: paths have another probability when they are replayed under the same "
                "conditions, so that latents that a chain depends on cannot be moved; pass "
                "moves=None."
            )


def stops(num_groups: int) -> set[int]:
    """Return after how many groups latents that chains depend on are moved, but for the end."""
    return {math.ceil(q * num_groups / 4) for q in (1, 2, 3)} - {num_groups}


def path_sites(method: Method, run: Bound) -> LatentSites:
    """Return how latents that chains depend on can be moved, and let particles remember paths.

    :param method: the method.
    :param run: the run, before it starts.
    """
    program = run.program
    assert program is not None
    names = [name for name in program.carried if name in program.feeding]
    why = _obstacle(method, run) if names else None
    if why is not None:
        return LatentSites(left={name: f"a chain depends on it, {why}" for name in names})
    sites = movable(program, names)
    fed = [name for name in run.sites if program.ancestors(name) & set(sites.names)]
    run.remembered = frozenset(fed)
    for name in fed:
        mover = run.movers[name]
        assert isinstance(mover, BoundFeynmanKac)
        mover.track_log_prob = True
    return sites


def _obstacle(method: Method, run: Bound) -> str | None:
    """Return why paths cannot be scored again under other conditions."""
    program = run.program
    assert program is not None
    if not method.replays:
        return f"whose paths {type(method).__name__} does not replay"
    if len(run.stages) > 1:
        return "and chains on one another"
    for name in (n for n in run.sites if program.ancestors(n)):
        mover, site = run.movers[name], run.sites[name]
        if not mover.kernel.has_path_density:
            return "whose paths have no density"
        if not mover.kernel.conditions:
            return "and not through conditions"
        # What a proposal leaves out may depend on the condition, and no weight says so.
        if site.twist is not None or not isinstance(mover, BoundFeynmanKac):
            return "which moves by a proposal"
        if mover.model.proposal is not site.clamp and mover.model.proposal is not None:
            return "which moves by a proposal"
    return None


def path_ahead(run: Bound, state: State) -> Ahead:
    """Return the look-ahead of states with other latents, on the paths that they have.

    :param run: the run.
    :param state: states whose look-ahead was made just now.
    """
    done, made = dict(state["done"]), run.moves_made(state)

    def rate(kept: State, latents: Mapping[str, Tensor]) -> Rated:
        sites, latents = replayed(run, kept, latents)
        fills = run.guess({"sites": sites, "done": done}, None)
        return _along(run, run.rated(fills, latents, made), sites)

    return Ahead(_kept(run, state), rate, smooth=False)


def path_ends(run: Bound, state: State, paths: Mapping[str, Tensor] | None) -> Ahead:
    """Return the potential of finished states with other latents, on the paths that they have.

    :param run: the run.
    :param state: finished states.
    :param paths: whole paths of every site, where they are kept.
    """

    def rate(kept: State, latents: Mapping[str, Tensor]) -> Rated:
        sites, latents = replayed(run, kept, latents)
        return _along(run, run.rated_ends(sites, latents, kept["paths"]), sites)

    return Ahead({**_kept(run, state), "paths": dict(paths or {})}, rate, smooth=False)


def _kept(run: Bound, state: State) -> State:
    guess = {name: fills[:, :, 0] for name, fills in run.guess(state, None).items()}
    kept = {name: state[name] for name in ("sites", "latents", "noisiest")}
    return {**kept, TRAIL: state.get(TRAIL, {}), "guess": guess}


def _along(run: Bound, rated: Rated, sites: dict[str, Carry]) -> Rated:
    slots = {**rated.slots, "sites": sites}
    return rated._replace(slots=slots, log_path=log_path_of(run, sites))


def log_path_of(run: Bound, sites: Mapping[str, Carry]) -> Tensor:
    """Return the log-probability of the paths that are remembered, ``(R, N)``."""
    own = [sites[name][LOG_PROB] for name in run.sites if name in run.remembered]
    return torch.stack(own).sum(0)


def replayed(
    run: Bound, kept: State, latents: Mapping[str, Tensor]
) -> tuple[dict[str, Carry], dict[str, Tensor]]:
    """Return the carries that the same paths would have led to with other latents, and those.

    Where the program computes conditions that are no numbers, as when one overflows, particles keep
    the latents that they have, and their path counts as impossible.

    :param run: the run.
    :param kept: what particles remember.
    :param latents: other values of all latents that are drawn, ``(R, N, ...)``.
    """
    given, sites = conditions(run, kept["guess"], latents), dict(kept["sites"])
    parts = [x.isfinite() for own in given.values() for x in own.values()]
    usable = torch.stack([x.flatten(2).all(-1) if x.ndim > 2 else x for x in parts]).all(0)
    for name, own in given.items():
        carry = sites[name]
        own = chosen_of(usable, own, carry[GIVEN])
        states = (kept["noisiest"][name], kept[TRAIL].get(name, {}))
        told = retrace(run.movers[name].kernel, run.sites[name], carry, states, own)
        sites[name] = {**told, LOG_PROB: told[LOG_PROB].masked_fill(~usable, -torch.inf)}
    return sites, chosen_of(usable, latents, kept["latents"])


def conditions(
    run: Bound, guess: Mapping[str, Tensor], latents: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return the conditions of the chains whose paths are remembered, by one run of the program.

    :param run: the run.
    :param guess: a clean sequence of every chain, ``(R, N, *plates, L)``.
    :param latents: values of all latents that are drawn, ``(R, N, ...)``.
    """
    program = run.program
    assert program is not None
    values = {name: run.sites[name].as_path(x.flatten(0, 1)) for name, x in guess.items()}
    values |= {name: value.flatten(0, 1) for name, value in latents.items()}
    shape = next(iter(guess.values())).shape[:2]
    found: dict[str, dict[str, list[Tensor]]] = {n: {} for n in run.sites if n in run.remembered}
    for rows in torch.arange(shape.numel(), device=program.device).split(MAX_ROWS):
        part = {name: value[rows] for name, value in values.items()}
        evaluated = program.evaluate(part, len(rows), run.place, strict=False)
        for name, own in found.items():
            for condition, value in evaluated.given(name).items():
                own.setdefault(condition, []).append(value)
    return {
        name: {c: (x := torch.cat(parts)).reshape(*shape, *x.shape[1:]) for c, parts in own.items()}
        for name, own in found.items()
    }
