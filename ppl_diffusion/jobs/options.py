"""What can be asked of the registered methods in words: read off their fields, written nowhere.

A field whose type a command line can say (a truth, a number, a word, one of several words) is an
option of its method; fields of functions and objects are not. A field that holds a small object of
such fields, as the inner loop of a method, gives its fields in its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ppl_diffusion.inference import methods
from ppl_diffusion.jobs.checks import InputError, one_of

NONE = "none"
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # With four letters to ask about, looking before every reveal is worth its calls.
    "refinement": {"inner": "twisted", "num_chains": 16},
    "soft-value": {"num_children": 4},
}
"""What methods do here if nothing is said, where it is not what they do by themselves."""
THRESHOLDS: Mapping[str, float] = {"refinement": 0.2}
"""ESS thresholds, likewise: what is refined is drawn by weight, and roots are worth more to it."""


class Use(NamedTuple):
    """What an option is to one method.

    :param default: what the method does if nothing is said.
    :param text: what it does.
    :param kind: bool, int, float or str.
    :param choices: the words it may be, or none of them where any will do.
    :param part: the field of the method whose object has it, None if the method itself does.
    """

    default: Any
    text: str
    kind: type
    choices: tuple[str, ...] = ()
    part: str | None = None

    @property
    def said(self) -> Any:
        return getattr(self.default, "name", self.default)

    def read(self, what: str, value: Any) -> Any:
        """Return a value as the method takes it.

        :raises InputError: if it is none of the words, or no such number.
        """
        if self.choices:
            one_of(what, value, self.choices)
        try:
            return value if isinstance(value, self.kind) else self.kind(value)
        except ValueError as error:
            raise InputError(f"The option {what} is a number here, not {value!r}.") from error


@dataclass
class Option:
    """One option, by the name of its field, with what it is to each method that has it."""

    name: str
    owners: dict[str, Use] = field(default_factory=dict)

    @property
    def kind(self) -> type:
        """What a command line reads: text where methods mean different things by one name."""
        kinds = {use.kind for use in self.owners.values()}
        return kinds.pop() if len(kinds) == 1 else str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be to any method."""
        return tuple(dict.fromkeys(w for use in self.owners.values() for w in use.choices))

    @property
    def flag(self) -> str:
        """How the command line says it: counts drop their ``num_``, as ``--particles`` does."""
        return f"--{self.name.removeprefix('num_').replace('_', '-')}"

    @property
    def off(self) -> str:
        """How the command line says that a truth is false."""
        return f"--un{self.name}" if self.name == "weighted" else f"--no-{self.flag[2:]}"

    @property
    def help(self) -> str:
        said: dict[str, list[str]] = {}
        for method, use in self.owners.items():
            shown = "" if use.default is None else f" ({use.said})"
            said.setdefault(use.text, []).append(method + shown)
        words = [f"One of {', '.join(self.choices)}."] if self.choices else []
        return " ".join([*(f"{', '.join(who)}: {text}" for text, who in said.items()), *words])

    def read(self, value: Any, method: str, inner: str | None = None) -> Any:
        """Return a value as the method, or the one that it refines, takes it.

        :raises InputError: if the option is neither method's, or cannot be this.
        """
        named = next((name for name in (method, inner) if name in self.owners), None)
        if named is None:
            asked = method if inner is None else f"{method} of {inner}"
            raise InputError(
                f"The option {self.off if value is False else self.flag} is no option of {asked}: "
                f"drop it, or choose --method {' or '.join(self.owners)}."
            )
        return self.owners[named].read(self.name, value)


def options() -> dict[str, Option]:
    """Return every option of the registered methods by the name of its field."""
    found: dict[str, Option] = {}
    for name, cls in methods().items():
        _add(found, name, cls, DEFAULTS.get(name, {}))
        own = {each.name for each in fields(cls)}
        for each in fields(cls):
            part = part_of(each)
            if part is not None:
                values = {f.name: getattr(part, f.name) for f in fields(part)}
                _add(found, name, type(part), values, part=each.name, skip=own)
    return {**found, **_of_the_job(found["twist"])}


def part_of(each: Field[Any]) -> Any:
    """Return the object of options that a field holds if nothing is said, or None."""
    made = each.default_factory() if callable(each.default_factory) else each.default
    return made if each.init and is_dataclass(made) and not isinstance(made, type) else None


def _add(
    found: dict[str, Option],
    method: str,
    cls: type,
    values: Mapping[str, Any],
    *,
    part: str | None = None,
    skip: Collection[str] = (),
) -> None:
    """Add the options that the fields of a class are to a method.

    :param values: defaults where they are not those of the class.
    :param skip: names that mean something else to the method.
    """
    hints = get_type_hints(cls)
    for each in fields(cls):
        kind, choices = _words(hints[each.name])
        if kind is None or not each.init or each.name in skip:
            continue
        option = found.setdefault(each.name, Option(each.name))
        own = None if each.default is MISSING else each.default
        default = values.get(each.name, own)
        option.owners[method] = Use(default, _documented(cls, each.name), kind, choices, part)


def usual(method: str, inner: str | None = None) -> dict[str, Any]:
    """Return what a method does if nothing is said, and the method that it refines."""
    names = [name for name in (inner, method) if name is not None]
    every = options().values()
    return {o.name: o.owners[name].said for name in names for o in every if name in o.owners}


def spoken(text: str, method: str) -> str:
    """Return what a method says about its fields in the words of the command line."""
    text = re.sub(rf"^{methods()[method].__name__}: ", f"{method}: ", text)
    for option in options().values():
        text = re.sub(rf"\b{option.name}=False", option.off, text)
        text = re.sub(rf"\b{option.name}=None", f"{option.flag} {NONE}", text)
        text = re.sub(rf"\b{option.name}(?==| must)", option.flag, text)
    return text


def _words(hint: Any) -> tuple[type | None, tuple[str, ...]]:
    """Return the kind of value that can be said for a type, and the words to choose from."""
    parts = list(_flat(hint))
    choices = tuple(p for part in parts if get_origin(part) is Literal for p in get_args(part))
    if choices:
        return str, choices + (NONE,) * (type(None) in parts)
    return next((kind for kind in (bool, int, float, str) if kind in parts), None), ()


def _flat(hint: Any) -> Iterator[Any]:
    if get_origin(hint) not in (Union, UnionType):
        yield hint
        return
    for part in get_args(hint):
        yield from _flat(part)


def _documented(cls: type, name: str) -> str:
    """Return the sentence about a field: the first class that has it says it in full."""
    for base in reversed(cls.__mro__):
        found = re.search(
            rf":param {name}:(.*?)(?=\.\s|\n\s*:(?:param|raises|returns|cvar|ivar)|\n\s*\n|\Z)",
            base.__doc__ or "",
            re.DOTALL,
        )
        if found:
            plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", found[1]).replace("``", "")
            return f"{' '.join(plain.split()).removesuffix('.')}."
    return "see the method."


def _of_the_job(twist: Option) -> dict[str, Option]:
    """Return the options that are no fields: they make the value of one, or the target."""
    fills = "completions per particle of a persistent or sample twist."
    power = "the target is prior^POWER times the potentials."
    return {
        "fills": Option("fills", {name: Use(4, fills, int) for name in twist.owners}),
        "power": Option("power", {"corrector": Use(1.0, power, float)}),
    }
