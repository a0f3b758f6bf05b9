"""Calls of a function of sequences, made one after another, and how many rows each is given."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl_diffusion.potentials.answers import read_answer
from ppl_diffusion.potentials.budget import Budget
from ppl_diffusion.potentials.times import Clock, Times

RowFunction = Callable[[Tensor], Any]
Outcome = list[float | str] | Exception
"""What came back for a piece: a number or a reason for each sequence, or an error for all."""

SHARES = 4
"""A piece is at most this part of a worker's share of what is left."""

ASKED, FROM_MEMORY, FROM_DISK, RETRIED, KILLED, GUESSED = (
    "asked",
    "cached_memory",
    "cached_disk",
    "retried",
    "killed",
    "guessed",
)
"""What is counted: sequences handed to the function, those whose value was known or stored, those
handed to it again after a failure, calls whose worker was killed, and look-aheads that were not
asked for because the budget was spent."""


@dataclass(eq=False)
class Piece:
    """Sequences of one call.

    :param keys: what they are remembered by.
    :param rows: the sequences, int64 ``(B, L)``.
    :param attempt: how often they have been asked about, this time included.
    :param seconds: that the call took, None while that is not known.
    """

    keys: list[bytes]
    rows: Tensor
    attempt: int = 1
    seconds: float | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def single(self, i: int, *, again: bool = False) -> Piece:
        """Return a piece of one sequence.

        :param i: which.
        :param again: whether it is another attempt.
        """
        return Piece([self.keys[i]], self.rows[i : i + 1], self.attempt + again)


class Calls(ABC):
    """Calls that were started, and what came back.

    :param fn: the function.
    :param num_workers: calls that run at once, None where nobody knows.

    :ivar counts: what happened so far, by the names above.
    :ivar under_way: keys of sequences whose answer is not collected yet.
    :ivar budget: what they may cost.
    """

    def __init__(self, fn: RowFunction, num_workers: int | None) -> None:
        self.fn, self.num_workers = fn, num_workers
        self.counts: Counter[str] = Counter()
        self.clock = Clock()
        self.under_way: set[bytes] = set()
        self.budget = Budget(None, None)

    @property
    def times(self) -> Times:
        """What calls took so far."""
        return self.clock.times

    def submit(self, piece: Piece) -> None:
        """Start a call.

        :param piece: its sequences.
        """
        self.counts[ASKED] += len(piece)
        self.counts[RETRIED] += len(piece) * (piece.attempt > 1)
        self.under_way.update(piece.keys)
        self._start(piece)

    def finished(self) -> Iterator[tuple[Piece, Outcome]]:
        """Wait for the next calls to end, and yield what came back for each."""
        for piece, outcome in self._wait():
            self.under_way.difference_update(piece.keys)
            yield piece, outcome

    def cancel(self) -> None:
        """Forget the calls that nobody has collected; those that have not begun never will."""
        self.under_way.clear()

    @abstractmethod
    def _start(self, piece: Piece) -> None: ...

    @abstractmethod
    def _wait(self) -> Iterator[tuple[Piece, Outcome]]: ...


class CallsInTurn(Calls):
    """Calls made here, one after another, when somebody waits for them.

    :param fn: the function.
    """

    def __init__(self, fn: RowFunction) -> None:
        super().__init__(fn, 1)
        self._queue: deque[Piece] = deque()

    def _start(self, piece: Piece) -> None:
        self._queue.append(piece)

    def _wait(self) -> Iterator[tuple[Piece, Outcome]]:
        # The sampler waits from before the call is under way until after: nothing overlaps.
        piece, started = self._queue.popleft(), time.perf_counter()
        outcome: Outcome
        self.clock.started(piece)
        try:
            outcome = read_answer(self.fn(piece.rows), len(piece))
        except Exception as error:
            outcome = error
        self.clock.ended(piece)
        piece.seconds = time.perf_counter() - started
        self.clock.waited(piece.seconds)
        if not isinstance(outcome, Exception):
            self.clock.worked(piece.seconds)
        yield piece, outcome

    def cancel(self) -> None:
        super().cancel()
        self._queue.clear()


def guided_sizes(count: int, num_workers: int) -> list[int]:
    """Return how many sequences each call is given, so that workers end together.

    Guided self-scheduling (Polychronopoulos and Kuck 1987), by a quarter of the share: every piece
    is that part of what a worker's share of the remaining sequences is, and the last ones hold one.
    Large pieces spare the cost of calls; none is so large that a slow one keeps the others waiting.
    Times play no part: the pieces of a run are the same whenever it is repeated.

    :param count: sequences in all.
    :param num_workers: calls that run at once.
    """
    sizes: list[int] = []
    while count:
        size = max(1, count // (SHARES * num_workers))
        sizes.append(size)
        count -= size
    return sizes
