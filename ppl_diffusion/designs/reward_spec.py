"""What a design is rewarded for, in words: where a score comes from, and what it does to the prior.

::

    log G(x) = weight * goal(transform(score(x)))

with the goal ``score / temperature`` to maximise, its negative to minimise, the log-density of a
measurement that was ``observed``, or a Gaussian fall outside of a range (``between``). A judge is
the same without a goal: it scores, and is never a part of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ppl_diffusion.jobs.checks import InputError, finite, positive

SOURCES = ("oracle", "python", "torch", "command", "motif")
"""Where scores come from: a shipped oracle or the folder of one, ``module:function`` of texts,
``module:object`` of a network, a program that reads texts, or a matrix, ``FILE[@NAME]``."""
OBSERVATION_SD = 0.5
OPTIONS = (
    "workers",
    "executor",
    "timeout",
    "retries",
    "on_error",
    "batch_size",
    "cache",
    "version",
    "retry_failed",
    "budget",
    "memory",
)
"""How a score is asked for; see :class:`~ppl_diffusion.potentials.SequenceFunction`."""
GOALS = ("maximise", "minimise")
COLUMNS = ("rank", "sequence", "weight", "copies", "run", "log_potential", "nearest",
           "log_prob_bound", "gc")  # fmt: skip
"""Columns of ``designs.csv`` that are no scores, so that no score bears their name."""
MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class RewardSpec:
    """One score and its goal.

    :param name: how tables, files and sentences call it.
    :param source: one of :data:`SOURCES`.
    :param at: the oracle, object, program or file.
    :param goal: ``"maximise"`` or ``"minimise"``; of no meaning where ``between`` or ``observed``
        is given.
    :param temperature: units of the (transformed) score per nat; 1 if nothing is said.
    :param between: lowest and highest score that cost nothing; ``sd`` is how fast others do.
    :param observed: a measurement of the score, ``Normal(score, sd)``.
    :param sd: standard deviation, 0.5 if nothing is said.
    :param at_most: scores beyond it count as it: a scale may have a top.
    :param transform: ``{"kind": ..., ...}``, see :mod:`ppl_diffusion.potentials.transforms`.
    :param weight: factor on the log-potential.
    :param head: output of a network that has several.
    :param answer: entry of a program's answer that has several.
    :param options: how it is asked, from :data:`OPTIONS`.
    :param digest: of what was read from a file, once it was: files of one name may differ.
    :param object: what ``at`` names, where it is at hand.
    :raises InputError: if a part cannot be used.
    """

    name: str
    source: str
    at: str
    goal: str = "maximise"
    temperature: float | None = None
    between: tuple[float, float] | None = None
    observed: float | None = None
    sd: float | None = None
    at_most: float | None = None
    transform: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    head: int | None = None
    answer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None
    object: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        where = f"reward {self.name!r}"
        if self.name in COLUMNS or self.name.endswith("_sd"):
            raise InputError(
                f"A score cannot be called {self.name!r}, as another column of designs.csv is: "
                "give it a name."
            )
        if self.goal not in GOALS:
            raise InputError(
                f"The goal of {where} is {self.goal!r}: choose one of {', '.join(GOALS)}, or give "
                "between or observed."
            )
        finite(f"the observed value of {where}", self.observed)
        finite(f"at_most of {where}", self.at_most)
        positive(f"the temperature of {where}", self.temperature)
        positive(f"the standard deviation of {where}", self.sd)
        if not 0 < self.weight <= MAX_WEIGHT:
            raise InputError(
                f"The weight of {where} must be above 0 and at most {MAX_WEIGHT:g}, not "
                f"{self.weight}."
            )
        self._check_goal(where)

    def _check_goal(self, where: str) -> None:
        asked = {
            "between": self.between is not None,
            "observed": self.observed is not None,
            "temperature": self.temperature is not None,
        }
        if sum(asked.values()) > 1:
            both = " and ".join(name for name, given in asked.items() if given)
            raise InputError(f"The {where} has {both}, which are different goals: give one.")
        if self.between is not None and not self.between[0] <= self.between[1]:
            raise InputError(
                f"The range of {where} runs from {self.between[0]} to {self.between[1]}: give the "
                "lower end first."
            )
        if self.sd is not None and not (asked["between"] or asked["observed"]):
            raise InputError(
                f"The {where} has a standard deviation and nothing it is the deviation of: add "
                "observed or between, or drop sd."
            )

    @property
    def slow(self) -> bool:
        """Whether scores are dear: sequences that no question needs are not asked about."""
        return self.source == "command" or bool(self.options.keys() - {"batch_size"})

    def observing(self, value: float, sd: float | None) -> RewardSpec:
        """Return the same score as a measurement.

        :param value: what was measured.
        :param sd: its standard deviation.
        """
        return replace(self, observed=value, sd=sd, temperature=None, between=None)

    def at_temperature(self, temperature: float) -> RewardSpec:
        """Return the same score at another temperature."""
        return replace(self, temperature=temperature, observed=None, sd=None, between=None)

    def settings(self) -> dict[str, Any]:
        """Return what decides the result, ready for JSON and TOML; what is usual is left out."""
        usual = {f.name: f.default for f in fields(self)}
        known: dict[str, Any] = {"name": self.name, self.source: self.at}
        for name in ("goal", "temperature", "between", "observed", "sd", "at_most", "weight"):
            value = getattr(self, name)
            if value != usual[name]:
                known[name] = list(value) if isinstance(value, tuple) else value
        for name in ("head", "answer", "digest"):
            if getattr(self, name) is not None:
                known[name] = getattr(self, name)
        if self.transform:
            known["transform"] = dict(self.transform)
        return {**known, **self.options}


def read_reward(entry: Mapping[str, Any], where: str, *, judge: bool = False) -> RewardSpec:
    """Read a table of a brief, or the options of a reward of the command line.

    :param entry: fields of :class:`RewardSpec`, one of :data:`SOURCES`, and :data:`OPTIONS`.
    :param where: how errors call it.
    :param judge: whether it only scores.
    :raises InputError: if a key is unknown, or none or several of the sources are given.
    """
    own = {f.name for f in fields(RewardSpec)} - {"source", "at", "options", "digest", "object"}
    goal = {"goal", "temperature", "between", "observed", "sd", "at_most", "transform", "weight"}
    own = own - goal if judge else own
    known = {*own, *SOURCES, *OPTIONS, "digest"}
    for key in entry:
        if key not in known:
            raise InputError(f"{where} has no key {key!r}: it has {', '.join(sorted(known))}.")
    sources = [key for key in SOURCES if key in entry]
    if len(sources) != 1:
        found = " and ".join(sources) or "none"
        raise InputError(
            f"{where} says {found} of where its score comes from: give one of {', '.join(SOURCES)}."
        )
    (source,) = sources
    at = entry[source]
    if not isinstance(at, str) or not at:
        raise InputError(f"{where}: {source} is {at!r}; give a text.")
    given = {key: _read(key, entry[key], where) for key in own & entry.keys() if key != "name"}
    options = {key: entry[key] for key in OPTIONS if key in entry}
    name = entry.get("name", _name(source, at))
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: name is {name!r}; give a text.")
    return RewardSpec(name, source, at, options=options, digest=entry.get("digest"), **given)


_NUMBERS = {"temperature", "observed", "sd", "at_most", "weight"}


def _read(key: str, value: Any, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _NUMBERS and not number:
        raise InputError(f"{where}: {key} is {value!r}; give a number.")
    if key in _NUMBERS:
        return float(value)
    if key == "between":
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(isinstance(x, int | float) for x in value):
            raise InputError(f"{where}: between is {value!r}; give two numbers.")
        return tuple(map(float, value))
    if key == "transform" and not isinstance(value, Mapping):
        raise InputError(f"{where}: transform is {value!r}; give a table with its kind.")
    return value


def _name(source: str, at: str) -> str:
    """Return the last word of where a score comes from."""
    text = at.rsplit(":", 1)[-1] if source in ("python", "torch") else at
    name = "_".join(text.split())[:40] if source != "command" else text.split()[-1][:40]
    return f"{name}_score" if name in COLUMNS or name.endswith("_sd") else name
