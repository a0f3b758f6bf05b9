"""The order in which tokens and a latent beside them lose their noise (LADD, arXiv 2510.18114).

A path is a list of pairs of levels, (tokens, latent), from (1, 1), where all is noise, to (0, 0).
Masked diffusion and the published schedules are four of them. Where a step lowers both levels,
tokens and latent are drawn at once, independently given what was there before: that forgets how
they depend on each other, so that paths of few steps should lower one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from ppl_diffusion.processes.base import whole_number


@dataclass(frozen=True)
class Path:
    """A schedule over a latent and the tokens: ``(token level, latent level)`` after each step.

    A latent that stays at level 1 to the end is never drawn (masked diffusion); one that is drawn
    after the last token is read off the finished sequence.

    :param levels: ``T + 1`` pairs in ``[0, 1]``, from ``(1, 1)``; each step lowers at least one
        level and raises none.
    :raises ValueError: if that is not so, a token would stay noisy, or the tokens are finished
        while the latent is on its way.
    """

    levels: tuple[tuple[float, float], ...]

    def __init__(self, levels: Iterable[Sequence[float]]) -> None:
        object.__setattr__(self, "levels", _pairs(levels))
        _check(np.array(self.levels))

    @classmethod
    def masked(cls, num_steps: int) -> Self:
        """Return the path of masked diffusion: tokens alone, the latent is never drawn."""
        return cls((x, 1.0) for x in _down(num_steps))

    @classmethod
    def joint(cls, num_steps: int) -> Self:
        """Return the path on which both go down together (JOINT), one evaluation a step."""
        return cls((x, x) for x in _down(num_steps))

    @classmethod
    def sequential(cls, latent_steps: int, token_steps: int) -> Self:
        """Return the path on which the latent is finished first (SEQ)."""
        first = [(1.0, y) for y in _down(latent_steps)]
        return cls(first + [(x, 0.0) for x in _down(token_steps)[1:]])

    @classmethod
    def ordered(cls, num_steps: int) -> Self:
        """Return the path of JOINT in half steps, the latent first (ORDERED-JOINT)."""
        down = _down(num_steps)
        halves = [[(x, y), (y, y)] for x, y in pairwise(down)]
        return cls([(1.0, 1.0)] + [pair for half in halves for pair in half])

    @classmethod
    def led(cls, num_steps: int, lead: int) -> Self:
        """Return the path on which the latent is ``lead`` steps ahead of the tokens.

        :param num_steps: steps of either, of the same size.
        :param lead: 0 is JOINT, ``num_steps`` SEQ.
        """
        steps = whole_number(num_steps, "Path.led: num_steps")
        if not 0 <= lead <= steps:
            raise ValueError(f"Path.led: lead must lie in 0..{steps}, got {lead}.")
        counts = range(steps + lead + 1)
        pairs = [(min(steps, steps + lead - n) / steps, max(steps - n, 0) / steps) for n in counts]
        return cls(pairs)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of steps, each of which needs one evaluation of the network."""
        return len(self.levels) - 1

    @property
    def draws_latent(self) -> bool:
        """Whether the latent is drawn at all."""
        return self.levels[-1][1] < 1.0

    @property
    def first_token_step(self) -> int:
        """The first step that draws tokens, 0 to ``T - 1``."""
        return sum(tokens == 1.0 for tokens, _ in self.levels) - 1

    @property
    def one_at_a_time(self) -> bool:
        """Whether no step draws tokens and latent at once."""
        steps = pairwise(self.levels)
        return not any(x < x0 and y < y0 for (x0, y0), (x, y) in steps)

    def __repr__(self) -> str:
        shown = ", ".join(f"({x:.3g}, {y:.3g})" for x, y in self.levels)
        return f"Path([{shown}])"


def _down(num_steps: int) -> list[float]:
    steps = whole_number(num_steps, "Path: number of steps")
    return [(steps - n) / steps for n in range(steps + 1)]


def _pairs(levels: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    try:
        pairs = tuple((float(x), float(y)) for x, y in levels)
    except (TypeError, ValueError):
        pairs = ()
    if len(pairs) < 2:
        raise ValueError(
            "Path: levels must be at least two pairs of numbers (token level, latent level), got "
            f"{levels!r}."
        )
    return pairs


def _check(levels: np.ndarray) -> None:
    if not np.all(np.isfinite(levels)) or levels.min() < 0 or tuple(levels[0]) != (1.0, 1.0):
        raise ValueError("Path: levels must lie in [0, 1] and begin at (1, 1), where all is noise.")
    falls = -np.diff(levels, axis=0)
    if falls.min() < 0:
        k = int(np.argmax(falls.min(1) < 0))
        raise ValueError(
            f"Path: step {k} raises a level, {_pair(levels[k])} to {_pair(levels[k + 1])}; what "
            "was revealed cannot be hidden again."
        )
    if falls.max(1).min() == 0:
        k = int(np.argmax(falls.max(1) == 0))
        raise ValueError(f"Path: step {k} changes nothing, at {_pair(levels[k])}; leave it out.")
    tokens, latent = levels[-1]
    if tokens != 0:
        raise ValueError(f"Path: the tokens end at level {tokens:.3g}, still noisy; end them at 0.")
    if latent not in (0.0, 1.0):
        raise ValueError(
            f"Path: the latent ends at level {latent:.3g}; end it at 0, or leave it at 1 "
            "throughout where it is not to be drawn."
        )
    at_end = levels[levels[:, 0] == 0][0, 1]
    if at_end not in (0.0, 1.0):
        raise ValueError(
            f"Path: the tokens are finished while the latent is at level {at_end:.3g}, and what it "
            "becomes matters no more; finish the latent no later than the tokens."
        )


def _pair(levels: np.ndarray) -> str:
    return f"({levels[0]:.3g}, {levels[1]:.3g})"


PATHS = {
    "masked": Path.masked,
    "joint": Path.joint,
    "seq": Path.sequential,
    "ordered": Path.ordered,
}
"""The published paths by name."""
