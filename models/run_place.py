"""Where a training run is written: never over another one by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

from ppl_diffusion.models.cards import CARD_FILE, PRIOR_FOLDER

CHECKPOINT = "last.ckpt"
RUN_FILE = "run.json"
STARTED_FILE = "started.json"
"""What a run began with; it is gone when the run is finished."""
PLAN_FILE = "plan.json"
"""What a run on data of one's own has decided before its first step."""
_FILES = (CHECKPOINT, STARTED_FILE, RUN_FILE, PLAN_FILE, CARD_FILE, "card.md", PRIOR_FOLDER)


def check_place(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a place that a run cannot take, before any work is done.

    :param resume: whether the run goes on that is there.
    :param force: whether it is thrown away.
    :raises FileExistsError: if there is one, and neither was said.
    :raises NotADirectoryError: if the place is a file.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"The output {str(out)!r} is not a folder: choose another --out.")
    if _there(out) and not (resume or force):
        raise FileExistsError(
            f"The folder {str(out)!r} already holds a training run: go on with it by --resume, "
            "replace it by --force, or choose another --out."
        )


def has_begun(out: Path) -> bool:
    """Return whether a run there has begun to train, and can thus be gone on with."""
    return any((out / name).is_file() for name in (CHECKPOINT, STARTED_FILE))


def clear(out: Path) -> None:
    """Throw away the run that is there, and nothing else."""
    for place in _there(out):
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def _there(out: Path) -> list[Path]:
    return [out / name for name in _FILES if (out / name).exists()]
