"""Tables of counts or probabilities in the layouts that ``Bio.motifs`` knows.

Biopython reads the numbers. What it passes over in silence (words between numbers, lines that are
too short, rows of unequal length) is looked for here first, and so is the direction of a table: one
line per base (JASPAR, hDPI, YeTFaSCo, ScerTF) or one line per position (HOCOMOCO, HOMER, CIS-BP,
Cluster-Buster).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import StringIO
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.potentials.motif_entries import BASES, Entry, Line, Motif, motif_of
from ppl_diffusion.potentials.motifs import ROW_TOLERANCE

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_ROWS, _COLUMNS = "pfm-four-rows", "pfm-four-columns"
_NAMES = ("Gene", "Motif", "TF")
"""Words that begin a line with the name of a table that has no heading (CIS-BP)."""
_Words = list[tuple[Line, list[str]]]


def read_table(entry: Entry, unnamed: str) -> Motif:
    """Read an entry of any layout.

    :param unnamed: what to call a table without a heading.
    :raises DamagedMotif: if it is no table of numbers for four bases.
    """
    identifier, name, lines = _names(entry, unnamed)
    words = [(line, _split(line)) for line in lines]
    if not words:
        raise entry.last.damaged(f"numbers of {identifier} were expected below")
    layout = _layout(words)
    _require_numbers(words, layout)
    text = "\n".join(" ".join(row) for _, row in words)
    table = _table(_parse(text, layout, words[0][0]))
    return motif_of(identifier, name, table, words[-1][0])


def read_transfac(entry: Entry, unnamed: str) -> Motif:
    """Read an entry of a TRANSFAC file.

    :raises DamagedMotif: if it has no matrix, or a damaged one.
    """
    text = "\n".join(line.text for line in entry.body) + "\n//\n"
    motif = _parse(text, "transfac", entry.first)
    rows = [line for line in entry.body if line.text[:1].isdigit()]
    for line in rows:
        _numbers(line, line.text.split()[1:5])
    if len(rows) != motif.length:
        raise entry.last.damaged(f"the matrix has {motif.length} of its {len(rows)} rows")
    keys = (motif.get(key) for key in ("AC", "ID", "NA"))
    identifier, *others = [key for key in keys if key] or [unnamed]
    return motif_of(identifier, (others or [identifier])[-1], _table(motif), entry.first)


def of_biopython(line: Line) -> Callable[[Any, str], Motif]:
    """Return what makes a motif of one of Biopython's.

    :param line: what an error names.
    """

    def read(motif: Any, unnamed: str) -> Motif:
        name = motif.name or unnamed
        return motif_of(getattr(motif, "id", None) or name, name, _table(motif), line)

    return read


def _table(motif: Any) -> Tensor:
    """Return the counts of a Biopython motif, float64 ``(W, 4)``."""
    return torch.tensor([list(motif.counts[base]) for base in BASES], dtype=torch.float64).T


def _parse(text: str, layout: str, line: Line) -> Any:
    from Bio import motifs  # most programs read no motif

    try:
        (motif,) = motifs.parse(StringIO(text), layout, strict=False)
    except Exception as error:  # Biopython raises Exception itself
        raise line.damaged(f"Biopython cannot read it ({error})") from error
    return motif


def _names(entry: Entry, unnamed: str) -> tuple[str, str, list[Line]]:
    """Return identifier, name, and the lines of the table."""
    lines = [line for line in entry.body if not line.text.startswith(("#", "Ent="))]
    if entry.heading is None:
        named = {}
        while lines and lines[0].text.split()[0] in _NAMES:
            key, *words = lines.pop(0).text.split()
            named[key] = " ".join(words)
        identifier = named.get("Motif") or named.get("Gene") or unnamed
        return identifier, named.get("TF") or named.get("Gene") or identifier, lines
    first, _, rest = entry.heading.text[1:].strip().partition("\t")
    identifier, _, name = first.strip().partition(" ")
    if not identifier:
        raise entry.heading.damaged("'>' must be followed by an identifier")
    return identifier, name.strip() or rest.split("\t")[0].strip() or identifier, lines


def _split(line: Line) -> list[str]:
    """Return the words of a line without the frame around its numbers."""
    words = re.sub(r"[\[\]|]", " ", line.text).split()
    glued = words and re.fullmatch(rf"([A-Za-z])({NUMBER.pattern})", words[0])
    words = [*glued.groups(), *words[1:]] if glued else words
    # Biopython knows bases in capitals, and exponents without a plus.
    return [w.upper() if len(w) == 1 else re.sub("(?<=[eE])[+]", "", w) for w in words]


def _layout(words: _Words) -> str:
    """Return how a table is laid out, by its letters, its shape, or the sums of its numbers."""
    line, first = words[0]
    if first[0].lower() in ("pos", "position") or all(w.isalpha() for w in first):
        letters = [w.upper() for w in first if len(w) == 1]
        if sorted(letters) != list(BASES):
            raise line.damaged(f"the bases must be {', '.join(BASES)}")
        first[:] = letters if len(letters) == len(first) else ["Pos", *letters]
        return _COLUMNS
    if first[0].isalpha():
        _require_bases(words)
        return _ROWS
    widths = {len(row) for _, row in words}
    if len(words) == len(BASES) and widths in ({len(BASES)}, {1 + len(BASES)}):
        return _direction(words, numbered=widths != {len(BASES)})
    if len(words) != len(BASES) and widths <= {len(BASES), len(BASES) + 1}:
        return _COLUMNS
    return _ROWS


def _require_bases(words: _Words) -> None:
    for base, (line, row) in zip(count(), words):
        if base >= len(BASES) or row[0] not in BASES or row[0] in [w[0] for _, w in words[:base]]:
            raise line.damaged(f"one line of numbers for each of {', '.join(BASES)} was expected")


def _direction(words: _Words, *, numbered: bool) -> str:
    """Tell the directions of a table of four lines apart: all positions have one total."""
    table = torch.tensor([_numbers(line, row) for line, row in words], dtype=torch.float64)
    rows, columns = _even(table.sum(0)), _even(table[:, int(numbered) :].sum(1))
    return _COLUMNS if columns and not rows else _ROWS


def _even(totals: Tensor) -> bool:
    return float(totals.max() - totals.min()) <= 2 * ROW_TOLERANCE * float(totals.abs().max())


def _require_numbers(words: _Words, layout: str) -> None:
    """Require equally many numbers in every line of a table, and as many lines as it takes."""
    rows = words[1:] if layout == _COLUMNS and words[0][1][-1].isalpha() else words
    if not rows:
        raise words[-1][0].damaged("numbers were expected below")
    bare = [(line, row[1:] if row[0].isalpha() else row) for line, row in rows]
    for line, row in bare:
        _numbers(line, row)
    if layout == _ROWS and len(bare) != len(BASES):
        missing = BASES[len(bare)] if len(bare) < len(BASES) else "no more bases"
        raise bare[-1][0].damaged(f"the numbers of {missing} were expected below (order {BASES})")
    line, row = next(((at, row) for at, row in bare if len(row) != len(bare[0][1])), bare[-1])
    if not row or len(row) != len(bare[0][1]):
        raise line.damaged("all lines must hold equally many numbers, at least one")
    if layout == _COLUMNS and len(row) > len(BASES):
        _require_positions(bare)


def _require_positions(rows: _Words) -> None:
    """Require that the first of five columns, which Biopython drops, counts positions."""
    start = rows[0][1][0]
    for (line, row), position in zip(rows, count(1 if start != "0" else 0)):
        if row[0] != str(position):
            raise line.damaged(f"four numbers were expected, one for each of {', '.join(BASES)}")


def _numbers(line: Line, words: Sequence[str]) -> list[float]:
    if not all(NUMBER.fullmatch(word) for word in words):
        raise line.damaged("only finite numbers may stand here")
    return [float(word) for word in words]
