"""Loading of priors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ppl_diffusion.models import latent, masked, uniform  # noqa: F401  (the families of ours)
from ppl_diffusion.models.cards import PRIOR_FOLDER, PROGRAM_FILE, find_folder, names
from ppl_diffusion.models.program import FAMILIES, DiffusionProgram


def load(name_or_dir: str | Path) -> DiffusionProgram:
    """Load a shipped prior by its name, or any prior from its folder.

    :param name_or_dir: a name out of :func:`available`, or a folder written by
        :meth:`DiffusionProgram.save` or by a training run.
    :raises ValueError: if there is no such prior, its files are damaged, or the module that defines
        its family was not imported.
    :raises FileNotFoundError: if the folder lacks a file.
    """
    folder = find_folder(name_or_dir, names(), "prior")
    inside = folder / PRIOR_FOLDER
    run = not (folder / PROGRAM_FILE).is_file() and (inside / PROGRAM_FILE).is_file()
    return _read(inside if run else folder)


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
