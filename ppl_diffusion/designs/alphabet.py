"""The letters of a prior: how texts become tokens, and what a share of G and C would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.models import DiffusionProgram
from ppl_diffusion.models.sequences import PADDING, unpad
from ppl_diffusion.models.words import are_words, join_tokens
from ppl_diffusion.potentials import (
    AbstractPotential,
    ForbiddenMotif,
    ForbiddenTokens,
    GCContent,
)
from ppl_diffusion.tokenisers import Tokeniser

IUPAC = "ACGTRYSWKMBDHVN"


@dataclass(frozen=True)
class Alphabet:
    """What a design knows of tokens, without the network; it can be sent to workers.

    :param vocabulary: one symbol per token.
    :param padding: id of the token that only fills sequences up, or None.
    :param tokeniser: of the prior, or None where letters are letters.
    """

    vocabulary: tuple[str, ...]
    padding: int | None = None
    tokeniser: Tokeniser | None = None

    @classmethod
    def of(cls, prior: DiffusionProgram) -> Alphabet:
        """Return the alphabet of a prior."""
        return cls(tuple(prior.vocabulary), prior.process.padding, prior.tokeniser)

    @classmethod
    def read(cls, entries: Mapping[str, Any]) -> Alphabet:
        """Return the alphabet of :meth:`settings`."""
        tokeniser = entries.get("tokeniser")
        if tokeniser is not None:
            tokeniser = Tokeniser.from_settings(tokeniser)
        return cls(tuple(entries["vocabulary"]), entries.get("padding"), tokeniser)

    def settings(self) -> dict[str, Any]:
        """Return everything about it, ready for JSON."""
        found: dict[str, Any] = {"vocabulary": list(self.vocabulary), "padding": self.padding}
        if self.tokeniser is not None:
            found["tokeniser"] = self.tokeniser.settings()
        return found

    @property
    def symbols(self) -> tuple[str, ...]:
        """The tokens that say something."""
        return tuple(s for i, s in enumerate(self.vocabulary) if i != self.padding)

    @property
    def nucleic(self) -> str | None:
        """``"DNA"``, ``"RNA"`` or None."""
        known = {frozenset("ACGT"): "DNA", frozenset("ACGU"): "RNA"}
        return known.get(frozenset(self.symbols)) if len(self.symbols) == 4 else None

    @property
    def noun(self) -> str:
        """What tokens are called."""
        if self.nucleic:
            return "bases"
        return "letters" if all(len(s) == 1 for s in self.symbols) else "tokens"

    @property
    def as_dna(self) -> list[str]:
        """The vocabulary with T for U."""
        return ["T" if s == "U" and self.nucleic == "RNA" else s for s in self.vocabulary]

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of tokens ``(n, L)``."""
        separator = " " if are_words(self.vocabulary) else ""
        rows = [[self.vocabulary[i] for i in row if i != self.padding] for row in tokens.tolist()]
        if self.tokeniser is not None:
            return [self.tokeniser.join(row) for row in rows]
        texts = [join_tokens(row, separator) for row in rows]
        filled = self.padding is None and PADDING in self.vocabulary
        return [unpad(text) for text in texts] if filled else texts

    def ids(self, text: str, what: str) -> list[int]:
        """Return the tokens of a piece of text.

        :param what: how errors call it.
        :raises InputError: if a part of it is no token.
        """
        text = text.upper() if self.nucleic else text
        pieces = self._pieces(text, what)
        wrong = sorted({piece for piece in pieces if piece not in self.symbols})
        if wrong or not pieces:
            found = f"holds {', '.join(wrong)}" if pieces else "is empty"
            raise InputError(f"{what} {found}: use only the {self._listed()}.")
        return [self.vocabulary.index(piece) for piece in pieces]

    def _pieces(self, text: str, what: str) -> Sequence[str]:
        if self.tokeniser is None:
            return text.split() if are_words(self.vocabulary) else text
        try:
            pieces: list[str] = self.tokeniser.split(text)
        except ValueError as error:
            raise InputError(f"{what} cannot be read: {error}") from error
        return pieces

    def _listed(self) -> str:
        if all(len(s) == 1 for s in self.symbols):
            return f"letters {''.join(self.symbols)}"
        shown = ", ".join(self.symbols[:30])
        more = f" and {len(self.symbols) - 30} more" if len(self.symbols) > 30 else ""
        return f"tokens {shown}{more}"

    def gc(self, low: float, high: float) -> GCContent:
        """Return the constraint on the share of G and C.

        :raises InputError: if the letters are no bases.
        """
        if self.nucleic is None:
            raise InputError(
                f"A GC content is one of bases, and the prior writes the {self._listed()}: drop "
                "--gc."
            )
        return GCContent(low, high, vocabulary=self.as_dna, padding=self.padding)

    def forbid(self, text: str) -> AbstractPotential:
        """Return the constraint that a piece occurs nowhere.

        Of bases the piece is an IUPAC pattern, and of DNA on both strands.

        :raises InputError: if it is no piece of a sequence.
        """
        what = f"The forbidden motif {text!r}"
        if self.nucleic is None:
            ids = self.ids(text, what)
            return ForbiddenTokens(ids, len(self.vocabulary), name=f"forbidden piece {text}")
        motif = text.strip().upper()
        motif = motif.replace("U", "T") if self.nucleic == "RNA" else motif
        wrong = sorted(set(motif) - set(IUPAC))
        if not motif or wrong:
            found = f"holds {', '.join(wrong)}" if motif else "is empty"
            raise InputError(f"{what} {found}: use only the letters {IUPAC}.")
        both = self.nucleic == "DNA"
        return ForbiddenMotif(motif, vocabulary=self.as_dna, both_strands=both)

    def gc_share(self, tokens: Tensor) -> Tensor | None:
        """Return the share of G and C of each sequence, float64 ``(n,)``; None of other letters."""
        if self.nucleic is None:
            return None
        ids = torch.tensor([self.vocabulary.index(s) for s in "GC"], device=tokens.device)
        count = torch.isin(tokens, ids).sum(-1).double()
        known = tokens != (-1 if self.padding is None else self.padding)
        return count / known.sum(-1).clamp_min(1)

    def pattern(self, fix: tuple[tuple[int, str], ...], length: int) -> Tensor | None:
        """Return fixed tokens, int64 ``(L,)``, -1 where free; None if nothing is fixed.

        :param fix: ``(position, text)`` pairs.
        :raises InputError: if they do not fit.
        """
        if not fix:
            return None
        pattern = torch.full((length,), -1, dtype=torch.int64, device="cpu")
        for start, text in fix:
            ids = self.ids(text, f"The fixed {self.noun} '{start}:{text}'")
            if start + len(ids) > length:
                raise InputError(
                    f"The fixed {self.noun} {start}:{text} run past the end of {length} "
                    f"{self.noun}: start at {length - len(ids)} or earlier."
                )
            for place, token in enumerate(ids, start):
                if pattern[place] not in (-1, token):
                    before = self.vocabulary[int(pattern[place])]
                    raise InputError(
                        f"Position {place} is fixed to both {before} and "
                        f"{self.vocabulary[token]}: give one of them."
                    )
                pattern[place] = token
        return pattern
