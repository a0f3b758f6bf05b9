"""Text files of the MEME suite.

Biopython turns their probabilities into whole numbers of sites (20, where none are given), and so
cannot read them without loss; these few lines can.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from ppl_diffusion.potentials.motif_entries import BASES, NUM_SITES, Entry, Line, Motif
from ppl_diffusion.potentials.motif_tables import NUMBER
from ppl_diffusion.potentials.motifs import ROW_TOLERANCE

_MATRIX = "letter-probability matrix"


def require_bases(preamble: Sequence[Line]) -> None:
    """:raises DamagedMotif: if a file declares another alphabet than that of DNA."""
    for line in preamble:
        key, _, alphabet = line.text.partition("=")
        if key.strip().upper() == "ALPHABET" and alphabet.strip().upper() != BASES:
            raise line.damaged(f"the alphabet must be {BASES}, not {alphabet.strip()!r}")


def read_meme_entry(entry: Entry, _: str) -> Motif:
    """Read what follows a line ``MOTIF identifier name``.

    :raises DamagedMotif: if there is no matrix of probabilities, or a damaged one.
    """
    at = next((i for i, line in enumerate(entry.body) if line.text.startswith(_MATRIX)), None)
    if at is None:
        raise entry.first.damaged(f"no {_MATRIX} was found")
    header = entry.body[at]
    words = entry.heading.text.split()[1:] if entry.heading else []
    if not words:
        raise header.damaged("a 'MOTIF identifier' line must come before the matrix")
    # The output of the program `meme` goes on with figures where other files have ended.
    name = re.split(r"\s+width\s*=", " ".join(words[1:]))[0].strip()
    rows = _rows(entry, at + 1)
    width = _number(header, "w")
    if not rows or (width is not None and len(rows) != width):
        expected = "at least 1" if width is None else f"{width:g}"
        at_fault = entry.body[min(at + 1 + len(rows), len(entry.body) - 1)]
        raise at_fault.damaged(
            f"motif {words[0]} has {len(rows)} rows of probabilities, not {expected}"
        )
    table = torch.tensor(rows, dtype=torch.float64)
    sites = _number(header, "nsites") or NUM_SITES
    if not 0 < sites < math.inf:
        raise header.damaged("nsites must be a number of sites")
    return Motif(words[0], name or words[0], table / table.sum(-1, keepdim=True), sites)


def _rows(entry: Entry, start: int) -> list[list[float]]:
    rows = []
    for line in entry.body[start:]:
        if not re.match(r"[-+.]?\d", line.text):
            break
        rows.append(_row(line))
    return rows


def _row(line: Line) -> list[float]:
    words = line.text.split()
    if not all(NUMBER.fullmatch(word) for word in words):
        raise line.damaged("only finite numbers may stand here")
    row = [float(word) for word in words]
    if len(row) != len(BASES) or min(row) < 0 or abs(sum(row) - 1) > ROW_TOLERANCE:
        raise line.damaged("a row must hold 4 probabilities that sum to one")
    return row


def _number(header: Line, key: str) -> float | None:
    match = re.search(rf"\b{key}\s*=\s*({NUMBER.pattern})", header.text)
    return float(match.group(1)) if match else None
