"""Alphabets by name, or from a file that lists tokens."""

from __future__ import annotations

from pathlib import Path

from ppl_diffusion.tokenisers.base import Tokeniser
from ppl_diffusion.tokenisers.letters import CHARS, DNA, PROTEIN, RNA
from ppl_diffusion.tokenisers.listed import read_tokens
from ppl_diffusion.tokenisers.pattern import SMILES
from ppl_diffusion.tokenisers.safe import SAFE
from ppl_diffusion.tokenisers.selfies import SELFIES

ALPHABETS: dict[str, Tokeniser] = {
    tokeniser.name: tokeniser for tokeniser in (DNA, RNA, PROTEIN, SMILES, SELFIES, SAFE, CHARS)
}
"""The tokenisers that have a name; those without symbols learn them from texts."""
MOLECULES = ("smiles", "selfies", "safe")
"""Those whose texts are molecules."""


def find_alphabet(name_or_file: str | Path) -> Tokeniser:
    """Return the tokeniser of a name, or of a file that lists one token per line.

    :raises ValueError: if there is no such name or file, or the file lists no tokens.
    """
    if str(name_or_file) in ALPHABETS:
        return ALPHABETS[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(
            f"There is no alphabet {str(name_or_file)!r}: choose one of {', '.join(ALPHABETS)}, or "
            "give a file with one token per line."
        )
    return read_tokens(path)
