"""Symbols from a list, of any number of characters each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ppl_diffusion.tokenisers.base import Tokeniser


@dataclass(frozen=True)
class Listed(Tokeniser):
    """The symbols are given; a text is cut at the longest one that lets the rest be cut too."""

    kind: ClassVar[str] = "listed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symbols:
            raise ValueError(f"The alphabet {self.name} lists no tokens; give at least one.")

    def pieces(self, text: str) -> list[str]:
        """Return the symbols of a text.

        :raises ValueError: if there is a place that no list of symbols leads over.
        """
        known, longest = self._known(), max(map(len, self.symbols))
        # The symbol that a rest begins with, by where it begins: from the end, so that every
        # symbol chosen later has a way on.
        way = {len(text): ""}
        for start in range(len(text) - 1, -1, -1):
            for end in range(min(len(text), start + longest), start, -1):
                if end in way and text[start:end] in known:
                    way[start] = text[start:end]
                    break
        if 0 not in way:
            raise self._no_way(text, known, longest)
        return _follow(way, len(text))

    def _no_way(self, text: str, known: frozenset[str], longest: int) -> ValueError:
        reached = {0}
        for start in range(len(text)):
            if start in reached:
                ends = range(start + 1, min(len(text), start + longest) + 1)
                reached |= {end for end in ends if text[start:end] in known}
        where = f"{text[max(reached)]!r} at letter {max(reached) + 1}"
        return self.refused(text, f"has {where}, where no token goes on")


def _follow(way: dict[int, str], end: int) -> list[str]:
    tokens, place = [], 0
    while place < end:
        tokens.append(way[place])
        place += len(way[place])
    return tokens


def read_tokens(path: Path) -> Listed:
    """Return the tokeniser of a file that lists one token per line.

    :raises ValueError: if the file lists none, or one twice, or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The alphabet {str(path)!r} is no UTF-8 text; write one token per line."
        ) from error
    return Listed(path.stem, tuple(line for line in lines if line))
