"""Runs that survive: their state on disk, and how they go on from it.

A run is a fixed sequence of *stages* (pilots, the main loop, sweeps of moves), and what stands
between them costs nothing and is done again. Each stage writes where it stands after a step, and a
run that is begun again, with the same seed, finds its stages in the same order: those that were
begun go on from their file, with the particles, the counters, the caches and the random state they
had. So the result is that of the unbroken run, bit for bit.

    with keep_run(folder, {"seed": 0, "particles": 256}):
        posterior = SMC(chain, reward, num_particles=256).run(seed=0)
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.potentials.failures import WATCHED
from ppl_diffusion.smc.portable import NotPortable, packed, unpacked
from ppl_diffusion.smc.run_memory import memory_of, remember

QUESTION = "question.json"
PARTICLES = "particles"
"""The folder of a result that is complete, before anything is made of it."""
EVERY = 10.0
"""Seconds between two checkpoints of a run, at least."""
SHARE = 0.05
"""Share of the time that writing them may take."""
_FORMAT = 1

State = dict[str, Any]


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop, and has written where it stands.

    :param signal: the number of the signal.
    :param kept: whether there is a checkpoint to go on from.
    """

    def __init__(self, signal: int, kept: bool) -> None:
        super().__init__(f"the run was stopped by signal {signal}")
        self.signal, self.kept = signal, kept


class RunStore:
    """Where a run writes its stages.

    :param folder: the folder.
    :param every: seconds between two checkpoints, at least; 0 writes after every step.
    """

    def __init__(self, folder: Path, every: float = EVERY) -> None:
        self.folder, self.every = folder, every
        self.signal: int | None = None
        self._count = 0
        self._due = time.monotonic() + every
        self._open = True

    def stop(self, signal: int) -> None:
        """Ask the run to stop after the step that it makes.

        :param signal: why.
        """
        self.signal = signal

    def next_place(self) -> Path:
        """Return the file of the stage that begins now."""
        place = self.folder / f"stage-{self._count:04d}.pt"
        self._count += 1
        return place

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is to be written now."""
        return self._open and (self.signal is not None or time.monotonic() >= self._due)

    def write(self, place: Path, make: Callable[[], State]) -> None:
        """Write a stage; a run whose state cannot be written goes on, and says so once.

        :param place: the file.
        :param make: returns what it holds.
        """
        started = time.monotonic()
        try:
            _write(place, make())
        except (NotPortable, OSError) as error:
            self._open = False
            _warn(
                f"no more checkpoints of this run are written to {str(self.folder)!r} ({error}); "
                "it goes on, and can be resumed from the last one."
            )
        now = time.monotonic()
        self._due = now + max(self.every, (now - started) / SHARE if self.every else 0.0)

    def end_if_asked(self) -> None:
        """End the run if somebody asked for it.

        :raises RunStopped: if so.
        """
        if self.signal is not None:
            # Runs that are made in processes of their own write into folders of their own.
            raise RunStopped(self.signal, any(self.folder.rglob("stage-*.pt")))


class Stage:
    """A part of a run that goes on where it stood.

    :param owner: what remembers: an engine, or a bound run.
    :param generator: source of randomness, None for the global one.
    :param shape: what the stage is known again by: its name, and numbers.
    """

    def __init__(
        self, owner: object, generator: torch.Generator | None, shape: tuple[str | int, ...]
    ) -> None:
        self.store = _STORE.get()
        self.owner, self.generator, self.shape = (owner, WATCHED.get()), generator, shape
        self.place = None if self.store is None else self.store.next_place()

    def begun(self) -> State | None:
        """Return where the stage stood, None if it is new; memory and randomness are put back.

        :raises ValueError: if the file is damaged, or of another run.
        """
        if self.place is None or not self.place.is_file():
            return None
        content = _read(self.place)
        if tuple(content["shape"]) != self.shape:
            raise ValueError(
                f"The file {str(self.place)!r} is of another run ({content['shape']}, not "
                f"{self.shape}); begin anew without --resume."
            )
        remember(self.owner, content["memory"])
        self._set_randomness(content["random"])
        state: State = unpacked(content["state"])
        return state

    def boundary(self, state: Callable[[], State]) -> None:
        """Write where the stage stands, if that is due, and end if that was asked for.

        :param state: returns what the stage goes on from.
        :raises RunStopped: if the run was asked to stop.
        """
        if self.store is None or self.place is None:
            return
        if self.store.is_due:
            self.store.write(self.place, lambda: self._content(state()))
        self.store.end_if_asked()

    def _content(self, state: State) -> State:
        return {
            "format": _FORMAT,
            "shape": self.shape,
            "state": packed(state),
            "memory": memory_of(self.owner),
            "random": self._randomness(),
        }

    def _randomness(self) -> list[torch.Tensor]:
        own = [] if self.generator is None else [self.generator.get_state()]
        return [torch.get_rng_state(), *_accelerators(), *own]

    def _set_randomness(self, states: list[torch.Tensor]) -> None:
        first, *rest = states
        torch.set_rng_state(first)
        if self.generator is not None:
            self.generator.set_state(rest.pop())
        if rest:
            torch.cuda.set_rng_state_all(rest)


@contextmanager
def keep_run(
    folder: Path, question: Mapping[str, Any], *, resume: bool = False, every: float = EVERY
) -> Iterator[RunStore]:
    """Keep the run inside on disk while it goes on, or go on with one that was kept.

    :param folder: where; whatever checkpoints it holds are replaced unless ``resume``.
    :param question: what makes the run what it is, in JSON types: everything, and its seed.
    :param resume: go on from the checkpoints that are there; without any the run begins anew.
    :param every: seconds between two checkpoints, at least; 0 writes after every step.
    :returns: the store; its :meth:`RunStore.stop` ends the run after a step.
    :raises ValueError: if the checkpoints are damaged, or of another question.
    """
    asked = json.loads(json.dumps(dict(question)))
    if resume:
        _require_same(folder, asked)
    else:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    store = RunStore(folder, every)
    write_bytes(folder / QUESTION, json.dumps(asked, indent=1).encode())
    token = _STORE.set(store)
    try:
        yield store
    finally:
        _STORE.reset(token)


def keep_result(save: Callable[[Path], object]) -> None:
    """Write a result beside its checkpoints, where a run is kept; before anything is made of it.

    :param save: writes it into a folder.
    """
    store = _STORE.get()
    if store is None:
        return
    scratch, place = store.folder / f".{PARTICLES}.{os.getpid()}", store.folder / PARTICLES
    try:
        save(scratch)
        shutil.rmtree(place, ignore_errors=True)
        scratch.rename(place)
    except Exception as error:  # of a disk, or of a library that writes files
        _warn(f"the particles could not be kept in {str(place)!r} ({error}).")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def asked_before(folder: Path) -> dict[str, Any] | None:
    """Return the question of the run that a folder keeps, None if it keeps none.

    :param folder: where checkpoints are.
    :raises ValueError: if it is damaged.
    """
    place = folder / QUESTION
    if not place.is_file():
        return None
    try:
        found: dict[str, Any] = dict(json.loads(place.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(place) from error
    return found


def write_bytes(place: Path, content: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all, and is on the disk afterwards.

    :param place: the file.
    :param content: what it holds.
    """
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)


_STORE: ContextVar[RunStore | None] = ContextVar("run_store", default=None)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _write(place: Path, content: State) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    write_bytes(place, file.getbuffer())


def _read(place: Path) -> State:
    try:
        content: State = torch.load(place, weights_only=True)
        known = content["format"] == _FORMAT
    except Exception as error:  # what damage raises depends on where it is
        raise _damaged(place) from error
    if not known:
        raise ValueError(
            f"The file {str(place)!r} was written by another version; begin anew without --resume."
        )
    return content


def _clear(folder: Path) -> None:
    for place in folder.glob("run-*"):
        shutil.rmtree(place, ignore_errors=True)
    for place in (*folder.glob("stage-*.pt"), folder / QUESTION):
        place.unlink(missing_ok=True)
    shutil.rmtree(folder / PARTICLES, ignore_errors=True)


def _require_same(folder: Path, asked: Mapping[str, Any]) -> None:
    found = asked_before(folder)
    if found is None:
        return
    before, now = _leaves(found), _leaves(asked)
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ValueError(
                f"The run in {str(folder)!r} began with {key} {before.get(key, 'unknown')}, not "
                f"{now.get(key, 'unknown')}; resume it with that, or begin anew without --resume."
            )


def _leaves(value: Any, name: str = "") -> dict[str, str]:
    """Return what is inside by dotted names, as JSON texts: NaN is not equal to itself."""
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{name}.{key}" if name else key)
    return found


def _damaged(place: Path) -> ValueError:
    return ValueError(
        f"The file {str(place)!r} is damaged or no checkpoint of a run; begin anew without "
        "--resume."
    )


def _accelerators() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
