"""Functions of a sequence that are slow, may fail, and must be evaluated once per sequence.

SMC asks for the same sequences again and again (resampling copies them), and a docking program or
a laboratory robot answers slowly, in parallel, and not always. :class:`SequenceFunction` sits
between the two: it removes duplicates, remembers values, hands pieces to an executor, and turns
every failure either into one clear error or into a counted rejection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.answer_store import Answer, AnswerStore, Cost
from ppl_diffusion.potentials.budget import Budget
from ppl_diffusion.potentials.calls import (
    ASKED,
    FROM_DISK,
    FROM_MEMORY,
    GUESSED,
    Calls,
    CallsInTurn,
    Outcome,
    Piece,
)
from ppl_diffusion.potentials.causes import Failure, GaveUp, Tally
from ppl_diffusion.potentials.failures import report, watch_calls
from ppl_diffusion.potentials.function_options import FunctionSettings, shown
from ppl_diffusion.potentials.keys import keys_of
from ppl_diffusion.potentials.memory import Memory
from ppl_diffusion.potentials.times import Times
from ppl_diffusion.potentials.workers import CallsBeside, workers_of
from ppl_diffusion.rows import distinct_rows


@dataclass(eq=False, repr=False)
class SequenceFunction(FunctionSettings):
    """A function of sequences with a cache, an optional executor, and a policy for failures.

    :param fn: the function, and its options; see :class:`FunctionSettings`.

    A batch that raises is repeated one sequence at a time, so that one bad sequence is found and
    costs no other its value. Values that were finished before an error stay in the cache.

    :ivar num_calls: sequences handed to ``fn`` so far, repetitions after a failure included.
    :ivar num_sequences: distinct sequences that got an answer so far, rejections included.
    :ivar tally: those that failed so far, by cause, with the first words of each.
    """

    num_sequences: int = field(default=0, init=False)
    tally: Tally = field(default_factory=Tally, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or str(getattr(self.fn, "__name__", type(self.fn).__name__))
        self.check()
        self._budget = Budget(self.budget, self.reserve)
        self._memory = self._make_memory()
        # How many work is looked up once: it sizes the pieces, which must not change in a run.
        workers = self.num_workers or workers_of(self.executor)
        self._calls: Calls = (
            CallsInTurn(self.fn)
            if self.executor is None
            else CallsBeside(self.fn, self.executor, workers, self.timeout, str(self.name))
        )
        self._calls.budget = self._budget

    @property
    def num_calls(self) -> int:
        return self._calls.counts[ASKED]

    @property
    def num_failures(self) -> int:
        """Sequences that failed so far and were passed over."""
        return self.tally.total

    @property
    def first_failure(self) -> str | None:
        """The first of them and its reason, in words; None while there is none."""
        return self.tally.first

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the value of each sequence, NaN where it was rejected.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: float64 ``(*batch,)`` on the device of ``x0``.
        :raises PotentialError: if ``fn`` fails and ``on_error="raise"``, or lost its executor.
        :raises BudgetSpent: if the budget is spent.
        """
        return self._evaluate(x0, guess=False)[0]

    def guess(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return values for look-aheads, and for which sequences there are any.

        :param x0: guessed clean tokens, int64 ``(*batch, L)``.
        :returns: float64 ``(*batch,)``, NaN where there is no value, and bool ``(*batch,)``, False
            where the budget did not allow to ask.
        """
        return self._evaluate(x0, guess=True)

    @property
    def progress(self) -> dict[str, Any]:
        """What was asked and answered so far, in plain types, for a run that is resumed.

        Setting it makes the function, and whoever watches it, remember just that.
        """
        calls, tally = self._calls, self.tally
        counts = dict(calls.counts)
        counts[ASKED] = counts.get(ASKED, 0) - len(calls.under_way)  # they will be asked again
        return {
            "answers": self._memory.kept,
            "counts": counts,
            "times": asdict(calls.times),
            "tally": (dict(tally.counts), dict(tally.words), tally.first),
            "reserve": self._budget.reserve,
        }

    @progress.setter
    def progress(self, entries: Mapping[str, Any]) -> None:
        watch_calls(str(self.name), self._calls)
        self._memory.kept = entries["answers"]
        # In place: ledgers hold the counters, not the function.
        self._calls.counts.clear()
        self._calls.counts.update(entries["counts"])
        self._calls.clock.times = Times(**entries["times"])
        counts, words, first = entries["tally"]
        self.tally.counts.clear()
        self.tally.counts.update(counts)
        self.tally.words, self.tally.first = dict(words), first
        self._budget.reserve = entries["reserve"]
        report(str(self.name), self.fn, {}, self.tally)

    def keep_back(self, num_sequences: int) -> None:
        """Keep so many sequences of the budget for final values, unless ``reserve`` was given.

        :param num_sequences: what a run needs in the end.
        :raises PotentialError: if the budget is smaller.
        """
        if self.reserve is not None:
            return
        if self.budget is not None and self.budget < num_sequences:
            raise PotentialError(
                f"{self.name} has a budget of {self.budget} sequences, fewer than the "
                f"{num_sequences} final values of the run; give a larger budget, or ask for fewer "
                "particles or runs."
            )
        self._budget.reserve = num_sequences

    def prefetch(self, x0: Tensor) -> None:
        """Start calls for what is not known yet in the executor, and wait for none of them.

        Asking for these sequences later collects the answers; without an executor nothing happens.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        """
        if self.executor is not None:
            watch_calls(str(self.name), self._calls)
            rows = x0.reshape(-1, x0.shape[-1])
            rows = rows[distinct_rows(rows)[0]].cpu()
            question = self._question(rows)[1]
            known, read = self._find(rows, question)
            # Whoever collects them finds them in memory, and is told where they came from.
            self._calls.counts.update({FROM_DISK: read, FROM_MEMORY: -read})
            self._start(rows, {k: i for k, i in question.items() if k not in known}, guess=True)

    def clear(self) -> None:
        """Forget all values that are not in a file, rejections included; the counters stay."""
        self._memory.clear()

    def _evaluate(self, x0: Tensor, *, guess: bool) -> tuple[Tensor, Tensor]:
        rows = x0.reshape(-1, x0.shape[-1])
        first, inverse = distinct_rows(rows)
        found = self._look_up(rows[first].cpu(), guess)
        values = torch.tensor([math.nan if v is None else v for v in found], dtype=torch.float64)
        asked = torch.tensor([v is not None for v in found], dtype=torch.bool)
        shape = x0.shape[:-1]
        return (
            values.to(x0.device)[inverse].reshape(shape),
            asked.to(x0.device)[inverse].reshape(shape),
        )

    def _look_up(self, rows: Tensor, guess: bool) -> list[float | None]:
        """Return a value of each row, None where the budget did not allow to ask."""
        watch_calls(str(self.name), self._calls)
        keys, question = self._question(rows)
        found, read = self._find(rows, question)
        self._calls.counts.update({FROM_DISK: read, FROM_MEMORY: len(found) - read})
        wanted = {key for key in question if key not in found}
        unasked = self._start(rows, {k: i for k, i in question.items() if k in wanted}, guess)
        for key, answer in self._answers(wanted - unasked, guess):
            if key in wanted and answer is not None:
                found[key] = answer
        self._calls.counts[GUESSED] += len(question) - len(found)
        report(str(self.name), self.fn, found, self.tally)
        return [self.value_of(found[key]) if key in found else None for key in keys]

    def _question(self, rows: Tensor) -> tuple[list[bytes], dict[bytes, int]]:
        """Return the key of each row, and the first row of each key."""
        keys = keys_of(rows, self.key, str(self.name))
        question: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            question.setdefault(key, i)
        return keys, question

    def _find(self, rows: Tensor, question: dict[bytes, int]) -> tuple[dict[bytes, Answer], int]:
        """Return what is known, and how much of it was read from the file just now."""
        found, stored = self._memory.find(question)
        self.num_sequences += len(stored)
        for key, answer in stored.items():
            if isinstance(answer, Failure):
                known = f"{answer.message}, known from {self.cache}: retry_failed=True asks again"
                self._fail(rows[question[key]], Failure(answer.cause, known), None)
        return {**found, **stored}, len(stored)

    def _start(self, rows: Tensor, new: dict[bytes, int], guess: bool) -> set[bytes]:
        """Start calls for what is not being asked about already, and return what cannot be."""
        keys = [key for key in new if key not in self._calls.under_way]
        allowed = self._allowed(len(keys), guess)
        if allowed < len(keys) and not guess:
            raise self._budget.spent(str(self.name), len(keys) - allowed)
        begin = 0
        for size in self.sizes(allowed, self._calls.num_workers):
            part = keys[begin : begin + size]
            self._calls.submit(Piece(part, rows[[new[key] for key in part]]))
            begin += size
        return set(keys[allowed:])

    def _allowed(self, count: int, guess: bool) -> int:
        left = self._budget.left(self.num_calls, str(self.name), guess=guess)
        return count if left is None else min(count, left)

    def _answers(self, wanted: set[bytes], guess: bool) -> Iterator[tuple[bytes, Answer | None]]:
        """Yield answers as they come in, others than those wanted too, until these are all known.

        None stands for one that the budget does not allow to ask for any more.
        """
        try:
            while wanted:
                for piece, outcome in self._calls.finished():
                    for key, answer in self._answered(piece, outcome, guess):
                        wanted.discard(key)
                        yield key, answer
        except BaseException:
            self._calls.cancel()
            raise

    def _answered(
        self, piece: Piece, outcome: Outcome, guess: bool
    ) -> Iterator[tuple[bytes, Answer | None]]:
        # What took too long once would take too long again.
        failed = isinstance(outcome, Exception) and not isinstance(outcome, GaveUp)
        if failed and len(piece) > 1:
            yield from self._one_by_one(piece, guess)
            return
        answers = self.read(outcome, len(piece))
        again, unpaid = self._retried(piece, answers, guess)
        left = [i for i in range(len(piece)) if i not in again and i not in unpaid]
        settled = {piece.keys[i]: answers[i] for i in left}
        self._memory.keep(settled, _cost(piece))
        self.num_sequences += len(settled)
        cause = outcome if isinstance(outcome, Exception) else None
        for i, answer in zip(left, settled.values(), strict=True):
            if isinstance(answer, Failure):
                self._fail(piece.rows[i], answer, cause)
        yield from settled.items()
        yield from ((piece.keys[i], None) for i in unpaid)

    def _one_by_one(self, piece: Piece, guess: bool) -> Iterator[tuple[bytes, None]]:
        """Ask about each sequence alone, as far as the budget goes."""
        allowed = self._allowed(len(piece), guess)
        for i in range(allowed):
            self._calls.submit(piece.single(i))
        if allowed < len(piece) and not guess:
            raise self._budget.spent(str(self.name), len(piece) - allowed)
        for key in piece.keys[allowed:]:
            yield key, None

    def _retried(
        self, piece: Piece, answers: list[Answer], guess: bool
    ) -> tuple[list[int], list[int]]:
        """Ask again about those that failed, and return which, and for which look-aheads it ends.

        A final value that the budget leaves no more attempts for has failed.
        """
        failed = [i for i, answer in enumerate(answers) if isinstance(answer, Failure)]
        if not failed or piece.attempt > self.retries:
            return [], []
        allowed = self._allowed(len(failed), guess)
        for i in failed[:allowed]:
            self._calls.submit(piece.single(i, again=True))
        return failed[:allowed], failed[allowed:] if guess else []

    def _fail(self, row: Tensor, failure: Failure, cause: Exception | None) -> None:
        if self.on_error == "raise":
            self.refuse(row, failure, cause)
        self.tally.add(failure, f"{failure.message}, on the sequence {shown(self.fn, row)}")

    def _make_memory(self) -> Memory:
        store = None
        if self.cache is not None:
            store = AnswerStore(self.cache, str(self.name), self.version)
        return Memory(
            self.cache_size,
            store,
            forget_failures=self.on_error == "raise",
            retry_failed=self.retry_failed,
        )


def _cost(piece: Piece) -> Cost:
    seconds = None if piece.seconds is None else piece.seconds / len(piece)
    return Cost(seconds, piece.attempt)
