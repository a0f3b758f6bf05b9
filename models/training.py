"""Train a prior by its recipe, with Lightning.

::

    ppl-diffusion train yeast-promoter --data DIR --out OUT

``OUT`` receives ``prior/`` (the best average of the weights, as safetensors), ``last.ckpt``
(Lightning's own checkpoint, to resume from) and ``run.json`` (what was done). What is minimised is
the bound, unless an objective is named: ``curriculum`` reads soft inputs first
(:class:`~ppl_diffusion.models.objectives.Curriculum`), ``distillation`` makes a trained prior
sample in fewer steps (:mod:`ppl_diffusion.models.distillation`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ppl_diffusion.denoisers.files import SavedNetwork
from ppl_diffusion.models._quiet import quiet_lightning
from ppl_diffusion.models.cards import PRIOR_FOLDER
from ppl_diffusion.models.datasets import Sequences, check_sequences, load_sequences
from ppl_diffusion.models.library import load
from ppl_diffusion.models.program import FAMILIES, DiffusionProgram
from ppl_diffusion.models.recipes import Recipe, find_recipe
from ppl_diffusion.models.run_place import CHECKPOINT as CHECKPOINT
from ppl_diffusion.models.run_place import RUN_FILE as RUN_FILE
from ppl_diffusion.models.run_place import STARTED_FILE, check_place

if TYPE_CHECKING:
    import lightning

    from ppl_diffusion.models.fitting import Fit, KeepBest, KeepGoing

EVERY = 120.0
"""Seconds between two checkpoints, at least; there is one after each validation, too."""
_SEEDS = 2**63  # torch takes no larger seeds
_OF_DATA = ("vocab_size", "num_states", "max_length")


Show = Callable[[int, int], None] | Literal[True] | None
"""Who is told how far training has come: a function, Lightning's own bar, or nobody."""


class TrainingDiverged(RuntimeError):
    """A run whose validation bound was never finite has no weights worth keeping."""


class TrainingStopped(KeyboardInterrupt):
    """A signal ended a run; the text says whether it can be resumed.

    :param text: one sentence.
    :param signal: the number of the signal.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


@dataclass(frozen=True)
class TrainingRun:
    """What a training run left behind.

    :param program: the program at its best validation bound.
    :param valid_bits: that bound, in bits per token, with few times per sequence.
    :param best_step: the optimiser step at which it was reached, of all ``steps``.
    :param notes: what the objective noted at the last step, as what learned noise reached.
    """

    program: DiffusionProgram
    folder: Path
    valid_bits: float
    best_step: int
    steps: int
    notes: Mapping[str, float] = field(default_factory=dict)


def train(
    name: str,
    *,
    out: str | Path,
    data: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    every: float = EVERY,
    quiet: bool = False,
    progress: Callable[[int, int], None] | None = None,
    objective: str | None = None,
    init: str | Path | None = None,
    recipe: Recipe | None = None,
    sequences: Sequences | None = None,
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Train a prior and keep its best averaged weights.

    :param name: a recipe of :data:`ppl_diffusion.models.recipes.RECIPES`, or the name of a new
        prior if ``recipe`` and ``sequences`` are given.
    :param data: the folder that holds ``dna/`` and ``text/``; by default ``PPL_DIFFUSION_DATA``.
    :param seed: of the weights, the batches and the noise.
    :param resume: go on from ``last.ckpt`` in ``out``, with the recipe, ``seed`` and ``init`` that
        the run began with; ``steps`` may be others.
    :param force: whether the run may take the place of another one in ``out``.
    :param every: seconds between two checkpoints, at least; SIGINT and SIGTERM are answered with
        one, after the step that is being made.
    :param progress: called with ``(steps done, steps in all)``, in place of Lightning's bar.
    :param objective: what a step minimises, one of
        :data:`~ppl_diffusion.models.recipes.OBJECTIVES`; that of the recipe if None.
    :param init: the prior to start from, a shipped name or a folder. By default that of the recipe,
        anew if it has none; distillation starts from the shipped prior ``name``. The shape of its
        network stands in place of that of the recipe, also in ``run.json``.
    :param recipe: a recipe of one's own, as ``sequences`` are one's own data.
    :param device: where the network is trained; the program that comes back is on the CPU.
    :raises ValueError: if the name, the number of steps, the objective or ``init`` is wrong, the
        data do not suit the recipe, or the checkpoint is damaged or of another run.
    :raises FileExistsError: if ``out`` holds a run, and neither ``resume`` nor ``force`` is said.
    :raises FileNotFoundError: if the data, or the checkpoint to resume from, are absent.
    :raises ModuleNotFoundError: if Lightning is not installed.
    :raises TrainingDiverged: if the validation bound was never finite.
    :raises TrainingStopped: if a signal ended the run; the text says whether it can be resumed.
    """
    recipe = recipe or find_recipe(name)
    recipe = recipe.with_objective(objective or recipe.objective)
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"train: {steps} steps is not a run; give 1 or more.")
    out = Path(out)
    check_place(out, resume=resume, force=force)
    checkpoint = _checkpoint(out) if resume else None
    sequences = sequences or load_sequences(recipe.dataset, data)
    check_sequences(sequences, recipe)
    if init is None:
        init = name if recipe.objective == "distillation" else recipe.init
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % _SEEDS)
        program = _program(name, recipe, sequences, init)
    if init is not None:
        recipe = dataclasses.replace(recipe, shape=_shape(program))
    origin = _origin(recipe, program, seed=seed, init=init)
    if checkpoint is not None:
        _check_same_run(checkpoint, origin, steps)
    fit = _fitting().Fit(program, sequences, recipe, steps=steps, seed=seed, origin=origin)
    _begin(out, origin, resume=resume)
    show: Show = None if quiet else progress or True
    run = _run(fit, out, checkpoint, torch.device(device), show, every)
    _record(run, recipe, seed=seed, init=init)
    (out / STARTED_FILE).unlink()
    return run


def _program(
    name: str, recipe: Recipe, sequences: Sequences, init: str | Path | None
) -> DiffusionProgram:
    family = FAMILIES[recipe.family]
    if init is None:
        return family.build(
            sequences.vocabulary, sequences.length, name=name, **_law(sequences), **recipe.shape
        )
    prior = load(init)
    program = family.starting_from(prior, **recipe.shape)
    assert isinstance(program.denoiser, SavedNetwork)
    program.denoiser.requires_grad_(True)
    found = (program.family, "".join(program.vocabulary), program.length)
    wanted = (recipe.family, "".join(sequences.vocabulary), sequences.length)
    if found != wanted:
        raise ValueError(
            f"train: the prior {str(init)!r} is {prior.family} over {found[2]} tokens of "
            f"{found[1]!r}, but {name} needs {wanted[0]} over {wanted[2]} of "
            f"{wanted[1]!r}; give another --init."
        )
    program.name = name
    return program


def _law(sequences: Sequences) -> dict[str, Any]:
    """Return what a program is told of its data besides the vocabulary, if there is anything."""
    known: dict[str, Any] = {"lengths": sequences.lengths, "tokeniser": sequences.tokeniser}
    known["classes"] = sequences.classes or None
    return {key: value for key, value in known.items() if value is not None}


def _run(
    fit: Fit,
    out: Path,
    checkpoint: Path | None,
    device: torch.device,
    show: Show,
    every: float,
) -> TrainingRun:
    keeper = _fitting().KeepBest(out / PRIOR_FOLDER)
    going = _fitting().KeepGoing(out / CHECKPOINT, every)
    seeded = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=seeded), quiet_lightning():
        trainer = _trainer(keeper, going, fit, out, device, show)
        _fit(trainer, going, fit, checkpoint)
    if not math.isfinite(keeper.best):
        raise TrainingDiverged(
            f"train: the validation bound was never finite in {trainer.global_step} steps, so no "
            f"prior was written to {str(out)!r}; lower the learning rate, or check the data."
        )
    best = load(out / PRIOR_FOLDER)
    notes = fit.objective.notes()
    return TrainingRun(best, out, keeper.best, keeper.best_step, trainer.global_step, notes)


def _fit(trainer: lightning.Trainer, going: KeepGoing, fit: Fit, checkpoint: Path | None) -> None:
    try:
        with _stopping(going):
            trainer.fit(fit, ckpt_path=checkpoint, weights_only=True)
    except _fitting().SIGTERMException:  # between two epochs, where there is a checkpoint
        raise TrainingStopped(_interruption(fit, checkpoint), signal.SIGTERM) from None
    except SystemExit as error:
        # Lightning turns an interruption into an exit.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        number = going.signal or signal.SIGINT
        raise TrainingStopped(_interruption(fit, checkpoint), number) from None


@contextmanager
def _stopping(going: KeepGoing) -> Iterator[None]:
    """Let signals end a run after a step, and the second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if going.signal is not None:
            raise KeyboardInterrupt
        going.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    finally:  # Lightning leaves the process deaf to the next Ctrl-C
        for number, handler in usual.items():
            signal.signal(number, handler)


def _interruption(fit: Fit, checkpoint: Path | None) -> str:
    if fit.saved or checkpoint is not None:
        return "Training was interrupted; go on with --resume."
    return "Training was interrupted before its first checkpoint: there is nothing to resume."


def _trainer(
    keeper: KeepBest, going: KeepGoing, fit: Fit, out: Path, device: torch.device, show: Show
) -> lightning.Trainer:
    import lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar

    # The average comes after the keeper, which looks while the averaged weights are in place.
    average = _fitting().WeightAverage(fit.recipe.ema_decay)
    last = ModelCheckpoint(dirpath=out, filename="last", save_top_k=1, enable_version_counter=False)
    callbacks: list[Callback] = [keeper, average, going, last]
    if show is not None:
        callbacks.append(RichProgressBar() if show is True else _fitting().Told(show))
    return lightning.Trainer(
        max_steps=fit.steps,
        max_epochs=-1,
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=out,
        enable_progress_bar=show is True,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _shape(program: DiffusionProgram) -> dict[str, Any]:
    """Return a network's shape as a recipe would give it, without what the data decide."""
    assert isinstance(program.denoiser, SavedNetwork)
    entries = dataclasses.asdict(program.denoiser.config)
    return {key: value for key, value in entries.items() if key not in _OF_DATA}


def _origin(
    recipe: Recipe, program: DiffusionProgram, *, seed: int, init: str | Path | None
) -> dict[str, Any]:
    """Return what a resumed run must have in common with its beginning, as JSON reads it."""
    told = dataclasses.asdict(recipe)
    del told["steps"], told["init"]  # what it began with, whoever said so
    entries = {
        "seed": seed,
        "init": None if init is None else str(init),
        "vocabulary": list(program.vocabulary),
        "length": program.length,
        **told,
    }
    origin: dict[str, Any] = json.loads(json.dumps(entries))
    return origin


def _check_same_run(checkpoint: Path, origin: dict[str, Any], steps: int) -> None:
    found, done = _read_checkpoint(checkpoint)
    for key, wanted in origin.items():
        # NaN is not equal to itself, its text is.
        if json.dumps(found.get(key)) != json.dumps(wanted):
            raise ValueError(
                f"train: the run in {str(checkpoint.parent)!r} began with {key} {found.get(key)!r},"
                f" not {wanted!r}; resume it with that, or train without --resume."
            )
    if steps < done:
        raise ValueError(
            f"train: the run in {str(checkpoint.parent)!r} has done {done} steps, more than the "
            f"{steps} asked for; ask for {done} or more, or train without --resume."
        )


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], int]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return json.loads(content["origin"]), int(content["global_step"])
    except Exception as error:  # what damage raises depends on where it is
        raise ValueError(
            f"train: {str(path)!r} is damaged or no checkpoint of a training run; train without "
            "--resume."
        ) from error


def _record(run: TrainingRun, recipe: Recipe, *, seed: int, init: str | Path | None) -> None:
    record = {
        "recipe": dataclasses.asdict(recipe),
        "steps": run.steps,
        "seed": seed,
        "init": None if init is None else str(init),
        "best_step": run.best_step,
        "valid_bits_per_token": run.valid_bits,
        **({"notes": dict(run.notes)} if run.notes else {}),
    }
    text = json.dumps(record, indent=2, sort_keys=True)
    (run.folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def _begin(out: Path, origin: dict[str, Any], *, resume: bool) -> None:
    """Note what a run begins with; the checkpoint of another one must not be gone on from."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        (out / CHECKPOINT).unlink(missing_ok=True)  # a prior stays until there is a better one
    (out / STARTED_FILE).write_text(json.dumps(origin) + "\n", encoding="utf-8")


def _checkpoint(out: Path) -> Path | None:
    """Return what a run goes on from, None if it had begun and written nothing yet."""
    path = out / CHECKPOINT
    if path.is_file():
        return path
    if not (out / STARTED_FILE).is_file():
        raise FileNotFoundError(
            f"There is nothing to resume in {str(out)!r}: {CHECKPOINT} is missing; "
            "train without --resume."
        )
    return None


def _fitting() -> Any:
    try:
        from ppl_diffusion.models import fitting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Training needs Lightning, but {error.name} is not installed; "
            "run `pip install 'ppl-diffusion[train]'`."
        ) from error
    return fitting
