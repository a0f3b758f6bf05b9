"""Run folders as contenders of a comparison."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_diffusion.designs.alphabet import Alphabet
from ppl_diffusion.designs.reward_spec import COLUMNS
from ppl_diffusion.diagnostics.comparison import UNKNOWN, Contender
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.jobs.folder import MARKER
from ppl_diffusion.jobs.options import usual
from ppl_diffusion.jobs.search import Search

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior

PARTICLES = "particles"


def read_contenders(folders: Sequence[Path]) -> list[Contender]:
    """Read folders written by ``design``, or by ``ParticlePosterior.save``, to be compared.

    :returns: one contender per folder, called by its last name where that is unambiguous.
    :raises InputError: if there are fewer than two, one is given twice, holds no run, is damaged,
        or holds the same particles as another.
    """
    if len(folders) < 2:
        raise InputError("One run has nothing to be compared with: give two or more run folders.")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"The run folder {str(folder)!r} is given twice: give each once.")
    names = [place.name for place in places]
    labels = [n if names.count(n) == 1 else str(f) for n, f in zip(names, folders, strict=True)]
    contenders = list(map(_read, folders, labels))
    _require_different(contenders)
    return contenders


def load_particles(folder: Path) -> ParticlePosterior:
    """Load the particles of such a folder.

    :raises InputError: if it holds none.
    """
    from ppl_diffusion.smc import ParticlePosterior

    if not folder.is_dir():
        raise InputError(f"There is no run folder {str(folder)!r}: give one written by design.")
    inner = folder / PARTICLES
    with user_input():
        posterior = ParticlePosterior.load(inner if inner.is_dir() else folder)
    _check_entries(folder, posterior)
    return posterior


def _check_entries(folder: Path, posterior: ParticlePosterior) -> None:
    """Refuse entries of another type than :meth:`ParticlePosterior.save` writes."""
    for name in ("num_evaluations", "num_potential_calls"):
        value = getattr(posterior, name)
        if type(value) is not int or value < 0:
            raise _damaged(folder, f"{name} is {value!r}, no count")
    for name in ("exact", "has_evidence"):
        said = getattr(posterior.law, name)
        if type(said) is not bool:
            raise _damaged(folder, f"{name} of its law is {said!r}, neither true nor false")
    if type(posterior.seconds) not in (int, float):
        raise _damaged(folder, f"seconds is {posterior.seconds!r}, no number")
    if not isinstance(posterior.settings, dict):
        raise _damaged(folder, "settings is no object")


def _damaged(folder: Path, problem: str) -> InputError:
    return InputError(
        f"The run folder {str(folder)!r} is damaged ({problem}): write it again with design."
    )


def _read(folder: Path, label: str) -> Contender:
    posterior = load_particles(folder)
    if not (folder / MARKER).is_file():
        seconds = posterior.seconds if math.isfinite(posterior.seconds) else None
        method = str(posterior.settings.get("method", "smc"))
        asked = {"prior": UNKNOWN, "question": UNKNOWN}
        return Contender(label, posterior, method=method, asked=asked, seconds=seconds)
    try:
        summary = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        settings = summary["settings"]
        if "operator" in summary:
            raise InputError(
                f"The folder {str(folder)!r} holds a restoration, and designs are compared: "
                "`benchmarks.restore` compares ways of restoring."
            )
        return Contender(
            label,
            posterior,
            method=_method(settings["search"]),
            # The law knows potentials by name; the question has digests of their numbers.
            asked={
                "prior": settings["prior_digest"],
                "question": json.dumps(settings["question"], sort_keys=True),
            },
            scores=_scores(folder, posterior),
            seconds=None if summary["seconds"] is None else float(summary["seconds"]),
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def _method(search: Mapping[str, Any]) -> str:
    """Name a method with the options that are not what it does anyway."""
    method: str = search["method"]
    known = usual(method, search.get("inner"))
    numbers = {field.name for field in fields(Search)} | {"twist", "fills"}
    own = {name: value for name, value in search.items() if name not in numbers}
    unusual = [f"{name} {value}" for name, value in own.items() if known.get(name) != value]
    return ", ".join([method, *unusual])


def _scores(folder: Path, posterior: ParticlePosterior) -> dict[str, NDArray[np.float64]]:
    """Return what ``designs.csv`` says about each particle; NaN for those of weight zero."""
    with (folder / "designs.csv").open(encoding="utf-8", newline="") as file:
        table = {row["sequence"]: row for row in csv.DictReader(file)}
    if not table:
        raise ValueError("designs.csv holds no designs")
    first = next(iter(table.values()))
    no_scores = {*COLUMNS} - {"log_prob_bound", "gc"}
    names = [name for name in first if name not in no_scores and not name.endswith("_sd")]
    sequences = _alphabet(folder).decode(posterior.x0.reshape(-1, posterior.x0.shape[-1]))
    nothing = dict.fromkeys(names, "nan")
    rows = [table.get(sequence, nothing) for sequence in sequences]
    shape = tuple(posterior.log_weights.shape)
    return {name: np.array([float(row[name]) for row in rows]).reshape(shape) for name in names}


def _alphabet(folder: Path) -> Alphabet:
    """Return how the tokens of a run are written, as its folder says."""
    entries = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("alphabet")
    return Alphabet(tuple("ACGT")) if entries is None else Alphabet.read(entries)


def _require_different(contenders: Sequence[Contender]) -> None:
    for one, other in combinations(contenders, 2):
        first, second = one.posterior, other.posterior
        alike = torch.equal(first.log_weights, second.log_weights)
        if alike and torch.equal(first.x0, second.x0):
            raise InputError(
                f"The runs {one.label!r} and {other.label!r} hold the same particles, so that they "
                "would only seem to agree: give one of them."
            )
