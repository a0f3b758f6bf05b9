"""One symbol per letter: nucleic acids, proteins, and any text by its characters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ppl_diffusion.tokenisers.base import Tokeniser


@dataclass(frozen=True)
class Letters(Tokeniser):
    """Every character is a symbol.

    :param upper: whether small letters are read as capitals.
    :param same: pairs of letters, the first of which is read as the second, as in ``("TU",)``.
    """

    upper: bool = False
    same: tuple[str, ...] = ()
    kind: ClassVar[str] = "letters"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "same", tuple(self.same))
        long = [symbol for symbol in self.symbols if len(symbol) != 1]
        if long:
            raise ValueError(
                f"The alphabet {self.name} of letters has {long[0]!r}, which is no letter; list "
                "its tokens in a file instead."
            )

    def pieces(self, text: str) -> list[str]:
        """Return the letters as they are read."""
        return list(self.normal(text))

    def split(self, text: str) -> list[str]:
        """Cut a text into letters.

        :raises ValueError: if it has another letter; the text names the place in the text.
        """
        tokens, known = self.pieces(text), self._known()
        for place, token in enumerate(tokens, 1):
            if known and token not in known:
                raise self.refused(text, f"has {token!r} at letter {place}, {self.none_of()}")
        return tokens

    def normal(self, text: str) -> str:
        """Return the text in capitals, where that is asked for, and with its twins read as one."""
        text = text.upper() if self.upper else text
        return text.translate({ord(pair[0]): pair[1] for pair in self.same})


DNA = Letters("dna", tuple("ACGT"), upper=True, same=("UT",))
RNA = Letters("rna", tuple("ACGU"), upper=True, same=("TU",))
PROTEIN = Letters("protein", tuple("ACDEFGHIKLMNPQRSTVWY"), upper=True)
CHARS = Letters("chars")
