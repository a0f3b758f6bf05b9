"""Jobs that survive: checkpoints beside what they write, signals, and a disk that is full."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.jobs.checks import DiskFull, InputError, JobStopped
from ppl_diffusion.jobs.folder import CHECKPOINT, is_finished
from ppl_diffusion.smc.checkpoint import EVERY, PARTICLES, RunStopped, RunStore, keep_run

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def kept_job(
    folder: Path, question: Mapping[str, Any], *, resume: bool = False, every: float = EVERY
) -> Iterator[RunStore]:
    """Keep the runs inside in ``folder/checkpoint`` until the folder itself is written.

    Ctrl-C and SIGTERM end the job after the step that it makes; a second signal ends it at once.

    :param folder: the run folder, which takes the place of the checkpoints once it is whole.
    :param question: what makes the job what it is, in JSON types: everything, and its seed.
    :param resume: go on from the checkpoints that are there; without any the job begins anew.
    :param every: seconds between two checkpoints, at least.
    :raises InputError: if the checkpoints are damaged, or of another question.
    :raises JobStopped: if a signal ended the job; the text says how to go on.
    :raises DiskFull: if it could not be written; the text says what was kept, and where.
    """
    asked = {**question, "torch": torch.__version__}
    try:
        with _keeping(folder / CHECKPOINT, asked, resume, every) as store, _stopping(store):
            yield store
            if not is_finished(folder):
                store.end_if_asked()
    except RunStopped as error:
        raise JobStopped(_stopped(folder, error), 128 + error.signal) from error
    except ParticleCollapse:
        # Nothing can go on from particles that are all dead.
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        _drop_if_empty(folder)
        raise
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise DiskFull(_full(folder)) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    # Whoever writes the weights knows no numbers, and says it in words.
    words = os.strerror(errno.ENOSPC)
    return getattr(error, "errno", None) in _FULL or words in str(error)


@contextmanager
def _keeping(
    place: Path, question: Mapping[str, Any], resume: bool, every: float
) -> Iterator[RunStore]:
    missing = [folder for folder in place.parents if not folder.exists()]
    kept = keep_run(place, question, resume=resume, every=every)
    try:
        store = kept.__enter__()
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        yield store
    except ParticleCollapse:  # it would end like that again
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        kept.__exit__(None, None, None)
        _tidy(place)
        for folder in missing:  # a job that is refused leaves nothing behind
            _drop_if_empty(folder)


def _tidy(place: Path) -> None:
    """Leave no folder behind that nothing can go on from."""
    if any(place.rglob("stage-*.pt")) or (place / PARTICLES).is_dir():
        return
    shutil.rmtree(place, ignore_errors=True)
    _drop_if_empty(place.parent)


def _drop_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds an earlier run
        folder.rmdir()


@contextmanager
def _stopping(store: RunStore) -> Iterator[None]:
    """Let signals end a run where it can go on; elsewhere than in the main thread none arrives."""

    def stop(number: int, frame: FrameType | None) -> None:
        if store.signal is not None:
            store.end_if_asked()
        store.stop(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _stopped(folder: Path, error: RunStopped) -> str:
    if error.kept:
        return f"Stopped: the run is kept in {str(folder / CHECKPOINT)!r}; go on with --resume."
    return "Stopped before the first checkpoint: nothing was kept; begin anew."


def _full(folder: Path) -> str:
    place = folder / CHECKPOINT / PARTICLES
    if not place.is_dir():
        return (
            f"The disk of {str(folder)!r} is full, and not even the particles could be written: "
            "free some space, and go on with --resume."
        )
    return (
        f"The disk is full: the particles are kept in {str(place)!r}, and what is made of them is "
        "missing; free some space, and go on with --resume."
    )
