"""Motif matrices from files, in the formats that people have them in.

A file is cut into its entries, so that a damaged one spoils itself only: the others are read, and a
warning names it. Tables are read by Biopython's ``Bio.motifs``, MEME text by a parser of its own.
"""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ppl_diffusion.potentials.motif_entries import DamagedMotif, Entry, Line, Motif
from ppl_diffusion.potentials.motif_meme import read_meme_entry, require_bases
from ppl_diffusion.potentials.motif_tables import (
    NUMBER,
    of_biopython,
    read_table,
    read_transfac,
)

_TRANSFAC = re.compile(r"(VV|AC|ID|NA|DE|XX|P0|PO)\b")
_TABLE = re.compile(rf"([ACGT]|Pos|Gene|Motif|TF|{NUMBER.pattern})(\s|\[|\||$)", re.IGNORECASE)
_ASK = (
    "give a MEME file (first line 'MEME version 4'), JASPAR matrices (first line '>identifier "
    "name'), a TRANSFAC file or a table of numbers"
)
_Lines = Sequence[Line]


def read_motifs(path: str | Path) -> list[Motif]:
    """Read the motifs of a file, whose format is recognised by its first line.

    MEME text (minimal or not) and XML, JASPAR matrices, TRANSFAC, XMS, and tables with one line per
    base or one line per position (HOCOMOCO, HOMER, CIS-BP, Cluster-Buster), of counts or of
    probabilities, which count as 20 sites where the file says nothing else. A byte order mark and
    the line ends of other systems do not matter.

    :param path: plain or gzipped text.
    :raises FileNotFoundError: if there is no such file.
    :raises IsADirectoryError: if it is a folder.
    :raises ValueError: if it is of no such format, or no motif in it can be read; the text names
        the line.
    :warns UserWarning: names the damaged entries beside others that are read.
    """
    lines = _read_lines(path)
    first = next((line.text for line in lines if not line.text.startswith("#")), "")
    if first.upper().startswith("MEME"):
        return _collect(path, _meme_entries(path, lines), read_meme_entry)
    if first.startswith(">"):
        return _collect(path, _split(lines, ">"), read_table)
    if first.startswith("<"):
        return _collect(path, _parse_xml(path, lines), of_biopython(lines[0]))
    if _TRANSFAC.match(first):
        return _collect(path, _transfac_entries(lines), read_transfac)
    if _TABLE.match(first):
        return _collect(path, [Entry(None, lines)], read_table)
    raise ValueError(f"The motif file {str(path)!r} begins with {first[:40]!r}: {_ASK}.")


def read_meme(path: str | Path) -> list[Motif]:
    """Read a MEME text file of DNA motifs, with the errors of :func:`read_motifs`."""
    lines = _read_lines(path)
    if not lines[0].text.upper().startswith("MEME"):
        raise _error(path, lines[0].damaged("a MEME file begins with 'MEME version 4'"))
    return _collect(path, _meme_entries(path, lines), read_meme_entry)


def read_jaspar(path: str | Path) -> list[Motif]:
    """Read JASPAR matrices, with or without ``A [ ... ]`` around the numbers.

    It raises the errors of :func:`read_motifs`.
    """
    lines = _read_lines(path)
    if not lines[0].text.startswith(">"):
        raise _error(path, lines[0].damaged("a JASPAR matrix begins with '>identifier name'"))
    return _collect(path, _split(lines, ">"), read_table)


def find_motif(motifs: Sequence[Motif], name: str) -> Motif:
    """Return the one matrix of that identifier or name, case ignored.

    :raises ValueError: if there is none or more than one.
    """
    wanted = name.upper()
    hits = [m for m in motifs if wanted in (m.identifier.upper(), m.name.upper())]
    if len(hits) == 1:
        return hits[0]
    if len({m.identifier.upper() for m in hits}) < len(hits):
        raise ValueError(
            f"{len(hits)} motifs are called {name!r}, and some share an identifier: rename them in "
            "the file, or keep one."
        )
    if hits:
        raise ValueError(
            f"{len(hits)} motifs are called {name!r}: give one of the identifiers "
            f"{', '.join(m.identifier for m in hits)}."
        )
    some = ", ".join(f"{m.identifier} {m.name}" for m in motifs[:3])
    raise ValueError(f"No motif is called {name!r}: the file holds {len(motifs)}, such as {some}.")


# ----------------------------------------------------------------------------------------------
# lines and entries


def _read_lines(path: str | Path) -> _Lines:
    numbered = enumerate(_read_text(Path(path)).splitlines(), start=1)
    lines = [Line(number, text.strip()) for number, text in numbered if text.strip()]
    if not lines:
        raise ValueError(f"The motif file {str(path)!r} is empty: give a file with a matrix.")
    return lines


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise IsADirectoryError(f"The motif file {str(path)!r} is a folder: give one of its files.")
    if not path.is_file():
        raise FileNotFoundError(f"The motif file {str(path)!r} does not exist: check the path.")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        # A letter of a name in another code must not spoil the numbers.
        text = data.decode("utf-16") if marked else data.decode("utf-8-sig", errors="replace")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"The motif file {str(path)!r} is not plain or gzipped text ({error}): download it "
            "again."
        ) from error
    return text


def _split(lines: _Lines, mark: str) -> list[Entry]:
    """Cut lines into entries that begin with a mark; what comes before is no entry."""
    starts = [at for at, line in enumerate(lines) if line.text.startswith(mark)]
    ends = [*starts[1:], len(lines)]
    return [Entry(lines[at], lines[at + 1 : end]) for at, end in zip(starts, ends, strict=False)]


def _transfac_entries(lines: _Lines) -> list[Entry]:
    entries: list[list[Line]] = [[]]
    for line in lines:
        if line.text.startswith("//"):
            entries.append([])
        else:
            entries[-1].append(line)
    kept = [body for body in entries if body and not body[0].text.startswith("VV")]
    return [Entry(None, body) for body in kept]


def _collect(
    path: str | Path, entries: Sequence[Any], read: Callable[[Any, str], Motif]
) -> list[Motif]:
    """Read every entry; damaged ones are named in a warning, or in an error if all are."""
    found: list[Motif] = []
    damaged: list[tuple[str, DamagedMotif]] = []
    for entry in entries:
        try:
            found.append(read(entry, Path(path).stem))
        except DamagedMotif as error:
            title = entry.first.text if isinstance(entry, Entry) else str(entry.name)
            damaged.append((title, error))
    if damaged and not found:
        raise _error(path, damaged[0][1])
    if damaged:
        named = "; ".join(f"{title[:40]!r} at {why}" for title, why in damaged)
        warnings.warn(
            f"The motif file {str(path)!r} has {len(entries)} motifs, of which {len(damaged)} are "
            f"damaged and left out: {named}.",
            stacklevel=3,
        )
    return found


def _error(path: str | Path, damaged: DamagedMotif) -> ValueError:
    return ValueError(f"The motif file {str(path)!r} is damaged at {damaged}.")


# ----------------------------------------------------------------------------------------------
# formats that are more than entries


def _meme_entries(path: str | Path, lines: _Lines) -> list[Entry]:
    entries = _split(lines, "MOTIF")
    preamble = lines[: len(lines) - sum(1 + len(entry.body) for entry in entries)]
    try:
        require_bases(preamble)
        if not entries:
            raise lines[-1].damaged("no letter-probability matrix was found")
    except DamagedMotif as error:
        raise _error(path, error) from None
    return entries


def _parse_xml(path: str | Path, lines: _Lines) -> list[Any]:
    from Bio import motifs  # most programs read no motif

    text = "\n".join(line.text for line in lines)
    try:
        found: list[Any] = motifs.parse(StringIO(text), "xms" if "<motifset" in text else "meme")
    except Exception as error:  # Biopython raises what it stumbles over
        raise ValueError(
            f"The motif file {str(path)!r} begins like XML or a web page, and is no output of MEME "
            f"and no XMS file: {_ASK}."
        ) from error
    return found
