"""What a design run is asked for: the target, the search, and how their texts are read."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ppl_diffusion.jobs.checks import InputError, finite, positive
from ppl_diffusion.jobs.search import Search

IUPAC = "ACGTRYSWKMBDHVN"
MAX_MOTIF_WEIGHT = 1e6
OBSERVATION_SD = 0.5


@dataclass(frozen=True)
class MotifSpec:
    """One matrix to be rewarded: ``FILE[@NAME][:WEIGHT]``.

    :param path: file in MEME or JASPAR format, plain or gzipped.
    :param name: identifier or name of one matrix of the file; needed when the file holds several.
    :param weight: factor on the log-odds of the best hit, in nats per nat.
    :param digest: of the matrix's numbers, once they are read: files of one name may differ.
    """

    path: Path
    name: str | None = None
    weight: float = 1.0
    digest: str | None = None

    def settings(self) -> dict[str, Any]:
        """:returns: everything that decides the potential, ready for JSON."""
        known = {} if self.digest is None else {"digest": self.digest}
        return {"file": self.path.name, "name": self.name, "weight": self.weight, **known}


@dataclass(frozen=True)
class Question:
    """The target of a design: the prior times these potentials, given these clamps.

    :param observe: expression that was observed, in the units of the oracle; it enters as
        ``Normal(oracle(x), sd)``.
    :param sd: standard deviation of that observation, 0.5 if nothing is said.
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
    sd: float | None = None
    temperature: float | None = None
    expression: bool = True
    motifs: tuple[MotifSpec, ...] = ()
    gc: tuple[float, float] | None = None
    forbid: tuple[str, ...] = ()
    fix: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        finite("the observed expression", self.observe)
        positive("the standard deviation of the observation", self.sd)
        positive("the temperature of the reward", self.temperature)
        if self.sd is not None and self.observe is None:
            raise InputError(
                f"--sd {self.sd:g} is the deviation of an observation, and none is given: add "
                "--observe, or drop --sd."
            )
        if self.observe is not None and self.sd is None:
            object.__setattr__(self, "sd", OBSERVATION_SD)
        if self.observe is not None and self.temperature is not None:
            raise InputError(
                "An observed expression and a reward temperature are two different questions: "
                "give --observe or --temperature, not both."
            )
        if self.uses_oracle and not self.expression:
            raise InputError("--no-expression contradicts --observe and --temperature: drop one.")
        if self.gc is not None and not 0.0 <= self.gc[0] <= self.gc[1] <= 1.0:
            raise InputError(
                f"The GC range {self.gc[0]} to {self.gc[1]} is not a range of shares: "
                "give two numbers with 0 <= LOW <= HIGH <= 1."
            )

    @property
    def uses_oracle(self) -> bool:
        return self.observe is not None or self.temperature is not None


@dataclass(frozen=True)
class Job:
    """A prior by name, a question about it, and a search.

    :param name: of a shipped prior, or a folder that holds one.
    :param prior_digest: of the prior's numbers, once they are read: folders may change.
    """

    name: str
    question: Question = field(default_factory=Question)
    search: Search = field(default_factory=Search)
    prior_digest: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, ready for JSON."""
        asked = {f.name: getattr(self.question, f.name) for f in fields(self.question)}
        asked["motifs"] = [motif.settings() for motif in self.question.motifs]
        known = {} if self.prior_digest is None else {"prior_digest": self.prior_digest}
        return {"prior": self.name, **known, "question": asked, "search": self.search.settings()}


def parse_motif(text: str) -> MotifSpec:
    """Read ``FILE[@NAME][:WEIGHT]``.

    :raises InputError: if the weight is not a finite number or the file is not there.
    """
    place, _, tail = text.rpartition(":")
    weight = _number(tail) if place else None
    if weight is None:
        place, weight = text, 1.0
    path, name = _split_name(place)
    if path.is_dir():
        raise InputError(f"The motif file {str(path)!r} is a folder: give one of its files.")
    if not path.is_file():
        raise InputError(f"There is no motif file {str(path)!r}: check the path.")
    if not 0 < weight <= MAX_MOTIF_WEIGHT:
        raise InputError(
            f"The weight of motif {place!r} must be above 0 and at most {MAX_MOTIF_WEIGHT:g}, "
            f"not {weight}."
        )
    return MotifSpec(path, name, weight)


def parse_fix(text: str) -> tuple[int, str]:
    """Read ``POS:BASES``; positions count from 0.

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

    :raises InputError: if it is empty or holds another letter.
    """
    motif = text.strip().upper()
    _only_letters(f"the forbidden motif {text!r}", motif, IUPAC)
    return motif


def clamp_pattern(fix: tuple[tuple[int, str], ...], length: int) -> dict[int, str]:
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
