"""Functions of a sequence that are slow, may fail, and must be evaluated once per sequence.

SMC asks for the same sequences again and again (resampling copies them), and a docking program or
a laboratory robot answers slowly, in parallel, and not always. :class:`SequenceFunction` sits
between the two: it removes duplicates, remembers values, hands pieces to an executor, and turns
every failure either into one clear error or into a counted rejection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import NoReturn

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
    RowFunction,
    guided_sizes,
)
from ppl_diffusion.potentials.causes import Failure, GaveUp, Tally, failure_of
from ppl_diffusion.potentials.failures import report, watch_calls
from ppl_diffusion.potentials.function_options import (
    FunctionOptions as FunctionOptions,
)
from ppl_diffusion.potentials.function_options import (
    KeyFunction,
    OnError,
    check_options,
)
from ppl_diffusion.potentials.keys import keys_of
from ppl_diffusion.potentials.memory import Memory
from ppl_diffusion.potentials.workers import CallsBeside, workers_of
from ppl_diffusion.rows import distinct_rows


@dataclass(eq=False, repr=False)
class SequenceFunction:
    """A function of sequences with a cache, an optional executor, and a policy for failures.

    :param fn: ``x0 (B, L) int64 -> (B,)``: a tensor, an array, a series, a list or a generator of
        numbers. None, text or any other object in place of a number, and another number of values
        than of sequences, are failures like an exception.
    :param batch_size: sequences per call of ``fn``; by default all at once, and with an executor
        pieces that shrink towards the end (:func:`~ppl_diffusion.potentials.calls.guided_sizes`),
        or one at a time where failures are expected (a ``timeout``, ``retries``, or an
        ``on_error`` that is not ``"raise"``): the neighbours of a failure would have to be asked
        about again.
    :param executor: where calls run.
    :param num_workers: how many calls it runs at once, where it does not say so itself.
    :param timeout: seconds that a call may take, in an executor that can end calls
        (:class:`~ppl_diffusion.potentials.Processes`, ``RayExecutor``); in another one the seconds
        without any call finishing after which the running ones are given up, though they run on.
    :param on_error: ``"raise"`` a :class:`~ppl_diffusion.errors.PotentialError`; ``"reject"``: a
        failed sequence is counted in :attr:`num_failures` and gets NaN here, now and later; or a
        number that it gets instead, in units of the function.
    :param retries: how often a failed sequence is asked about again before it counts as one.
    :param key: what tells sequences apart, ``rows (B, L) -> B`` texts or bytes (the tokens by
        default): of those with one key one is asked about, and speaks for all.
    :param cache_size: values remembered, the least recently used are dropped first.
    :param cache: an SQLite file where answers and failures outlive the run, which runs of one
        machine may share.
    :param version: of the function; answers of another version are not used.
    :param retry_failed: ask again about what failed according to the file.
    :param budget: sequences that may be handed to ``fn``, repetitions included; cached ones are
        free. Look-aheads beyond it get :meth:`guess` 's word that there is no answer.
    :param reserve: how many of them are kept back for values that are no look-aheads.
    :param worst: the one infinite value that is legal, if any (the value of an impossible
        sequence); NaN and every other infinity is a failure.

    A batch that raises is repeated one sequence at a time, so that one bad sequence is found and
    costs no other its value. Values that were finished before an error stay in the cache.

    :ivar num_calls: sequences handed to ``fn`` so far, repetitions after a failure included.
    :ivar num_sequences: distinct sequences that got an answer so far, rejections included.
    :ivar tally: those that failed so far, by cause, with the first words of each.
    """

    fn: RowFunction
    _: KW_ONLY
    name: str | None = None
    batch_size: int | None = None
    executor: Executor | None = None
    num_workers: int | None = None
    timeout: float | None = None
    on_error: OnError = "raise"
    retries: int = 0
    key: KeyFunction | None = None
    cache_size: int = 100_000
    cache: str | Path | None = None
    version: str = ""
    retry_failed: bool = False
    budget: int | None = None
    reserve: int | None = None
    worst: float | None = -math.inf
    num_sequences: int = field(default=0, init=False)
    tally: Tally = field(default_factory=Tally, init=False)

    def __post_init__(self) -> None:
        self.name = self.name or str(getattr(self.fn, "__name__", type(self.fn).__name__))
        check_options(self)
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

    def keep_back(self, num_sequences: int) -> None:
        """Keep so many sequences of the budget for final values, unless ``reserve`` was given.

        :param num_sequences: what a run needs in the end.
        """
        if self.reserve is None:
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
            known, read = self._find(question)
            # Whoever collects them finds them in memory, and is told where they came from.
            self._calls.counts.update({FROM_DISK: read, FROM_MEMORY: -read})
            self._start({k: row for k, row in question.items() if k not in known}, guess=True)

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
        found, read = self._find(question)
        self._calls.counts.update({FROM_DISK: read, FROM_MEMORY: len(found) - read})
        wanted = {key for key in question if key not in found}
        unasked = self._start({k: row for k, row in question.items() if k in wanted}, guess)
        for key, answer in self._answers(wanted - unasked, guess):
            if key in wanted and answer is not None:
                found[key] = answer
        self._calls.counts[GUESSED] += len(question) - len(found)
        report(str(self.name), self.fn, found, self.tally)
        return [self._value(found[key]) if key in found else None for key in keys]

    def _question(self, rows: Tensor) -> tuple[list[bytes], dict[bytes, Tensor]]:
        """Return the key of each row, and a row of each key."""
        keys = keys_of(rows, self.key, str(self.name))
        question: dict[bytes, Tensor] = {}
        for key, row in zip(keys, rows, strict=True):
            question.setdefault(key, row)
        return keys, question

    def _find(self, question: dict[bytes, Tensor]) -> tuple[dict[bytes, Answer], int]:
        """Return what is known, and how much of it was read from the file just now."""
        found, stored = self._memory.find(question)
        self.num_sequences += len(stored)
        for key, answer in stored.items():
            if isinstance(answer, Failure):
                known = f"{answer.message}, known from {self.cache}: retry_failed=True asks again"
                self._fail(question[key], Failure(answer.cause, known), None)
        return {**found, **stored}, len(stored)

    def _start(self, new: dict[bytes, Tensor], guess: bool) -> set[bytes]:
        """Start calls for what is not being asked about already, and return what cannot be."""
        keys = [key for key in new if key not in self._calls.under_way]
        allowed = self._allowed(len(keys), guess)
        if allowed < len(keys) and not guess:
            raise self._budget.spent(str(self.name), len(keys) - allowed)
        begin = 0
        for size in self._sizes(allowed):
            part = keys[begin : begin + size]
            self._calls.submit(Piece(part, torch.stack([new[key] for key in part])))
            begin += size
        return set(keys[allowed:])

    def _allowed(self, count: int, guess: bool) -> int:
        left = self._budget.left(self.num_calls, str(self.name), guess=guess)
        return count if left is None else min(count, left)

    def _sizes(self, count: int) -> list[int]:
        size, workers = self.batch_size, self._calls.num_workers
        if size is None and self.executor is not None:
            if workers is not None and not self._alone:
                return guided_sizes(count, workers)
            size = 1
        size = size or max(count, 1)
        return [min(size, count - begin) for begin in range(0, count, size)]

    @property
    def _alone(self) -> bool:
        """Whether failures are expected, whose neighbours would have to be asked about again."""
        timeout = self.timeout or getattr(self.executor, "timeout", None)
        return timeout is not None or self.on_error != "raise" or self.retries > 0

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
        answers = self._read(piece, outcome)
        again = self._retried(piece, answers, guess)
        settled = {i: answer for i, answer in enumerate(answers) if i not in again}
        self._memory.keep({piece.keys[i]: a for i, a in settled.items()}, _cost(piece))
        self.num_sequences += len(settled)
        cause = outcome if isinstance(outcome, Exception) else None
        for i, answer in settled.items():
            if isinstance(answer, Failure):
                self._fail(piece.rows[i], answer, cause)
            yield piece.keys[i], answer

    def _one_by_one(self, piece: Piece, guess: bool) -> Iterator[tuple[bytes, None]]:
        """Ask about each sequence alone, as far as the budget goes."""
        allowed = self._allowed(len(piece), guess)
        for i in range(allowed):
            self._calls.submit(piece.single(i))
        if allowed < len(piece) and not guess:
            raise self._budget.spent(str(self.name), len(piece) - allowed)
        for key in piece.keys[allowed:]:
            yield key, None

    def _retried(self, piece: Piece, answers: list[Answer], guess: bool) -> set[int]:
        """Ask again about those that failed, as often as they may and the budget allows."""
        failed = [i for i, answer in enumerate(answers) if isinstance(answer, Failure)]
        if not failed or piece.attempt > self.retries:
            return set()
        again = failed[: self._allowed(len(failed), guess)]
        for i in again:
            self._calls.submit(piece.single(i, again=True))
        return set(again)

    def _read(self, piece: Piece, outcome: Outcome) -> list[Answer]:
        if isinstance(outcome, Exception):
            return [failure_of(outcome)] * len(piece)
        return [self._check(value) for value in outcome]

    def _check(self, value: float | str) -> Answer:
        if isinstance(value, str):
            return failure_of(value)
        legal = math.isfinite(value) or value == self.worst
        return value if legal else failure_of(f"it returned {value}")

    def _fail(self, row: Tensor, failure: Failure, cause: Exception | None) -> None:
        if self.on_error == "raise":
            self._raise(row, failure, cause)
        self.tally.add(failure, f"{failure.message}, on the sequence {row.tolist()}")

    def _raise(self, row: Tensor, failure: Failure, cause: Exception | None) -> NoReturn:
        raise PotentialError(
            f"{self.name} failed on the sequence {row.tolist()} ({failure.message}); mend the "
            'function, or pass on_error="reject" to give such sequences probability zero.'
        ) from cause

    def _value(self, answer: Answer) -> float:
        if not isinstance(answer, Failure):
            return answer
        return math.nan if isinstance(self.on_error, str) else float(self.on_error)

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
