"""What a tokeniser is: text into symbols and back."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

TOKENISERS: dict[str, type[Tokeniser]] = {}
"""Every kind of tokeniser whose module has been imported, by name."""
_SHOWN = 24
_MANY = 30


@dataclass(frozen=True)
class Tokeniser(ABC):
    """Cuts texts into symbols, and joins symbols to texts.

    Two tokenisers are equal if their settings are. A kind is a frozen dataclass that derives from
    this class; it is known by its class variable ``kind``.

    :param name: what the alphabet is called.
    :param symbols: the symbols that sequences are made of, in the order of their ids; empty for one
        that has yet to learn them from texts (:meth:`fitted`).

    :cvar kind: name of the kind, written into :meth:`settings`.
    """

    name: str
    symbols: tuple[str, ...] = ()
    kind: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        TOKENISERS[cls.kind] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "symbols", tuple(self.symbols))
        repeated = sorted({s for s in self.symbols if self.symbols.count(s) > 1})
        if repeated or "" in self.symbols:
            what = f"{repeated[0]!r} twice" if repeated else "an empty symbol"
            raise ValueError(f"The alphabet {self.name} has {what}; give every symbol once.")

    @abstractmethod
    def pieces(self, text: str) -> list[str]:
        """Cut a text without asking whether its pieces are symbols.

        :raises ValueError: if the text cannot be cut.
        """

    def split(self, text: str) -> list[str]:
        """Cut a text into symbols.

        :raises ValueError: if a part of the text is no symbol.
        """
        tokens = self.pieces(text)
        known = self._known()
        for place, token in enumerate(tokens):
            if known and token not in known:
                raise self.refused(text, f"has {token!r} as token {place + 1}, {self.none_of()}")
        return tokens

    def join(self, tokens: Sequence[str]) -> str:
        """Return symbols as text: the inverse of :meth:`split`."""
        return "".join(tokens)

    def normal(self, text: str) -> str:
        """Return the one way to write a text that :meth:`join` gives back."""
        return text

    def fitted(self, texts: Iterable[str]) -> Self:
        """Return this tokeniser with the symbols of texts, or itself if it has its symbols."""
        if self.symbols:
            return self
        found = {token for text in texts for token in self.pieces(text)}
        return self.with_symbols(sorted(found))

    def with_symbols(self, symbols: Sequence[str]) -> Self:
        """Return this tokeniser with other symbols."""
        return replace(self, symbols=tuple(symbols))

    def inverts(self, text: str, tokens: Sequence[str] | None = None) -> bool:
        """Return whether a text comes back after it was cut and joined.

        :param tokens: what it was cut into, if that is known.
        """
        joined = self.join(self.split(text) if tokens is None else tokens)
        return joined == text or self.normal(joined) == self.normal(text)

    def settings(self) -> dict[str, Any]:
        """Return what :meth:`from_settings` needs, as JSON knows it."""
        entries = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {"kind": self.kind, **entries}

    @staticmethod
    def from_settings(entries: Mapping[str, Any]) -> Tokeniser:
        """Return the tokeniser that :meth:`settings` described.

        :raises ValueError: if its kind is unknown or an entry does not suit it.
        """
        fields = dict(entries)
        kind = fields.pop("kind", None)
        if kind not in TOKENISERS:
            raise ValueError(
                f"There is no kind of tokeniser {kind!r}: choose one of "
                f"{', '.join(sorted(TOKENISERS))}, or import the module that defines it."
            )
        try:
            return TOKENISERS[kind](**fields)
        except TypeError as error:
            raise ValueError(f"A tokeniser of kind {kind!r} cannot be made so: {error}.") from error

    def refused(self, text: str, why: str) -> ValueError:
        """Return the error for a text: which one, why, and what to do."""
        return ValueError(f"The {self.name} text {shown(text)} {why}; mend it or leave it out.")

    def none_of(self) -> str:
        """Return which symbols there are, for such an error."""
        rest = len(self.symbols) - _MANY
        more = f" and {rest} more" if rest > 0 else ""
        return f"which is none of {', '.join(self.symbols[:_MANY])}{more}"

    def _known(self) -> frozenset[str]:
        return frozenset(self.symbols)


def padding_symbol(symbols: Sequence[str]) -> str:
    """Return a symbol to fill sequences up with that is none of theirs: ``_`` wherever it can be.

    :param symbols: those of the sequences.
    """
    fills = itertools.chain(["_"], (f"<{'_' * count}>" for count in itertools.count(1)))
    return next(fill for fill in fills if fill not in symbols)


def shown(text: str) -> str:
    """Return the beginning of a text in quotes."""
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
