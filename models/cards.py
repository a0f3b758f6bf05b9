"""What is shipped, as its files say; read without loading a network or what runs one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
CARD_FILE = "card.json"
PROGRAM_FILE = "program.json"
PRIOR_FOLDER = "prior"
"""Where the folder of a training run holds what it trained."""
CLASSIFIER_FILE = "text_classifier.json"


def names() -> list[str]:
    """Return the names of the shipped priors."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{PROGRAM_FILE}"))


def list_oracles() -> list[str]:
    """Return the names of the shipped oracles."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*-oracle-*/config.json"))


def list_text_classifiers() -> list[str]:
    """Return the names of the shipped classifiers of text."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CLASSIFIER_FILE}"))


def codecs() -> list[str]:
    """Return the names of the shipped codecs of images."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*-codec/config.json"))


def list_classifiers() -> list[str]:
    """Return the names of the shipped classifiers of images."""
    return sorted(p.parent.name for p in WEIGHTS.glob("*-classifier/config.json"))


def available() -> list[dict[str, Any]]:
    """Describe the shipped priors.

    :returns: one dict per prior with ``name``, ``family``, ``length``, ``vocabulary`` and
        ``card`` (data, licence, training command, metrics on the test split).
    """
    return [{**_read(WEIGHTS / name / PROGRAM_FILE), "card": read_card(name)} for name in names()]


def read_card(name: str) -> dict[str, Any]:
    """Return what is known about a shipped prior or oracle: the contents of its ``card.json``."""
    return _read(WEIGHTS / name / CARD_FILE)


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


def _read(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries
