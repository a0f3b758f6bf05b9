"""What a run on sequences of one's own has decided before its first step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.models.own_data import OwnData
from ppl_diffusion.models.run_place import PLAN_FILE, clear
from ppl_diffusion.models.size_rule import (
    MINUTES,
    Asked,
    choose,
    seconds_per_step,
    steps_in,
    with_steps,
)


def make_plan(
    out: Path, data: OwnData, asked: Asked, seed: int, device: torch.device, *, spent: float
) -> dict[str, Any]:
    """Decide what a run will do, and write it down; an earlier run in ``out`` is gone then.

    :param spent: seconds of the minutes that are gone.
    """
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


def require_plan(out: Path) -> None:
    """:raises FileNotFoundError: if there is no run that can be gone on with."""
    if not (out / PLAN_FILE).is_file():
        raise FileNotFoundError(
            f"There is nothing to resume in {str(out)!r}: {PLAN_FILE} is missing; train without "
            "--resume."
        )


def read_plan(out: Path, data: OwnData, asked: Asked, seed: int) -> dict[str, Any]:
    """Return what a run has decided.

    :raises ValueError: if it is damaged, or the run began with other data or options.
    """
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
