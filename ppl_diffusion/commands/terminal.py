"""Terminals and files that cannot write every letter get stand-ins instead of an error."""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_HANDLER = "ppl-diffusion-stand-ins"
_STAND_INS = {
    "±": "+-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "•": "*",
    "·": ".",
    "→": "->",
    "∝": "~",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
_BOX = range(0x2500, 0x25A0)
"""Lines and blocks, of which frames and bars are made."""


def plain(text: str, encoding: str) -> str:
    """Return a text that an encoding can write, with stand-ins where it cannot."""
    return text.encode(encoding, _HANDLER).decode(encoding)


@contextmanager
def readable_streams() -> Iterator[None]:
    """Let standard output and error write stand-ins for what they cannot write."""
    changed: list[tuple[TextIOWrapper, str, str | None]] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a notebook's is none, and writes everything
            changed.append((stream, stream.encoding, stream.errors))
            encoding = "ascii" if _wants_ascii() else stream.encoding
            stream.reconfigure(encoding=encoding, errors=_HANDLER)
    try:
        yield
    finally:
        for stream, encoding, errors in changed:
            with suppress(OSError, ValueError):  # the reader may have gone
                stream.reconfigure(encoding=encoding, errors=errors)


def _wants_ascii() -> bool:
    """Whether somebody asked for the locale C, in which Python writes UTF-8 all the same."""
    said = {"PYTHONIOENCODING", "PYTHONUTF8"} & os.environ.keys()
    return os.environ.get("LC_ALL") in ("C", "POSIX") and not said


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Print what the package warns about as sentences, not as lines of its source."""
    usual = warnings.showwarning

    def say(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
        if _PACKAGE in Path(filename).parents:
            print(f"ppl-diffusion: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            usual(message, category, filename, *where, **more)

    warnings.showwarning = say
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextmanager
def no_windows() -> Iterator[None]:
    """Ask Matplotlib for files only: commands open no window, and a wrong backend stops its import.

    ArviZ imports it too, so that without this ``MPLBACKEND`` could decide whether a run is kept.
    """
    usual = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if usual is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = usual


def _stand_ins(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    return "".join(map(_stand_in, unknown)), error.end


def _stand_in(letter: str) -> str:
    if letter in _STAND_INS:
        return _STAND_INS[letter]
    if ord(letter) in _BOX:
        return {"│": "|", "┃": "|", "║": "|"}.get(letter, "-" if letter in "─━═" else "+")
    base = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode("ascii")
    return base or letter.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_HANDLER, _stand_ins)
