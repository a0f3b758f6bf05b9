"""Shipped priors: what there is, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.models.masked import MaskedDiffusion
from ppl_diffusion.models.program import PROGRAM_FILE, DiffusionProgram
from ppl_diffusion.models.uniform import UniformDiffusion

WEIGHTS = Path(__file__).parent / "weights"
CARD_FILE = "card.json"
FAMILIES: dict[str, type[DiffusionProgram]] = {
    program.family: program for program in (MaskedDiffusion, UniformDiffusion)
}


def load(name_or_dir: str | Path) -> DiffusionProgram:
    """Load a shipped prior by its name, or any prior from its folder.

    :param name_or_dir: a name out of :func:`available`, or a folder written by
        :meth:`DiffusionProgram.save`.
    :raises ValueError: if there is no such prior, or its files are damaged.
    :raises FileNotFoundError: if the folder lacks a file.
    """
    shipped = WEIGHTS / str(name_or_dir)
    if str(name_or_dir) in names():
        return _read(shipped)
    if str(name_or_dir) and Path(name_or_dir).is_dir():
        return _read(Path(name_or_dir))
    raise ValueError(
        f"There is no prior {str(name_or_dir)!r}: give a folder or one of {', '.join(names())}."
    )


def names() -> list[str]:
    """:returns: names of the shipped priors."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{PROGRAM_FILE}"))


def available() -> list[dict[str, Any]]:
    """Describe the shipped priors.

    :returns: one dict per prior with ``name``, ``family``, ``length``, ``vocabulary`` and
        ``card`` (data, licence, training command, metrics on the test split).
    """
    return [{**_description(WEIGHTS / name), "card": read_card(name)} for name in names()]


def read_card(name: str) -> dict[str, Any]:
    """Return what is known about a shipped prior.

    :param name: one of :func:`names`.
    :returns: the contents of its ``card.json``.
    """
    card: dict[str, Any] = json.loads((WEIGHTS / name / CARD_FILE).read_text(encoding="utf-8"))
    return card


def _read(folder: Path) -> DiffusionProgram:
    description = _description(folder)
    network = Transformer.from_pretrained(folder).requires_grad_(False)
    return FAMILIES[description["family"]](
        network,
        vocabulary=description["vocabulary"],
        length=description["length"],
        name=description["name"],
    )


def _description(folder: Path) -> dict[str, Any]:
    path = folder / PROGRAM_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no prior: {PROGRAM_FILE} is missing."
        )
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if entries["family"] in FAMILIES and {"name", "length", "vocabulary"} <= entries.keys():
            return entries
        problem = f"family {entries['family']!r} is unknown or an entry is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f"The file {str(path)!r} describes no prior ({problem}); restore it.")
