"""Motif matrices from files: minimal MEME (as JASPAR offers) and JASPAR count matrices."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.potentials.motifs import MotifMatrix

_BASES = "ACGT"
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, eq=False)
class Motif:
    """A matrix as it stands in a file.

    :param identifier: such as ``"MA0108.1"``.
    :param name: such as ``"TBP"``; equal to the identifier where the file gives none.
    :param probabilities: float64 ``(W, 4)``, bases in the order A, C, G, T.
    :param sites: number of sites the probabilities were counted on.
    """

    identifier: str
    name: str
    probabilities: Tensor
    sites: float

    def potential(self, **options: Any) -> MotifMatrix:
        options = {"name": f"motif {self.name}", "sites": self.sites, **options}
        return MotifMatrix.from_probabilities(self.probabilities, **options)


def read_motifs(path: str | Path) -> list[Motif]:
    """Read a motif file of either format, recognised by its first line.

    :param path: plain or gzipped text.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is neither a MEME nor a JASPAR file, or damaged; the text names the
        line.
    """
    lines = _Lines(path)
    first = lines.peek()
    if first.upper().startswith("MEME"):
        return _parse_meme(lines)
    if first.startswith(">"):
        return _parse_jaspar(lines)
    raise ValueError(
        f"The motif file {str(path)!r} begins with {first[:40]!r}: give a MEME file (first line "
        "'MEME version 4') or JASPAR count matrices (first line '>identifier name')."
    )


def read_meme(path: str | Path) -> list[Motif]:
    """Read a minimal MEME file of DNA motifs, with the errors of :func:`read_motifs`."""
    lines = _Lines(path)
    if not lines.peek().upper().startswith("MEME"):
        raise lines.error("a MEME file begins with 'MEME version 4'")
    return _parse_meme(lines)


def read_jaspar(path: str | Path) -> list[Motif]:
    """Read JASPAR count matrices, with or without ``A [ ... ]`` around the counts.

    It raises the errors of :func:`read_motifs`.
    """
    return _parse_jaspar(_Lines(path))


def find_motif(motifs: Sequence[Motif], name: str) -> Motif:
    """Return the one matrix of that identifier or name, case ignored.

    :raises ValueError: if there is none or more than one.
    """
    wanted = name.upper()
    hits = [m for m in motifs if wanted in (m.identifier.upper(), m.name.upper())]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise ValueError(
            f"{len(hits)} motifs are called {name!r}: give one of the identifiers "
            f"{', '.join(m.identifier for m in hits)}."
        )
    some = ", ".join(f"{m.identifier} {m.name}" for m in motifs[:3])
    raise ValueError(f"No motif is called {name!r}: the file holds {len(motifs)}, such as {some}.")


class _Lines:
    """The lines of a file that are not blank, with their numbers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        numbered = enumerate(_read_text(self.path).splitlines(), start=1)
        self._lines = [(number, line.strip()) for number, line in numbered if line.strip()]
        self._next = 0
        if not self._lines:
            raise ValueError(f"The motif file {str(path)!r} is empty: give a file with a matrix.")

    def peek(self) -> str:
        """Return the next line without taking it, or an empty string at the end."""
        return self._lines[self._next][1] if self._next < len(self._lines) else ""

    def take(self) -> str:
        line = self.peek()
        self._next += 1
        return line

    def __iter__(self) -> Iterator[str]:
        while self.peek():
            yield self.take()

    def error(self, expected: str) -> ValueError:
        """Return an error about the line that comes next."""
        at = min(self._next, len(self._lines) - 1)
        number, line = self._lines[at]
        return ValueError(
            f"The motif file {str(self.path)!r} is damaged at line {number} ({line[:40]!r}): "
            f"{expected}."
        )

    def error_at_last(self, expected: str) -> ValueError:
        """Return an error about the line that was taken last."""
        self._next -= 1
        return self.error(expected)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"The motif file {str(path)!r} does not exist: check the path.")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The motif file {str(path)!r} is not plain or gzipped text ({error}): download it "
            "again."
        ) from error


def _parse_meme(lines: _Lines) -> list[Motif]:
    motifs: list[Motif] = []
    label: list[str] = []
    for line in lines:
        key = line.split()[0]
        if key.upper() == "ALPHABET=" or line.upper().startswith("ALPHABET ="):
            alphabet = line.split("=", 1)[1].strip().upper()
            if alphabet != _BASES:
                raise lines.error_at_last(f"the alphabet must be {_BASES}, not {alphabet!r}")
        elif key == "MOTIF":
            label = line.split()[1:]
        elif line.startswith("letter-probability matrix"):
            motifs.append(_meme_matrix(line, label, lines))
    if not motifs:
        raise lines.error("no letter-probability matrix was found")
    return motifs


def _meme_matrix(header: str, label: list[str], lines: _Lines) -> Motif:
    if not label:
        raise lines.error_at_last("a 'MOTIF identifier' line must come before the matrix")
    width = _header_number(header, "w")
    sites = _header_number(header, "nsites")
    rows = []
    while lines.peek()[:1].isdigit() or lines.peek().startswith((".", "-")):
        rows.append(_probabilities(lines.take(), lines))
    if not rows or (width is not None and len(rows) != int(width)):
        expected = "at least 1" if width is None else f"{width:g}"
        raise lines.error(f"motif {label[0]} has {len(rows)} rows of probabilities, not {expected}")
    return Motif(
        label[0], label[-1], torch.tensor(rows, dtype=torch.float64), sites if sites else 20.0
    )  # 20 is what the MEME suite assumes where a file does not say


def _header_number(header: str, key: str) -> float | None:
    match = re.search(rf"\b{key}\s*=\s*({_NUMBER.pattern})", header)
    return float(match.group(1)) if match else None


def _probabilities(line: str, lines: _Lines) -> list[float]:
    row = _numbers(line, lines)
    if len(row) != len(_BASES) or min(row) < 0 or abs(sum(row) - 1) > 0.01:
        raise lines.error_at_last("a row must hold 4 probabilities that sum to one")
    return row


def _parse_jaspar(lines: _Lines) -> list[Motif]:
    motifs = []
    for line in lines:
        if not line.startswith(">"):
            raise lines.error_at_last("a JASPAR matrix begins with '>identifier name'")
        label = line[1:].split()
        if not label:
            raise lines.error_at_last("'>' must be followed by an identifier")
        motifs.append(_jaspar_matrix(label, lines))
    return motifs


def _jaspar_matrix(label: list[str], lines: _Lines) -> Motif:
    rows = [_counts(base, lines) for base in _BASES]
    if len({len(row) for row in rows}) > 1 or not rows[0]:
        raise lines.error_at_last(
            f"the four lines of {label[0]} must hold equally many counts, at least one"
        )
    counts = torch.tensor(rows, dtype=torch.float64).T
    totals = counts.sum(-1, keepdim=True)
    if bool((totals <= 0).any()):
        raise lines.error_at_last(f"every position of {label[0]} must have counts")
    return Motif(label[0], label[-1], counts / totals, float(totals.mean()))


def _counts(base: str, lines: _Lines) -> list[float]:
    line = lines.take()
    head, body = (line[:1].upper(), line[1:]) if line[:1].isalpha() else (base, line)
    if head != base or not line:
        raise lines.error_at_last(f"the counts of {base} were expected here (order {_BASES})")
    row = _numbers(body.replace("[", " ").replace("]", " "), lines)
    if any(count < 0 for count in row):
        raise lines.error_at_last("counts must not be negative")
    return row


def _numbers(line: str, lines: _Lines) -> list[float]:
    words = line.split()
    if not all(_NUMBER.fullmatch(word) for word in words):
        raise lines.error_at_last("only finite numbers may stand here")
    return [float(word) for word in words]
