"""Moves of finished paths inside a run: what tempering and refinement share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels.base import GIVEN
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.sources import Rng, State
from ppl_diffusion.smc.path_state import PathModel, PathMove, PathState

LOG_C = "path_moves/log_c"
"""What is remembered of the reveals of each path, by site."""


def checked_moves(moves: Sequence[PathMove], chain: ReverseChain) -> tuple[PathMove, ...]:
    """Return moves that are right for a chain.

    :raises CapabilityError: if one is not.
    """
    for move in moves:
        move.check(chain)
    return tuple(moves)


def small_type(run: Bound, name: str) -> torch.dtype:
    """Return an integer type that holds the states of a chain."""
    states = run.sites[name].chain.kernel.process.num_states
    return torch.uint8 if states <= 256 else torch.int32


def moved(
    run: Bound, state: State, name: str, move: PathMove, power: float, generator: Rng
) -> State:
    """Move the paths of one site; what is drawn with a proposal is kept where that is.

    :param state: finished states with ``paths`` by site, ``log_g`` and ``values``.
    :param name: the chain site.
    :param power: of the potential in the law that the move leaves alone.
    """
    carry = state["sites"][name]

    def log_potential(x0: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        sites = {**state["sites"], name: {**carry, "tokens": x0}}
        return run.source.final({**state, "sites": sites})

    known = state.get(LOG_C, {})
    model = PathModel(run.chain(name, carry.get(GIVEN)), log_potential)
    path = state["paths"][name].to(torch.int64)
    at = PathState(path, state["log_g"], state["values"], known.get(name))
    after, _ = move(model, at, beta=power, generator=generator)
    known = {site: log_c for site, log_c in known.items() if site != name}
    own = {} if after.log_c is None else {name: after.log_c}
    return {
        **state,
        "sites": {**state["sites"], name: {**carry, "tokens": after.x0}},
        "paths": {**state["paths"], name: after.path.to(state["paths"][name].dtype)},
        "log_g": after.log_g,
        "values": after.values,
        LOG_C: {**known, **own},
    }


def side_by_side(states: Sequence[State]) -> State:
    """Return ``P`` states of each chain as ``P`` neighbouring particles."""
    together: State = _stacked(states)
    return together


def _stacked(states: Sequence[Any]) -> Any:
    first = states[0]
    if isinstance(first, Mapping):
        return {name: _stacked([state[name] for state in states]) for name in first}
    return torch.stack(list(states), 2).flatten(1, 2) if isinstance(first, Tensor) else first
