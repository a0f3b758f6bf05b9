"""SELFIES: molecules as strings of which every one is a molecule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from ppl_diffusion.tokenisers.base import Tokeniser


@dataclass(frozen=True)
class Selfies(Tokeniser):
    """SMILES outside, SELFIES symbols inside (Krenn et al. 2020, arXiv 1905.13741).

    A text comes back as the same molecule, not letter for letter: where RDKit is installed it is
    compared by canonical SMILES.
    """

    kind: ClassVar[str] = "selfies"

    def pieces(self, text: str) -> list[str]:
        """Return the SELFIES symbols of a SMILES.

        :raises ValueError: if it is no molecule that SELFIES can write.
        :raises ModuleNotFoundError: if the library is not installed.
        """
        library = molecule_library("selfies", "mol")
        try:
            return list(library.split_selfies(library.encoder(text)))
        except library.EncoderError as error:
            why = " ".join(str(error).split("\n")[0].split()).rstrip(".:")
            raise self.refused(text, f"has no SELFIES ({why})") from error

    def join(self, tokens: Sequence[str]) -> str:
        """Return the SMILES of SELFIES symbols; any symbols make a molecule."""
        smiles: str = molecule_library("selfies", "mol").decoder("".join(tokens))
        return smiles

    def normal(self, text: str) -> str:
        """Return the canonical SMILES, or without RDKit what SELFIES makes of a text."""
        try:
            return canonical_smiles(text) or text
        except ModuleNotFoundError:
            return self.join(self.pieces(text))


def canonical_smiles(text: str) -> str | None:
    """Return the canonical SMILES of a molecule by RDKit, None if it is none.

    :raises ModuleNotFoundError: if RDKit is not installed.
    """
    chem = molecule_library("rdkit.Chem", "mol")
    with import_module("rdkit.rdBase").BlockLogs():
        molecule = chem.MolFromSmiles(text)
    return None if molecule is None else str(chem.MolToSmiles(molecule))


def molecule_library(name: str, extra: str) -> Any:
    """Import a library of molecules.

    :param extra: which extra of the package installs it.
    :raises ModuleNotFoundError: if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Molecules need {error.name}, which is not installed; "
            f"run `pip install 'ppl-diffusion[{extra}]'`."
        ) from error


SELFIES = Selfies("selfies")
