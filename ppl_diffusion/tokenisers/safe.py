"""SAFE: molecules as fragments in any order, so that whole fragments can be held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ppl_diffusion.tokenisers.base import Tokeniser
from ppl_diffusion.tokenisers.pattern import SMILES
from ppl_diffusion.tokenisers.selfies import canonical_smiles, molecule_library


@dataclass(frozen=True)
class Safe(Tokeniser):
    """SMILES outside, SAFE inside (Noutahi et al. 2024, arXiv 2310.10773), cut as SMILES are.

    Not every sequence of symbols is a molecule: one that is none comes out as it is written.
    """

    kind: ClassVar[str] = "safe"

    def pieces(self, text: str) -> list[str]:
        """Return the symbols of the SAFE of a SMILES.

        :raises ValueError: if it is no molecule, or has no bond to cut.
        :raises ModuleNotFoundError: if the library is not installed.
        """
        library = molecule_library("safe", "safe")
        try:
            written = library.encode(text)
        except Exception as error:  # the library raises its own, RDKit's and datamol's
            why = " ".join(str(error).split("\n")[0].split()).rstrip(".:! ")
            raise self.refused(text, f"has no SAFE ({why})") from error
        return SMILES.pieces(written)

    def join(self, tokens: Sequence[str]) -> str:
        """Return the SMILES of symbols."""
        written = "".join(tokens)
        decoded = molecule_library("safe", "safe").decode(written, ignore_errors=True)
        return written if decoded is None else str(decoded)

    def normal(self, text: str) -> str:
        """Return the canonical SMILES, or the text if it is no molecule."""
        return canonical_smiles(text) or text


SAFE = Safe("safe")
