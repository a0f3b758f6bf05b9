"""What a design run is asked for: the target, the search, and how their texts are read."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ppl_diffusion._errors import CapabilityError

IUPAC = "ACGTRYSWKMBDHVN"
TWISTS = ("argmax", "persistent", "sample", "none")
RESAMPLERS = ("multinomial", "residual", "stratified", "systematic", "ssp", "killing")


class InputError(ValueError):
    """An option, a file or a number cannot be used; the text is one sentence that says why."""


MAX_COUNT = 10**7
"""Largest number of particles, runs, steps or samples that is taken seriously."""
MAX_SEED = 2**48 - 1
MAX_MOTIF_WEIGHT = 1e6


@contextmanager
def user_input() -> Iterator[None]:
    """Treat what the library raises in this block as the user's input being wrong.

    :raises InputError: in place of ``ValueError``, ``KeyError``, ``OSError``, a missing capability
        or optional library, with their text.
    """
    try:
        yield
    except InputError:
        raise
    except (CapabilityError, ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        raise InputError(_text(error)) from error


def _text(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error)


@dataclass(frozen=True)
class MotifSpec:
    """One matrix to be rewarded: ``FILE[@NAME][:WEIGHT]``.

    :param path: file in MEME or JASPAR format, plain or gzipped.
    :param name: identifier or name of one matrix of the file; needed when the file holds several.
    :param weight: factor on the log-odds of the best hit, in nats per nat.
    """

    path: Path
    name: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Question:
    """The target of a design: the prior times these potentials, given these clamps.

    :param observe: expression that was observed, in the units of the oracle; it enters as
        ``Normal(oracle(x), sd)``.
    :param sd: standard deviation of that observation.
    :param temperature: temperature of the reward ``min(oracle(x), 17) / temperature``, in the
        units of the oracle; 17 is the top of the assay's scale.
    :param expression: whether a prior with an oracle is asked for high expression when neither
        ``observe`` nor ``temperature`` is given.
    :param motifs: motif matrices, each weighted.
    :param gc: lowest and highest GC content allowed, as shares of the length.
    :param forbid: IUPAC motifs that must not occur on either strand.
    :param fix: ``(position, bases)`` pairs, positions counted from 0.
    """

    observe: float | None = None
    sd: float = 0.5
    temperature: float | None = None
    expression: bool = True
    motifs: tuple[MotifSpec, ...] = ()
    gc: tuple[float, float] | None = None
    forbid: tuple[str, ...] = ()
    fix: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        _finite("the observed expression", self.observe)
        _positive("the standard deviation of the observation", self.sd)
        _positive("the temperature of the reward", self.temperature)
        if self.observe is not None and self.temperature is not None:
            raise InputError(
                "An observed expression and a reward temperature are two different questions: "
                "give --observe or --temperature, not both."
            )
        if self.uses_oracle and not self.expression:
            raise InputError("--no-expression contradicts --observe and --temperature: drop one.")
        _check_gc(self.gc)

    @property
    def uses_oracle(self) -> bool:
        """Whether the question is about expression."""
        return self.observe is not None or self.temperature is not None


@dataclass(frozen=True)
class Search:
    """How hard to look: none of these changes the target.

    :param num_particles: particles per run.
    :param num_runs: independent runs, for the error bar of the evidence.
    :param num_steps: steps of the reverse chain.
    :param seed: seed of every random number.
    :param twist: look-ahead of the potential at unfinished sequences, or ``"none"``.
    :param resampler: resampling scheme.
    :param ess_threshold: resample when the effective sample size falls below this share.
    """

    num_particles: int = 64
    num_runs: int = 4
    num_steps: int = 64
    seed: int = 0
    twist: str = "persistent"
    resampler: str = "systematic"
    ess_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name, low in (("num_particles", 2), ("num_runs", 1), ("num_steps", 1), ("seed", 0)):
            at_least(name.replace("num_", "the number of "), getattr(self, name), low)
        one_of("twist", self.twist, TWISTS)
        one_of("resampler", self.resampler, RESAMPLERS)
        if not 0.0 <= self.ess_threshold <= 1.0:
            raise InputError(
                f"The ESS threshold must be a share between 0 and 1, not {self.ess_threshold}."
            )


@dataclass(frozen=True)
class Job:
    """A prior by name, a question about it, and a search.

    :param name: name of a shipped prior, or a folder that holds one.
    :param question: what is asked.
    :param search: how hard to look.
    """

    name: str
    question: Question = field(default_factory=Question)
    search: Search = field(default_factory=Search)

    def settings(self) -> dict[str, Any]:
        """:returns: everything that decides the result, ready for JSON."""
        asked = {f.name: getattr(self.question, f.name) for f in fields(self.question)}
        asked["motifs"] = [
            {"file": m.path.name, "name": m.name, "weight": m.weight} for m in self.question.motifs
        ]
        searched = {f.name: getattr(self.search, f.name) for f in fields(self.search)}
        return {"prior": self.name, "question": asked, "search": searched}


def parse_motif(text: str) -> MotifSpec:
    """Read ``FILE[@NAME][:WEIGHT]``.

    :param text: the option as typed.
    :raises InputError: if the weight is not a finite number or the file is not there.
    """
    place, _, tail = text.rpartition(":")
    weight = _number(tail) if place else None
    if weight is None:
        place, weight = text, 1.0
    path, name = _split_name(place)
    if not path.is_file():
        raise InputError(f"There is no motif file {str(path)!r}: give a MEME or JASPAR file.")
    if not 0 < weight <= MAX_MOTIF_WEIGHT:
        raise InputError(
            f"The weight of motif {place!r} must be above 0 and at most {MAX_MOTIF_WEIGHT:g}, "
            f"not {weight}."
        )
    return MotifSpec(path, name, weight)


def parse_fix(text: str) -> tuple[int, str]:
    """Read ``POS:BASES``; positions count from 0.

    :param text: the option as typed.
    :raises InputError: if it does not have that form.
    """
    match = re.fullmatch(r"(\d+):([A-Za-z]+)", text.strip())
    if match is None:
        raise InputError(
            f"Cannot read the fixed bases {text!r}: write POS:BASES with positions counted from 0, "
            "such as 10:TATAAA."
        )
    bases = match[2].upper()
    _only_letters(f"the fixed bases {text!r}", bases, "ACGT")
    return int(match[1]), bases


def parse_forbid(text: str) -> str:
    """Read a forbidden motif in IUPAC letters.

    :param text: the option as typed.
    :raises InputError: if it is empty or holds another letter.
    """
    motif = text.strip().upper()
    _only_letters(f"the forbidden motif {text!r}", motif, IUPAC)
    return motif


def clamp_pattern(fix: tuple[tuple[int, str], ...], length: int) -> dict[int, str]:
    """Merge fixed pieces into one base per position.

    :param fix: ``(position, bases)`` pairs.
    :param length: length of the sequence.
    :returns: base of each fixed position.
    :raises InputError: if a piece runs past the end or two pieces disagree.
    """
    pattern: dict[int, str] = {}
    for start, bases in fix:
        if start + len(bases) > length:
            raise InputError(
                f"The fixed bases {start}:{bases} run past the end of {length} bases: "
                f"start at {length - len(bases)} or earlier."
            )
        for offset, base in enumerate(bases):
            if pattern.setdefault(start + offset, base) != base:
                raise InputError(
                    f"Position {start + offset} is fixed to both {pattern[start + offset]} and "
                    f"{base}: give one base per position."
                )
    return pattern


def at_least(what: str, value: int, low: int) -> None:
    """:raises InputError: if ``value`` is below ``low`` or larger than anything that can be run."""
    if value < low:
        raise InputError(f"{what.capitalize()} must be at least {low}, not {value}.")
    high = MAX_SEED if what == "seed" else MAX_COUNT
    if value > high:
        raise InputError(f"{what.capitalize()} must be at most {high}, not {value}.")


def one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    """:raises InputError: if ``value`` is not a known word."""
    if value not in known:
        raise InputError(f"There is no {what} called {value!r}: choose one of {', '.join(known)}.")


def _split_name(place: str) -> tuple[Path, str | None]:
    path, at, name = place.rpartition("@")
    if at and not Path(place).is_file():
        return Path(path), name
    return Path(place), None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _only_letters(what: str, text: str, letters: str) -> None:
    wrong = sorted(set(text) - set(letters))
    if not text or wrong:
        found = "is empty" if not text else f"holds {', '.join(wrong)}"
        raise InputError(f"{what[0].upper()}{what[1:]} {found}: use only the letters {letters}.")


def _finite(what: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise InputError(f"{what[0].upper()}{what[1:]} must be a finite number, not {value}.")


def _positive(what: str, value: float | None) -> None:
    _finite(what, value)
    if value is not None and value <= 0:
        raise InputError(f"{what[0].upper()}{what[1:]} must be above 0, not {value}.")


def _check_gc(gc: tuple[float, float] | None) -> None:
    if gc is not None and not 0.0 <= gc[0] <= gc[1] <= 1.0:
        raise InputError(
            f"The GC range {gc[0]} to {gc[1]} is not a range of shares: "
            "give two numbers with 0 <= LOW <= HIGH <= 1."
        )
