"""Symbols found by a regular expression, as the atoms of SMILES are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from ppl_diffusion.tokenisers.base import Tokeniser

_BRACKET = r"\[[^\[\]]+\]"
_ATOM = r"Br|Cl|[BCNOPSFI]|[bcnops]|\*"
_RING = r"%\(\d+\)|%\d\d|\d"
_BOND = r"[-=#$:/\\~.()]"
SMILES_PATTERN = "|".join((_BRACKET, _ATOM, _RING, _BOND))
"""Atoms in brackets, atoms of the organic subset, ring bonds, bonds, branches and the dot."""


@dataclass(frozen=True)
class Pattern(Tokeniser):
    """Every match of a regular expression is a symbol; the symbols are learnt from texts.

    :param pattern: the expression; the alternatives that are tried first stand first.
    """

    pattern: str = "."
    kind: ClassVar[str] = "pattern"

    def pieces(self, text: str) -> list[str]:
        """Return the matches, which must follow each other without a gap.

        :raises ValueError: if they do not.
        """
        tokens, place = [], 0
        compiled = _compiled(self.pattern)
        while place < len(text):
            match = compiled.match(text, place)
            if match is None or not match.group():
                where = f"{text[place]!r} at letter {place + 1}"
                raise self.refused(text, f"has {where}, where no symbol begins")
            tokens.append(match.group())
            place = match.end()
        return tokens


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


SMILES = Pattern("smiles", pattern=SMILES_PATTERN)
