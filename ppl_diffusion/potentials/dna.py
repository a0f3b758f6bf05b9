"""DNA alphabets: IUPAC patterns, strands, and scores summed along a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError

Vocabulary = str | Sequence[str]
"""The letter of every token id, such as ``"ACGT"``."""

IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "U": "T",
    "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip


def parse_iupac(pattern: str) -> list[str]:
    """Return the bases allowed at each position of an IUPAC pattern.

    :param pattern: such as ``"TATAWAW"``, upper or lower case.
    :raises ValueError: if the pattern is empty or a letter is no IUPAC code.
    """
    letters = pattern.strip().upper()
    unknown = sorted(set(letters) - set(IUPAC))
    if not letters or unknown:
        wrong = f"holds {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise ValueError(
            f"The motif {pattern!r} {wrong}: write it in IUPAC codes {''.join(IUPAC)}."
        )
    return [IUPAC[letter] for letter in letters]


def ids_of(letters: str, vocabulary: Vocabulary) -> list[int]:
    """Return the token id of each letter.

    :raises ValueError: if a letter is not in the vocabulary.
    """
    known = list(vocabulary)
    missing = sorted(set(letters) - set(known))
    if missing:
        raise ValueError(
            f"The vocabulary {''.join(known)!r} lacks {', '.join(map(repr, missing))}: "
            "give the letter of every token id in order."
        )
    return [known.index(letter) for letter in letters]


def strand_tables(
    columns: Tensor, vocabulary: Vocabulary, *, absent: float, both_strands: bool
) -> list[Tensor]:
    """Rearrange base columns into token columns, for the forward strand and perhaps the other.

    :param columns: ``(W, 4)``, bases in the order A, C, G, T.
    :param absent: value of tokens that are no base.
    :returns: float64 ``(W, V)`` per strand, forward first.
    """
    # A=0 and T=3, C=1 and G=2: flipping the bases complements, flipping the positions reverses.
    strands = [columns, columns.flip(0, 1)] if both_strands else [columns]
    blank = torch.full((len(columns), len(list(vocabulary))), absent, dtype=torch.float64)
    ids = torch.tensor(ids_of("ACGT", vocabulary), device=blank.device)
    return [blank.index_copy(1, ids, strand.to(blank)) for strand in strands]


def scan(x0: Tensor, table: Tensor) -> Tensor:
    """Sum a table of per-position token values over every window of a sequence.

    :param x0: tokens, int64 ``(*batch, L)`` with ``L >= W``.
    :param table: float64 ``(W, V)``.
    :returns: float64 ``(*batch, L - W + 1)``.
    """
    windows = x0.shape[-1] - len(table) + 1
    columns = table.to(x0.device)
    total = columns[0][x0[..., :windows]]
    for offset in range(1, len(table)):  # a loop over the motif keeps the memory at one window
        total = total + columns[offset][x0[..., offset : offset + windows]]
    return total


def check_tokens(x0: Tensor, vocab_size: int, width: int, name: str) -> None:
    """Check that sequences are long enough and hold clean tokens only.

    :param x0: tokens, int64 ``(*batch, L)``.
    :raises PotentialError: if they are not.
    """
    if x0.shape[-1] < width:
        raise PotentialError(
            f"{name} needs sequences of at least {width} tokens, got length {x0.shape[-1]}; "
            "use a shorter motif or longer sequences."
        )
    if x0.numel() and (int(x0.min()) < 0 or int(x0.max()) >= vocab_size):
        raise PotentialError(
            f"{name} reads tokens 0 to {vocab_size - 1}, got {int(x0.min())} to {int(x0.max())}; "
            "pass clean sequences, or the vocabulary that they use."
        )
