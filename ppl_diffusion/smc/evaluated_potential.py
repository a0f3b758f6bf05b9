"""A potential as a run asks it: every sequence once, the slow ones while something else runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.row_memory import RowMemory
from ppl_diffusion.rows import DistinctRows

Pending = Callable[[], Tensor]
"""Waits for an answer that was asked for before, and returns it: float64 ``(*batch,)``."""


class _Question(NamedTuple):
    """Distinct sequences, and what is known of them.

    :ivar rows: the sequences, int64 ``(U, L)``.
    :ivar hashes: of the sequences, ``(U,)``.
    :ivar inverse: which of them each row is, ``(B,)``.
    :ivar values: what is remembered, ``(U,)``.
    :ivar new: indices of those about which nothing is, ``(n,)``.
    """

    rows: Tensor
    hashes: Tensor
    inverse: Tensor
    values: Tensor
    new: Tensor


class EvaluatedPotential:
    """A potential asked once per distinct sequence of a run, with its answers kept.

    Memory is bounded (:class:`~ppl_diffusion.row_memory.RowMemory`): what was forgotten is asked
    about again, which costs a call and changes no answer.

    :ivar num_calls: sequences the potential was asked about.
    """

    def __init__(self, potential: AbstractPotential) -> None:
        self.potential = potential
        self.num_calls = 0
        self._memory = {final: RowMemory() for final in (True, False)}

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
        if len(question.new):
            self.potential.prefetch(question.rows[question.new])
        return lambda: self._answer(question, final=False).reshape(x0.shape[:-1])

    def _evaluate(self, x0: Tensor, *, final: bool) -> Tensor:
        return self._answer(self._question(x0, final), final).reshape(x0.shape[:-1])

    def _question(self, x0: Tensor, final: bool) -> _Question:
        rows = x0.reshape(-1, x0.shape[-1])
        first, inverse, hashes = DistinctRows.of(rows)
        unique = rows.index_select(0, first)
        values, known = self._memory[final].find(unique, hashes)
        return _Question(unique, hashes, inverse, values, (~known).nonzero()[:, 0])

    def _answer(self, question: _Question, final: bool) -> Tensor:
        rows, hashes, inverse, values, new = question
        if len(new):
            self.num_calls += len(new)
            asked = rows[new]
            values[new] = answers = (
                self.potential(asked) if final else self.potential.lookahead(asked)
            )
            self._memory[final].add(asked, hashes[new], answers)
        return values[inverse]


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
