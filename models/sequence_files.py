"""Sequences of one's own, as files hold them: FASTA, tables, lines and SMILES files."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

FASTA = (".fa", ".fasta", ".fna", ".faa", ".ffn")
TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".txt", ".seq")
SMILES = (".smi", ".smiles")
ENDINGS = (*FASTA, *TABLES, *LINES, *SMILES)
"""What the names of sequence files end in, packed (``.gz``) or not."""
PARTS = ("train", "valid", "test")
_USUAL = ("sequence", "smiles", "text")


@dataclass(frozen=True)
class Rows:
    """The rows of a file, in its order.

    :param texts: one sequence each.
    :param lines: where each begins, counted from 1.
    :param source: name of the file, for messages and cards.
    :param labels: class of each, if the file says.
    :param weights: how much each counts, if the file says.
    :param parts: ``train``, ``valid`` or ``test`` of each, if the file says.
    """

    texts: tuple[str, ...]
    lines: tuple[int, ...]
    source: str = "the sequences"
    labels: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None
    parts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def taken(self, kept: Sequence[int]) -> Rows:
        """Return some of the rows."""
        columns = ("texts", "lines", "labels", "weights", "parts")
        filled = {name: getattr(self, name) for name in columns if getattr(self, name) is not None}
        some: dict[str, Any] = {
            name: tuple(values[i] for i in kept) for name, values in filled.items()
        }
        return replace(self, **some)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read; a file without columns has none to name.

    :param text: the sequences. If nothing is said, the only column, or the only one of
        ``sequence``, ``smiles`` and ``text``.
    :param label: classes of the rows.
    :param weight: how much each row counts, from 0 up.
    :param part: ``train``, ``valid`` or ``test``.
    """

    text: str | None = None
    label: str | None = None
    weight: str | None = None
    part: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """What was said, by the option that says it."""
        options = ("--column", "--label-column", "--weight-column", "--split-column")
        said = (self.text, self.label, self.weight, self.part)
        return {option: name for option, name in zip(options, said, strict=True) if name}


def is_sequence_file(name: str | Path) -> bool:
    """Return whether a name is that of a sequence file, which need not be there."""
    return _ending(Path(name)) in ENDINGS


def read_rows(path: str | Path, columns: Columns | None = None) -> Rows:
    """Read a file by its ending.

    :param columns: which columns, of a table.
    :raises ValueError: if it is no such file, damaged, or holds no sequences; one sentence that
        names the file and the line.
    :raises FileNotFoundError: if there is none.
    """
    path, columns = Path(path), columns or Columns()
    read = _reader(path)
    if columns.named and _ending(path) not in TABLES:
        option = next(iter(columns.named))
        raise ValueError(f"The file {str(path)!r} has no columns: leave {option} out.")
    rows = read(path, _text(path), columns)
    if not len(rows):
        raise ValueError(f"The file {str(path)!r} holds no sequences; give one that does.")
    return replace(rows, source=path.name)


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _reader(path: Path) -> Callable[[Path, str, Columns], Rows]:
    ending = _ending(path)
    readers: dict[str, Callable[[Path, str, Columns], Rows]] = {
        **dict.fromkeys(FASTA, _fasta),
        **{name: partial(_table, mark=mark) for name, mark in TABLES.items()},
        **dict.fromkeys(LINES, partial(_lines, first_word=False)),
        **dict.fromkeys(SMILES, partial(_lines, first_word=True)),
    }
    if ending not in readers:
        raise ValueError(
            f"The file {str(path)!r} is of no known kind: end its name in one of "
            f"{', '.join(ENDINGS)}, or these and .gz."
        )
    return readers[ending]


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}: check its name.")
    content = path.read_bytes()
    try:
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"The file {str(path)!r} is damaged: it cannot be unpacked.") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"The file {str(path)!r} is no UTF-8 text: see line {line}.") from error


def _fasta(path: Path, text: str, columns: Columns) -> Rows:
    records: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(">"):
            records.append((number, []))
        elif line.strip() and not line.startswith(";"):
            if not records:
                raise ValueError(
                    f"The file {str(path)!r} is no FASTA: line {number} stands before the first "
                    "title; begin every sequence with a line >title."
                )
            records[-1][1].append("".join(line.split()))
    found = [(number, "".join(parts)) for number, parts in records]
    empty = next((number for number, sequence in found if not sequence), None)
    if empty is not None:
        raise ValueError(f"The file {str(path)!r} has a title without a sequence on line {empty}.")
    return _plain(found)


def _lines(path: Path, text: str, columns: Columns, *, first_word: bool) -> Rows:
    # Not splitlines: other line ends of Unicode may be symbols.
    lines = text.replace("\r\n", "\n").split("\n")
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    return _plain([(n, line.split()[0] if first_word else line) for n, line in filled])


def _plain(found: Sequence[tuple[int, str]]) -> Rows:
    return Rows(tuple(text for _, text in found), tuple(number for number, _ in found))


def _table(path: Path, text: str, columns: Columns, *, mark: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    names = [name.strip() for name in next(reader, [])]
    if not names:
        return Rows((), ())
    places = _places(path, names, columns)
    cells = list(_cells(path, reader, len(names)))

    def column(option: str) -> tuple[str, ...] | None:
        place = places.get(option)
        return None if place is None else tuple(row[place] for _, row in cells)

    lines = tuple(line for line, _ in cells)
    parts = column("--split-column")
    _check_parts(path, lines, parts)
    texts, labels = column("--column") or (), column("--label-column")
    _check_filled(path, lines, texts, "sequence")
    _check_filled(path, lines, labels, "class")
    weights = _numbers(path, lines, column("--weight-column"))
    return Rows(texts, lines, "", labels, weights, parts)


def _check_filled(
    path: Path, lines: Sequence[int], column: Sequence[str] | None, what: str
) -> None:
    for line, cell in zip(lines, column or (), strict=False):
        if not cell:
            raise ValueError(f"The file {str(path)!r} has no {what} on line {line}; mend the line.")


def _cells(path: Path, reader: Iterator[list[str]], count: int) -> Iterator[tuple[int, list[str]]]:
    line = getattr(reader, "line_num", 1)
    try:
        for row in reader:
            # A quoted cell may hold line ends: a row begins behind the last.
            begin, line = line + 1, getattr(reader, "line_num", 0)
            if row and len(row) != count:
                raise ValueError(
                    f"The file {str(path)!r} has {len(row)} cells on line {begin}, but {count} "
                    "column titles; mend the line."
                )
            if row:
                yield begin, row
    except csv.Error as error:
        raise ValueError(f"The file {str(path)!r} is no table: line {line + 1}: {error}.") from None


def _places(path: Path, names: list[str], columns: Columns) -> dict[str, int]:
    said = {"--column": _main_column(path, names, columns.text)} | columns.named
    for option, name in said.items():
        if names.count(name) != 1:
            what = "two columns" if name in names else "no column"
            raise ValueError(
                f"The file {str(path)!r} has {what} {name!r}: choose one of {', '.join(names)} for "
                f"{option}."
            )
    return {option: names.index(name) for option, name in said.items()}


def _main_column(path: Path, names: list[str], said: str | None) -> str:
    usual = [name for name in names if name.lower() in _USUAL]
    guesses = [said] if said else names if len(names) == 1 else usual
    if len(guesses) != 1:
        raise ValueError(
            f"The file {str(path)!r} has the columns {', '.join(names)}: say by --column which one "
            "holds the sequences."
        )
    return guesses[0]


def _numbers(
    path: Path, lines: Sequence[int], cells: tuple[str, ...] | None
) -> tuple[float, ...] | None:
    if cells is None:
        return None
    numbers = tuple(map(_number, cells))
    for line, cell, number in zip(lines, cells, numbers, strict=True):
        if not (math.isfinite(number) and number >= 0.0):
            raise ValueError(
                f"The file {str(path)!r} has the weight {cell!r} on line {line}; give a number "
                "from 0 up."
            )
    return numbers


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _check_parts(path: Path, lines: Sequence[int], parts: Sequence[str] | None) -> None:
    for line, part in zip(lines, parts or (), strict=False):
        if part not in PARTS:
            raise ValueError(
                f"The file {str(path)!r} has the part {part!r} on line {line}; write train, valid "
                "or test."
            )
