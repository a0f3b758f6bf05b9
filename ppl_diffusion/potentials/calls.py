"""Calls of a function of sequences, made one after another, and how many rows each is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppl_diffusion.potentials.answers import read_answer

RowFunction = Callable[[Tensor], Any]
Outcome = list[float | str] | Exception
"""What came back for a piece: a number or a reason for each sequence, or an error for all."""

SHARES = 4
"""A piece is at most this part of a worker's share of what is left."""


@dataclass(eq=False)
class Piece:
    """Sequences of one call.

    :param keys: what they are remembered by.
    :param rows: the sequences, int64 ``(B, L)``.
    """

    keys: list[bytes]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def singles(self) -> Iterator[Piece]:
        """Yield a piece for each sequence."""
        for i, key in enumerate(self.keys):
            yield Piece([key], self.rows[i : i + 1])


class Calls(ABC):
    """Calls that were started, and what came back.

    :param fn: the function.
    :param num_workers: calls that run at once, None where nobody knows.

    :ivar num_rows: sequences handed to the function so far.
    :ivar num_known: sequences whose values were known when they were asked for.
    :ivar under_way: keys of sequences whose answer is not collected yet.
    """

    def __init__(self, fn: RowFunction, num_workers: int | None) -> None:
        self.fn, self.num_workers = fn, num_workers
        self.num_rows = self.num_known = 0
        self.under_way: set[bytes] = set()

    def submit(self, piece: Piece) -> None:
        """Start a call.

        :param piece: its sequences.
        """
        self.num_rows += len(piece)
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
        piece = self._queue.popleft()
        outcome: Outcome
        try:
            outcome = read_answer(self.fn(piece.rows), len(piece))
        except Exception as error:
            outcome = error
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
