"""What programs of inference are given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from torch.distributions import Distribution

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.smc.rejuvenation import PathMove


def require_counts(owner: str, num_particles: Any, num_runs: Any) -> None:
    """Refuse numbers of particles and runs that are not whole and positive."""
    whole = all(isinstance(n, Integral) for n in (num_particles, num_runs))
    if not whole or num_particles < 1 or num_runs < 1:
        raise ValueError(
            f"{owner}: num_particles and num_runs must be >= 1 and whole, got {num_particles} and "
            f"{num_runs}."
        )


def require_target(owner: str, model: Any, potential: Any, takes_nothing: bool) -> None:
    """Refuse what is no target, or lacks a potential that it needs, or has one too many."""
    if isinstance(model, Composition):
        return
    if isinstance(model, ReverseChain):
        if potential is None and not takes_nothing:
            raise TypeError(
                f"{owner}: a bare chain needs a potential; pass one, such as "
                "Reward(dock, temperature=0.1)."
            )
        return
    if isinstance(model, Distribution):
        raise TypeError(
            f"{owner}: the target must be a ReverseChain or a Pyro program, got the distribution "
            f"{type(model).__name__}, which has no steps to move by; pass the chain itself."
        )
    if not callable(model):
        raise TypeError(
            f"{owner}: the target must be a ReverseChain or a Pyro program, got "
            f"{type(model).__name__}."
        )
    if potential is not None:
        raise ValueError(
            f"{owner}: a program is its own potential; write the potential into it with "
            "ppl_diffusion.potentials.factor."
        )


def require_latent_moves(moves: Any) -> None:
    """Refuse words for the moves of latents, which no path moves can be."""
    if isinstance(moves, str | bool):
        raise TypeError(
            f"SMC: moves={moves!r} says not how latents move; pass 'auto', None for not at all, or "
            "LatentMoves(kernel='hmc', ...)."
        )


def require_moves(owner: str, moves: Any, *, exact: bool = True) -> tuple[PathMove, ...]:
    """Return path moves, refusing anything else.

    :param exact: refuse those that leave no law invariant, too.
    """
    given = tuple(moves) if isinstance(moves, Iterable) else (moves,)
    wrong = [move for move in given if not isinstance(move, PathMove)]
    if wrong or not isinstance(moves, Iterable):
        kind = type(wrong[0] if wrong else moves).__name__
        raise TypeError(
            f"{owner}: moves must be a sequence of path moves, such as [SuffixRefresh(4)], got "
            f"{kind}."
        )
    unpaid = [move for move in given if exact and not move.exact]
    if unpaid:
        raise ValueError(
            f"{owner}: {unpaid[0]!r} does not leave the target alone; pay for it, or use it in a "
            "Refinement, whose law then says so."
        )
    return given
