"""A potential as a run asks it: every sequence once, the slow ones while something else runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppl_diffusion.distributed import own_rows, shared_rows
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.row_memory import MAX_BYTES, MAX_ROWS, RowMemory
from ppl_diffusion.rows import DistinctRows

Pending = Callable[[], Tensor]
"""Waits for an answer that was asked for before, and returns it: float64 ``(*batch,)``."""


FEW = 2048
"""Rows of a question up to which a dictionary on the host is faster than sorted hashes."""


class Question(NamedTuple):
    """What is not known about a batch of sequences.

    :ivar asked: distinct sequences about which nothing is remembered, int64 ``(n, L)``.
    :ivar settle: remembers their answers ``(n,)``, and returns those of the batch, ``(B,)``.
    """

    asked: Tensor
    settle: Callable[[Tensor], Tensor]


class Answers(Protocol):
    """What is remembered of answers."""

    def question(self, rows: Tensor) -> Question: ...


class SortedAnswers:
    """Answers by sorted hashes: few operations on many rows, wherever these are.

    :param memory: where they are kept.
    """

    def __init__(self, memory: RowMemory | None = None) -> None:
        self.memory = RowMemory() if memory is None else memory

    def question(self, rows: Tensor) -> Question:
        first, inverse, hashes = DistinctRows.of(rows)
        unique = rows.index_select(0, first)
        values, known = self.memory.find(unique, hashes)
        new = (~known).nonzero()[:, 0]
        asked = unique[new]

        def settle(answers: Tensor) -> Tensor:
            if len(new):
                values[new] = answers
                self.memory.add(asked, hashes[new], answers)
            return values[inverse]

        return Question(asked, settle)


class ListedAnswers:
    """Answers in a dictionary: nothing is launched for a few rows on the host."""

    def __init__(self) -> None:
        self.known: dict[bytes, float] = {}

    def question(self, rows: Tensor) -> Question:
        keys = [row.tobytes() for row in rows.to("cpu", torch.int32).numpy()]
        new: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self.known:
                new.setdefault(key, i)
        asked = rows[list(new.values())]
        # Held here: what other questions crowd out meanwhile is still known to this one.
        mine = {key: self.known[key] for key in keys if key in self.known}

        def settle(answers: Tensor) -> Tensor:
            own = dict(zip(new, answers.tolist(), strict=True))
            mine.update(own)
            self.known.update(own)
            self._forget(rows.shape[-1])
            values = torch.tensor([mine[key] for key in keys], dtype=torch.float64, device="cpu")
            return values.to(rows.device)

        return Question(asked, settle)

    def _forget(self, length: int) -> None:
        """Forget the older half of what is more than there is room for."""
        room = min(MAX_ROWS, MAX_BYTES // (4 * max(length, 1)))
        if len(self.known) > room:
            for key in list(islice(self.known, len(self.known) - room // 2)):
                del self.known[key]


class EvaluatedPotential:
    """A potential asked once per distinct sequence of a run, with its answers kept.

    Memory is bounded (:class:`~ppl_diffusion.row_memory.RowMemory`): what was forgotten is asked
    about again, which costs a call and changes no answer.

    :ivar num_calls: sequences the potential was asked about.
    """

    def __init__(self, potential: AbstractPotential) -> None:
        self.potential = potential
        self.num_calls = 0
        self._answers: dict[bool, Answers] = {}

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``log G``, float64 ``(*batch,)``.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        """
        return self._evaluate(x0, final=True)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the finite surrogate for guesses, float64 ``(*batch,)``.

        :param x0: guessed tokens, int64 ``(*batch, L)``.
        """
        return self._evaluate(x0, final=False)

    def submit(self, x0: Tensor) -> Pending:
        """Begin to compute the look-ahead of guesses, and return what waits for it.

        :param x0: guessed tokens, int64 ``(*batch, L)``.
        """
        question = self._question(x0, final=False)
        if len(question.asked):
            self.potential.prefetch(question.asked[own_rows(len(question.asked))])
        return lambda: self._answer(question, final=False).reshape(x0.shape[:-1])

    def _evaluate(self, x0: Tensor, *, final: bool) -> Tensor:
        return self._answer(self._question(x0, final), final).reshape(x0.shape[:-1])

    def _question(self, x0: Tensor, final: bool) -> Question:
        rows = x0.reshape(-1, x0.shape[-1])
        if final not in self._answers:  # chosen once: two memories would ask twice
            few = rows.device.type == "cpu" and len(rows) <= FEW
            self._answers[final] = ListedAnswers() if few else SortedAnswers()
        return self._answers[final].question(rows)

    def _answer(self, question: Question, final: bool) -> Tensor:
        asked, settle = question
        if not len(asked):
            return settle(asked.new_zeros(0, dtype=torch.float64))
        self.num_calls += len(asked)
        rate = self.potential if final else self.potential.lookahead
        return settle(shared_rows(len(asked), lambda part: rate(asked[part]), asked.device)[0])


class UncachedPotential(EvaluatedPotential):
    """A potential asked about every row it is shown: for comparison, and for random potentials."""

    def submit(self, x0: Tensor) -> Pending:
        """Ask when the answer is collected."""
        return lambda: self.lookahead(x0)

    def _evaluate(self, x0: Tensor, *, final: bool) -> Tensor:
        rows = x0.reshape(-1, x0.shape[-1])
        self.num_calls += len(rows)
        values = self.potential(rows) if final else self.potential.lookahead(rows)
        return values.to(torch.float64).reshape(x0.shape[:-1])
