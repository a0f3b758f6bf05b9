"""Shipped priors: what there is, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppl_diffusion.models.program import FAMILIES, PROGRAM_FILE, DiffusionProgram

WEIGHTS = Path(__file__).parent / "weights"
CARD_FILE = "card.json"


def load(name_or_dir: str | Path) -> DiffusionProgram:
    """Load a shipped prior by its name, or any prior from its folder.

    :param name_or_dir: a name out of :func:`available`, or a folder written by
        :meth:`DiffusionProgram.save`.
    :raises ValueError: if there is no such prior, its files are damaged, or the module that defines
        its family was not imported.
    :raises FileNotFoundError: if the folder lacks a file.
    """
    return _read(find_folder(name_or_dir, names(), "prior"))


def find_folder(name_or_dir: str | Path, shipped: Sequence[str], what: str) -> Path:
    """Return the folder of something shipped, by its name, or the folder that was given.

    :param what: what it holds, for the text of the ``ValueError`` if there is none.
    """
    text = str(name_or_dir)
    folder = WEIGHTS / text if text in shipped else Path(text)
    if not text or not folder.is_dir():
        known = ", ".join(shipped)
        raise ValueError(f"There is no {what} {text!r}: give a folder or one of {known}.")
    return folder


def names() -> list[str]:
    """Return the names of the shipped priors."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{PROGRAM_FILE}"))


def available() -> list[dict[str, Any]]:
    """Describe the shipped priors.

    :returns: one dict per prior with ``name``, ``family``, ``length``, ``vocabulary`` and
        ``card`` (data, licence, training command, metrics on the test split).
    """
    return [{**_description(WEIGHTS / name), "card": read_card(name)} for name in names()]


def read_card(name: str) -> dict[str, Any]:
    """Return what is known about a shipped prior or oracle: the contents of its ``card.json``."""
    card: dict[str, Any] = json.loads((WEIGHTS / name / CARD_FILE).read_text(encoding="utf-8"))
    return card


def _read(folder: Path) -> DiffusionProgram:
    settings = _description(folder)
    family = FAMILIES[settings.pop("family")]
    try:
        return family.restore(folder, **settings)
    except TypeError as error:  # entries that its constructor does not take
        raise _no_prior(folder, f"{error}; restore it") from error


def _description(folder: Path) -> dict[str, Any]:
    path = folder / PROGRAM_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no prior: {PROGRAM_FILE} is missing."
        )
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        family, known = entries["family"], entries["family"] in FAMILIES
        missing = {"name", "length", "vocabulary"} - entries.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_prior(folder, f"{type(error).__name__}: {error}; restore it") from error
    if not known:
        wanted = f"the family {family!r} is none of {', '.join(FAMILIES)}"
        raise _no_prior(folder, f"{wanted}; import the module that defines it (--import)")
    if missing:
        raise _no_prior(folder, f"it lacks {', '.join(sorted(missing))}; restore it")
    return entries


def _no_prior(folder: Path, why: str) -> ValueError:
    return ValueError(f"The file {str(folder / PROGRAM_FILE)!r} describes no prior: {why}.")
