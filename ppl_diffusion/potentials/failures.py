"""Which functions of sequences failed during a run, and how busy their workers were.

A reward may stand deep inside a program, and be made anew whenever that runs. So functions report
to whoever watches, and nobody has to find them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from types import FunctionType, MethodType
from typing import Any

from ppl_diffusion.distributed import own_rows
from ppl_diffusion.errors import ParticleCollapse, PotentialError
from ppl_diffusion.potentials.answer_store import Answer
from ppl_diffusion.potentials.calls import Calls, RowFunction
from ppl_diffusion.potentials.causes import Failure, Tally
from ppl_diffusion.potentials.ledger import Ledger
from ppl_diffusion.potentials.workers import CallsBeside

REWARDS = "rewards"
"""The settings that hold seconds, and differ between runs of one seed."""

MOST = 8
"""Functions of one name that are told apart: a program may make another whenever it runs."""


class Failures:
    """Distinct sequences that functions were asked about, and those they failed on, by name.

    The second of two functions that bear one name is called ``"name 2"``.
    """

    def __init__(self) -> None:
        self._functions: dict[str, dict[Hashable, tuple[str, RowFunction]]] = {}
        self._ledger = Ledger()
        self._beside: dict[int, CallsBeside] = {}
        self._known: dict[str, dict[int, str | None]] = {}
        self._words: dict[str, Tally] = {}

    def note(
        self, name: str, fn: RowFunction, answers: Mapping[bytes, Answer], tally: Tally
    ) -> None:
        """Note what a function answered.

        :param name: of the function.
        :param fn: the function.
        :param answers: by sequence.
        :param tally: what has failed so far, with words.
        """
        name = self._told_apart(name, fn)
        known = self._known.setdefault(name, {})
        known.update((_number(key), _cause(answer)) for key, answer in answers.items())
        if tally.total:
            self._words.setdefault(name, tally)

    def told(self) -> dict[str, dict[str, Any]]:
        """Return what failed, in JSON types, by name.

        ``asked`` and ``failed`` are distinct sequences, ``causes`` says how many of these failed
        why, ``words`` what happened at the first of each cause, and ``first`` at the first of all.
        """
        found = {}
        for name, known in self._known.items():
            causes = Counter(cause for cause in known.values() if cause is not None)
            if causes:
                tally = self._words.get(name, Tally())
                words = {cause: tally.words[cause] for cause in causes if cause in tally.words}
                counts = {"asked": len(known), "failed": causes.total(), "causes": dict(causes)}
                found[name] = {**counts, "words": words, "first": tally.first or "not known"}
        return found

    def watch(self, name: str, calls: Calls) -> None:
        """Count what calls cost from here on.

        :param name: of the function.
        :param calls: its calls.
        """
        if self._ledger.open(calls, lambda: self._told_apart(name, calls.fn)) and isinstance(
            calls, CallsBeside
        ):
            self._beside[id(calls)] = calls

    def work(self) -> dict[str, dict[str, Any]]:
        """Return what calls cost, in JSON types, by name.

        ``asked`` sequences were handed to the function, and ``retried`` ones of them again;
        ``cached`` ones were known to it (``cached_memory``) or to its file (``cached_disk``);
        ``failed`` ones in the end, for the causes of ``failed_by_cause``; ``killed`` calls took
        too long. ``seconds`` of work, ``under_way``, ``utilisation`` and ``overlap`` are those of
        :class:`~ppl_diffusion.potentials.times.Times`, and ``budget`` stands where there is one.
        """
        causes = {name: told["causes"] for name, told in self.told().items()}
        return self._ledger.told(causes)

    def refuse_all_failed(self, cause: Exception | None = None) -> None:
        """Raise an error if a function failed on everything it was asked about.

        In a group of processes nobody knows that of the others, and says nothing.

        :param cause: what has come of it.
        :raises PotentialError: with the first reason.
        """
        alone = own_rows(2) == slice(0, 2)
        for name, told in self.told().items() if alone else ():
            if told["failed"] == told["asked"]:
                raise PotentialError(_all_failed(name, told)) from cause

    def _told_apart(self, name: str, fn: RowFunction) -> str:
        same = self._functions.setdefault(name, {})
        key = _identity(fn)
        if key not in same:
            number = len(same) + 1
            if number > MOST:
                return f"{name} {MOST}"
            # It is kept: an identity means nothing once its owner is gone.
            same[key] = (name if number == 1 else f"{name} {number}", fn)
        return same[key][0]

    def cancel(self) -> None:
        """Cancel calls that were begun and that nobody is going to collect."""
        for calls in self._beside.values():
            calls.cancel()

    def settings(self) -> dict[str, Any]:
        """Return entries of a result's settings; empty where no function of sequences was asked."""
        told, work = self.told(), self.work()
        return {**({"failures": told} if told else {}), **({REWARDS: work} if work else {})}


def _identity(fn: RowFunction) -> Hashable:
    """Return what tells functions apart: one made anew of the same parts is the same."""
    if isinstance(fn, MethodType):
        return fn.__func__, id(fn.__self__)
    if not isinstance(fn, FunctionType):
        return id(fn)
    parts = [*(fn.__defaults__ or ()), *(cell.cell_contents for cell in fn.__closure__ or ())]
    return fn.__code__, *map(id, parts)


WATCHED: ContextVar[Failures | None] = ContextVar("watched", default=None)


@contextmanager
def watch_failures() -> Iterator[Failures]:
    """Collect what functions of sequences answer inside, in this thread.

    :raises PotentialError: if one of them failed on everything it was asked about.
    """
    failures = Failures()
    token = WATCHED.set(failures)
    try:
        yield failures
    except ParticleCollapse as collapse:
        failures.refuse_all_failed(collapse)
        raise
    else:
        failures.refuse_all_failed()
    finally:
        WATCHED.reset(token)
        # A run that failed half-way would otherwise leave a queue for the interpreter to wait for.
        failures.cancel()


def report(name: str, fn: RowFunction, answers: Mapping[bytes, Answer], tally: Tally) -> None:
    """Tell whoever watches what a function answered; see :meth:`Failures.note`."""
    failures = WATCHED.get()
    if failures is not None:
        failures.note(name, fn, answers, tally)


def watch_calls(name: str, calls: Calls) -> None:
    """Tell whoever watches that a function is going to be asked; see :meth:`Failures.watch`."""
    failures = WATCHED.get()
    if failures is not None:
        failures.watch(name, calls)


def _number(key: bytes) -> int:
    """Return a number of a key that is the same in every process, as ``hash`` is not."""
    return int.from_bytes(blake2b(key, digest_size=7).digest(), "big")


def _cause(answer: Answer) -> str | None:
    return answer.cause if isinstance(answer, Failure) else None


def _all_failed(name: str, told: Mapping[str, Any]) -> str:
    causes = ", ".join(f"{cause}: {count}" for cause, count in told["causes"].items())
    return (
        f"{name} failed on all {told['asked']} sequences that it was asked about ({causes}; first "
        f"{told['first']}); mend the function, and try it on one sequence."
    )
