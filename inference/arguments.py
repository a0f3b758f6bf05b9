"""What programs of inference are given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from torch.distributions import Distribution

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.smc.rejuvenation import PathMove


def require_counts(owner: str, num_particles: Any, num_runs: Any) -> None:
    """Refuse numbers of particles and runs that are not whole and positive.

    :param owner: what the refusal calls the method.
    :param num_particles: particles.
    :param num_runs: runs.
    :raises ValueError: if one is not.
    """
    whole = all(isinstance(n, Integral) for n in (num_particles, num_runs))
    if not whole or num_particles < 1 or num_runs < 1:
        raise ValueError(
            f"{owner}: num_particles and num_runs must be >= 1 and whole, got {num_particles} and "
            f"{num_runs}."
        )


def require_program(owner: str, model: Any) -> None:
    """Refuse what is no Pyro program.

    :param owner: what the refusal calls the method.
    :param model: what it was given.
    :raises TypeError: if it is a distribution, which is a function too, or no function.
    """
    if isinstance(model, ReverseChain):
        raise TypeError(
            f"{owner}: the target must be a Pyro program, got a bare ReverseChain; write a program "
            "that samples it, or use FKSteering(chain, potential)."
        )
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


def require_moves(owner: str, moves: Any) -> tuple[PathMove, ...]:
    """Return path moves, refusing anything else.

    :param owner: what the refusal calls the method.
    :param moves: the moves, in order.
    :raises TypeError: if they are not path moves.
    """
    given = tuple(moves) if isinstance(moves, Iterable) else (moves,)
    wrong = [move for move in given if not isinstance(move, PathMove)]
    if wrong or not isinstance(moves, Iterable):
        kind = type(wrong[0] if wrong else moves).__name__
        raise TypeError(
            f"{owner}: moves must be a sequence of path moves, such as [SuffixRefresh(4)], got "
            f"{kind}."
        )
    return given
