"""Run folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppl_diffusion.jobs.checks import InputError

MARKER = "summary.json"
CHECKPOINT = "checkpoint"
"""What an unfinished run holds."""


def check_target(folder: Path, *, replace: bool, resume: bool = False) -> None:
    """Refuse a place that a run folder cannot take, before any work is done.

    :param replace: whether it may take the place of another run.
    :param resume: whether it may take the place of one that is not finished.
    :raises InputError: if the place is a file, is not writable, or holds something else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"The output {str(folder)!r} is not a folder: choose another --out.")
    _check_parent(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if is_unfinished(folder):
        if not (replace or resume):
            raise InputError(
                f"The folder {str(folder)!r} holds a run that is not finished: go on with "
                "--resume, or begin anew with --force."
            )
        return
    if not is_finished(folder):
        raise InputError(
            f"The folder {str(folder)!r} holds files that are no run: choose another --out."
        )
    if not replace:
        raise InputError(
            f"The folder {str(folder)!r} already holds a run: choose another --out, "
            "or replace it with --force."
        )


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a whole run, and nothing that is to take its place."""
    return (folder / MARKER).is_file() and not (folder / CHECKPOINT).is_dir()


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds the checkpoints of a run, alone or beside one to replace."""
    if not (folder / CHECKPOINT).is_dir():
        return False
    return (folder / MARKER).is_file() or len(list(folder.iterdir())) == 1


@contextmanager
def whole_folder(folder: Path, *, replace: bool) -> Iterator[Path]:
    """Give a scratch folder that becomes ``folder`` when the block ends well.

    Checkpoints that led to it go with what it takes the place of.
    """
    check_target(folder, replace=replace, resume=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        _swap(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_file(path: Path) -> None:
    """Check that a file can be written, before any work is done for it.

    :raises InputError: if the place is a folder, lies in a file, or is a packed file.
    """
    if path.is_dir():
        raise InputError(f"The output {str(path)!r} is a folder: give the name of a file.")
    if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zip"):
        raise InputError(f"The output {str(path)!r} would not be packed: drop {path.suffix!r}.")
    _check_parent(path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a scratch file that becomes ``path`` when the block ends well.

    :raises InputError: if the place is a folder or is not writable.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays: it says which kind of picture Matplotlib draws.
    scratch = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _check_parent(place: Path) -> None:
    parent = next(p for p in place.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"Cannot write {str(place)!r} because {str(parent)!r} is not a writable folder."
        )


def _swap(scratch: Path, folder: Path) -> None:
    if not folder.exists():
        scratch.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old / "run")
    try:
        scratch.rename(folder)
    except OSError:
        (old / "run").rename(folder)
        raise
    shutil.rmtree(old)
