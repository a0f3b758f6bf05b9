"""Train a prior on sequences of one's own.

::

    ppl-diffusion train FILE --alphabet dna --out DIR

``DIR`` receives ``prior/`` (what :func:`~ppl_diffusion.models.load` reads, from ``DIR`` too),
``card.json`` and ``card.md`` (what it is worth on held-out rows), ``plan.json`` (what was decided
before the first step), ``run.json`` and ``last.ckpt`` (to resume from).
"""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.models.own_card import draw, make_card, measure, write_card
from ppl_diffusion.models.own_data import OwnData, Unknown, prepare
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.run_place import PLAN_FILE, check_place, clear, has_begun
from ppl_diffusion.models.sequence_files import Columns, Rows, read_rows
from ppl_diffusion.models.size_rule import (
    MINUTES,
    Asked,
    choose,
    seconds_per_step,
    steps_in,
    with_steps,
)
from ppl_diffusion.models.training import TrainingRun
from ppl_diffusion.models.training import train as train_recipe
from ppl_diffusion.tokenisers import Tokeniser, find_alphabet


@dataclass(frozen=True)
class OwnRun:
    """What a run left behind.

    :param program: the prior at its best validation bound.
    :param card: what it is worth, as in ``card.json``.
    """

    program: DiffusionProgram
    folder: Path
    card: dict[str, Any]


def train(
    source: str | Path | Sequence[str],
    alphabet: str | Path | Tokeniser,
    *,
    out: str | Path | None = None,
    **options: Any,
) -> DiffusionProgram:
    """Train a prior on sequences of one's own and return it, ready for use.

    :param source: a file (FASTA, CSV, TSV, lines or SMILES, packed or not), or sequences.
    :param alphabet: ``dna``, ``rna``, ``protein``, ``smiles``, ``selfies``, ``safe``, ``chars``, a
        file with one token per line, or a tokeniser.
    :param out: folder of the run; without one only the prior is kept.
    :param options: those of :func:`train_own`.
    :raises ValueError: if the file, a sequence or a number cannot be used.
    """
    if out is not None:
        return train_own(source, alphabet, out=out, **options).program
    with tempfile.TemporaryDirectory() as folder:
        return train_own(source, alphabet, out=folder, **options).program


def train_own(
    source: str | Path | Sequence[str],
    alphabet: str | Path | Tokeniser,
    *,
    out: str | Path,
    columns: Columns | None = None,
    labels: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    parts: Sequence[str] | None = None,
    unknown: Unknown = "drop",
    max_length: int | None = None,
    name: str | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    quiet: bool = True,
    device: torch.device | str = "cpu",
    **size: Any,
) -> OwnRun:
    """Train a prior on sequences of one's own and measure it on held-out rows.

    :param columns: which columns of a table to read.
    :param labels: class of each sequence, if they are no file; ``weights`` says how much each
        counts, and ``parts`` which are to ``train``, ``valid`` or ``test``.
    :param unknown: ``drop`` or ``error``: what to do with rows that the alphabet cannot write.
    :param max_length: leave out rows of more tokens.
    :param name: of the prior; that of the file if None.
    :param seed: of the split, the weights, the batches and the noise.
    :param resume: go on with the run in ``out``.
    :param force: throw the run in ``out`` away.
    :param size: ``minutes`` or ``steps``, ``dim``, ``depth``, ``batch_size``, ``learning_rate`` and
        ``dropout`` in place of the rule of :mod:`~ppl_diffusion.models.size_rule`.
    :raises ValueError: if the file, a sequence or a number cannot be used, or a run to resume began
        with other data.
    :raises FileExistsError: if there is a run in ``out`` and neither ``resume`` nor ``force``.
    """
    began, out, asked = time.monotonic(), Path(out), Asked(**size)
    check_place(out, resume=resume, force=force)
    if resume:
        _require_plan(out)
    tokeniser = alphabet if isinstance(alphabet, Tokeniser) else find_alphabet(alphabet)
    rows = _rows(source, columns, labels, weights, parts)
    data = prepare(rows, tokeniser, unknown=unknown, max_length=max_length, seed=seed)
    place = torch.device(device)
    if resume:
        plan = _read_plan(out, data, asked, seed)
    else:
        plan = _plan(out, data, asked, seed, place, spent=time.monotonic() - began)
    recipe = Recipe(**{**plan["recipe"], "shares": tuple(plan["recipe"]["shares"])})
    known: dict[str, Any] = {
        "recipe": recipe,
        "sequences": data.sequences,
        "seed": seed,
        "device": place,
    }
    known |= {"quiet": quiet}
    prior = name or _stem(rows.source)
    # The place was asked for before the plan was written into it, and a run that was killed between
    # the two has nothing else to go on from.
    run = train_recipe(prior, out=out, resume=resume and has_begun(out), force=True, **known)
    said = _said(rows.source, alphabet, columns, unknown, max_length, seed, recipe)
    facts = {**_facts(run, plan), "command": said, "seconds": time.monotonic() - began}
    card = make_card(run.program, data, measure(run.program, data), draw(run.program), facts)
    write_card(out, card)
    return OwnRun(run.program, out, card)


def _rows(
    source: str | Path | Sequence[str],
    columns: Columns | None,
    labels: Sequence[str] | None,
    weights: Sequence[float] | None,
    parts: Sequence[str] | None,
) -> Rows:
    given = {"labels": labels, "weights": weights, "parts": parts}
    if isinstance(source, str | Path):
        said = next((name for name, values in given.items() if values is not None), None)
        if said:
            raise ValueError(f"The {said} of a file are a column of it: name it in columns.")
        return read_rows(source, columns)
    texts = tuple(source)
    for name, values in given.items():
        if values is not None and len(values) != len(texts):
            raise ValueError(
                f"There are {len(texts)} sequences, but {len(values)} {name}; give one for each."
            )
    filled = {name: None if values is None else tuple(values) for name, values in given.items()}
    return Rows(texts, tuple(range(1, len(texts) + 1)), **filled)  # type: ignore[arg-type]


def _plan(
    out: Path, data: OwnData, asked: Asked, seed: int, device: torch.device, *, spent: float
) -> dict[str, Any]:
    """Decide what the run will do, and write it down before the first step."""
    sequences = data.sequences
    recipe, seconds = choose(sequences, asked, classes=len(data.classes)), None
    if asked.steps is None:
        seconds = seconds_per_step(sequences, recipe, device)
        steps = steps_in(asked.minutes or MINUTES, seconds, sequences, recipe, spent=spent)
        recipe = with_steps(recipe, steps, len(sequences.valid))
    # What is quoted of others is none of ours, and JSON knows no NaN.
    told = {key: value for key, value in asdict(recipe).items() if key != "quoted_baseline"}
    plan = {
        "recipe": told,
        "asked": asdict(asked),
        "seed": seed,
        "seconds_per_step": seconds,
        "data": data.digest,
    }
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    scratch = out / f".{PLAN_FILE}"
    scratch.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    scratch.replace(out / PLAN_FILE)
    # As it will be read when the run is resumed.
    known: dict[str, Any] = json.loads(json.dumps(plan))
    return known


def _require_plan(out: Path) -> None:
    if not (out / PLAN_FILE).is_file():
        raise FileNotFoundError(
            f"There is nothing to resume in {str(out)!r}: {PLAN_FILE} is missing; train without "
            "--resume."
        )


def _read_plan(out: Path, data: OwnData, asked: Asked, seed: int) -> dict[str, Any]:
    path = out / PLAN_FILE
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {key: plan[key] for key in ("recipe", "asked", "seed", "data")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The file {str(path)!r} is damaged; train without --resume (with --force)."
        ) from error
    if (found["data"], found["seed"]) != (data.digest, seed):
        what = "seed" if found["data"] == data.digest or found["seed"] != seed else "sequences"
        raise ValueError(
            f"The run in {str(out)!r} began with other {what}; resume it with those, or train "
            "without --resume."
        )
    for key, value in asdict(asked).items():
        if value is not None and value != found["asked"][key]:
            raise ValueError(
                f"The run in {str(out)!r} began with {key} {found['asked'][key]}, not {value}; "
                "leave it out to resume, or train without --resume."
            )
    return plan


def _facts(run: TrainingRun, plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "best_step": run.best_step,
        "seed": plan["seed"],
        "seconds_per_step": plan["seconds_per_step"],
        "recipe": plan["recipe"],
    }


def _said(
    source: str,
    alphabet: str | Path | Tokeniser,
    columns: Columns | None,
    unknown: str,
    max_length: int | None,
    seed: int,
    recipe: Recipe,
) -> str:
    """Return the command that leads to the same bytes."""
    shape, name = recipe.shape, getattr(alphabet, "name", alphabet)
    words = ["ppl-diffusion", "train", source, "--alphabet", str(name)]
    words += [word for pair in (columns or Columns()).named.items() for word in pair]
    words += ["--unknown", unknown] if unknown != "drop" else []
    words += ["--max-length", str(max_length)] if max_length else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--steps", str(recipe.steps), "--dim", str(shape["dim"])]
    words += ["--depth", str(shape["depth"]), "--batch-size", str(recipe.batch_size)]
    words += ["--learning-rate", repr(recipe.learning_rate), "--dropout", str(shape["dropout"])]
    return shlex.join([*words, "--out", "DIR"])


def _stem(source: str) -> str:
    return source.split(".")[0] if "." in source else "own"
