"""Tokenisers: text into symbols and back, without tensors."""

from ppl_diffusion.tokenisers.alphabets import ALPHABETS, MOLECULES, find_alphabet
from ppl_diffusion.tokenisers.base import TOKENISERS, Tokeniser, padding_symbol
from ppl_diffusion.tokenisers.letters import Letters
from ppl_diffusion.tokenisers.listed import Listed
from ppl_diffusion.tokenisers.pattern import Pattern
from ppl_diffusion.tokenisers.safe import Safe
from ppl_diffusion.tokenisers.selfies import Selfies, canonical_smiles, molecule_library

__all__ = [
    "ALPHABETS",
    "MOLECULES",
    "TOKENISERS",
    "Letters",
    "Listed",
    "Pattern",
    "Safe",
    "Selfies",
    "Tokeniser",
    "canonical_smiles",
    "find_alphabet",
    "molecule_library",
    "padding_symbol",
]
