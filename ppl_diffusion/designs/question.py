"""What a design run is asked for: the target and the search, and how their texts are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppl_diffusion.designs.reward_spec import MAX_WEIGHT, RewardSpec
from ppl_diffusion.jobs.checks import InputError, at_least, finite
from ppl_diffusion.jobs.search import Search


@dataclass(frozen=True)
class Question:
    """The target of a design: the prior times these potentials, given these clamps.

    :param rewards: scores and their goals.
    :param judges: scores that are no part of the target.
    :param gc: lowest and highest GC content allowed, as shares of the length.
    :param forbid: pieces that must not occur: IUPAC motifs of bases, on both strands of DNA.
    :param fix: ``(position, text)`` pairs, positions counted in tokens from 0.
    :param lengths: fewest and most tokens, of a prior over several lengths.
    :param label: a class, of a prior that knows some.
    :param guidance: weight of classifier-free guidance towards it; 1 is the conditional prior.
    """

    rewards: tuple[RewardSpec, ...] = ()
    judges: tuple[RewardSpec, ...] = ()
    gc: tuple[float, float] | None = None
    forbid: tuple[str, ...] = ()
    fix: tuple[tuple[int, str], ...] = ()
    lengths: tuple[int, int] | None = None
    label: str | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.gc is not None and not 0.0 <= self.gc[0] <= self.gc[1] <= 1.0:
            raise InputError(
                f"The GC range {self.gc[0]} to {self.gc[1]} is not a range of shares: "
                "give two numbers with 0 <= LOW <= HIGH <= 1."
            )
        if self.lengths is not None:
            at_least("the shortest length", self.lengths[0], 0)
            at_least("the longest length", self.lengths[1], self.lengths[0])
        finite("the weight of the guidance", self.guidance)
        if self.label is None and self.guidance != 1.0:
            raise InputError(
                f"A guidance of {self.guidance:g} leads towards a class, and none is given: add "
                "--label, or drop --guidance."
            )
        names = [spec.name for spec in (*self.rewards, *self.judges)]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"Two scores are called {name!r}: give one of them another name.")

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the target, ready for JSON."""
        found: dict[str, Any] = {
            "rewards": [spec.settings() for spec in self.rewards],
            "judges": [spec.settings() for spec in self.judges],
            "gc": None if self.gc is None else list(self.gc),
            "forbid": list(self.forbid),
            "fix": [f"{start}:{text}" for start, text in self.fix],
        }
        if self.lengths is not None:
            found["lengths"] = list(self.lengths)
        if self.label is not None:
            found |= {"label": self.label, "guidance": self.guidance}
        return found


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
        question = self.question.settings()
        question["rewards"] = list(map(_without_folder, question["rewards"]))
        known = {} if self.prior_digest is None else {"prior_digest": self.prior_digest}
        return {
            "prior": self.name,
            **known,
            "question": question,
            "search": self.search.settings(),
        }

    def asking(self, **changes: Any) -> "Job":
        """Return the job with some fields of its question changed."""
        return replace(self, question=replace(self.question, **changes))


def _without_folder(reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward without where its files lie: what they hold decides."""
    if "motif" not in reward:
        return dict(reward)
    return {**reward, "motif": Path(reward["motif"]).name}


def parse_motif(text: str) -> RewardSpec:
    """Read ``FILE[@NAME][:WEIGHT]``.

    :raises InputError: if the weight is not a finite number or the file is not there.
    """
    place, _, tail = text.rpartition(":")
    weight = _number(tail) if place else None
    if weight is None:
        place, weight = text, 1.0
    path, name = split_name(place)
    if path.is_dir():
        raise InputError(f"The motif file {str(path)!r} is a folder: give one of its files.")
    if not path.is_file():
        raise InputError(f"There is no motif file {str(path)!r}: check the path.")
    if not 0 < weight <= MAX_WEIGHT:
        raise InputError(
            f"The weight of motif {place!r} must be above 0 and at most {MAX_WEIGHT:g}, "
            f"not {weight}."
        )
    at = str(path.resolve()) if name is None else f"{path.resolve()}@{name}"
    return RewardSpec(f"motif_{name or path.stem}", "motif", at, weight=weight)


def parse_fix(text: str) -> tuple[int, str]:
    """Read ``POS:TEXT``; positions count from 0.

    :raises InputError: if it does not have that form.
    """
    match = re.fullmatch(r"(\d+):(\S+)", text.strip())
    if match is None:
        raise InputError(
            f"Cannot read the fixed part {text!r}: write POS:BASES with positions counted from 0, "
            "such as 10:TATAAA."
        )
    return int(match[1]), match[2]


def split_name(place: str) -> tuple[Path, str | None]:
    """Return the file of a motif, and the name of one of its matrices if it is given."""
    path, at, name = place.rpartition("@")
    if at and not Path(place).is_file():
        return Path(path), name
    return Path(place), None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
