"""Train a prior on sequences of one's own.

::

    ppl-diffusion train FILE --alphabet dna --out DIR

``DIR`` receives ``prior/`` (what :func:`~ppl_diffusion.models.load` reads, from ``DIR`` too),
``card.json`` and ``card.md`` (what it is worth on held-out rows), ``plan.json`` (what was decided
before the first step), ``run.json`` and ``last.ckpt`` (to resume from).
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.models.own_card import draw, make_card, measure, write_card
from ppl_diffusion.models.own_data import OwnData, Unknown, prepare
from ppl_diffusion.models.own_plan import make_plan, read_plan, require_plan
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.models.recipes import Recipe
from ppl_diffusion.models.run_place import check_place, has_begun
from ppl_diffusion.models.sequence_files import Columns, Rows, read_rows
from ppl_diffusion.models.size_rule import Asked
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
    progress: Callable[[int, int], None] | None = None,
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
    :param progress: called with ``(steps done, steps in all)``, in place of a bar.
    :param size: ``minutes`` or ``steps``, ``dim``, ``depth``, ``batch_size``, ``learning_rate`` and
        ``dropout`` in place of the rule of :mod:`~ppl_diffusion.models.size_rule`.
    :raises ValueError: if the file, a sequence or a number cannot be used, or a run to resume began
        with other data.
    :raises FileExistsError: if there is a run in ``out`` and neither ``resume`` nor ``force``.
    """
    began, out, asked = time.monotonic(), Path(out), Asked(**size)
    check_place(out, resume=resume, force=force)
    if resume:
        require_plan(out)
    tokeniser = alphabet if isinstance(alphabet, Tokeniser) else find_alphabet(alphabet)
    rows = _rows(source, columns, labels, weights, parts)
    data = prepare(rows, tokeniser, unknown=unknown, max_length=max_length, seed=seed)
    place, spent = torch.device(device), time.monotonic() - began
    if resume:
        plan = read_plan(out, data, asked, seed)
    else:
        plan = make_plan(out, data, asked, seed, place, spent=spent)
    shown = {"quiet": quiet, "progress": progress, "device": place}
    run = _followed(plan, data, name or _stem(rows.source), out, resume, **shown)
    said = _said(rows.source, alphabet, columns, unknown, max_length, seed, plan)
    facts = {**_facts(run, plan), "command": said, "seconds": time.monotonic() - began}
    card = make_card(run.program, data, measure(run.program, data), draw(run.program), facts)
    write_card(out, card)
    return OwnRun(run.program, out, card)


def _followed(
    plan: dict[str, Any],
    data: OwnData,
    name: str,
    out: Path,
    resume: bool,
    **shown: Any,
) -> TrainingRun:
    return train_recipe(
        name,
        out=out,
        recipe=Recipe(**{**plan["recipe"], "shares": tuple(plan["recipe"]["shares"])}),
        sequences=data.sequences,
        seed=plan["seed"],
        # A run that was killed behind its plan has nothing else to go on from.
        resume=resume and has_begun(out),
        force=True,  # the place was asked for before the plan was written into it
        **shown,
    )


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
    plan: dict[str, Any],
) -> str:
    """Return the command that leads to the same bytes."""
    recipe, name = plan["recipe"], getattr(alphabet, "name", alphabet)
    shape = recipe["shape"]
    words = ["ppl-diffusion", "train", source, "--alphabet", str(name)]
    words += [word for pair in (columns or Columns()).named.items() for word in pair]
    words += ["--unknown", unknown] if unknown != "drop" else []
    words += ["--max-length", str(max_length)] if max_length else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--steps", str(recipe["steps"]), "--dim", str(shape["dim"])]
    words += ["--depth", str(shape["depth"]), "--batch-size", str(recipe["batch_size"])]
    words += ["--learning-rate", repr(recipe["learning_rate"]), "--dropout", str(shape["dropout"])]
    return shlex.join([*words, "--out", "DIR"])


def _stem(source: str) -> str:
    return source.split(".")[0] if "." in source else "own"
