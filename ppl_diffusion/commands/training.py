"""The body of the command ``train``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppl_diffusion.commands.complain import NoAnswer, Stopped
from ppl_diffusion.commands.progress import told_in_logs
from ppl_diffusion.commands.tables import table
from ppl_diffusion.jobs.checks import (
    InputError,
    JobStopped,
    at_least,
    one_of,
    usable_device,
    user_input,
)
from ppl_diffusion.jobs.writing import json_text

if TYPE_CHECKING:
    from ppl_diffusion.models.sequence_files import Columns

UNKNOWN = ("drop", "error")


def train_prior(name: str, *, out: Path, quiet: bool, as_json: bool = False, **asked: Any) -> None:
    """Train a prior, or a codec or classifier of images, by its recipe.

    :param as_json: print what was done as one JSON object instead of tables.
    :raises InputError: if a name, a number, the data or the place is wrong.
    :raises NoAnswer: if the run diverged.
    :raises Stopped: if Ctrl-C ended it.
    """
    from ppl_diffusion.models.image_recipes import IMAGE_RECIPES
    from ppl_diffusion.models.run_place import RUN_FILE, check_place
    from ppl_diffusion.models.training import train

    at_least("steps", 1 if asked["steps"] is None else asked["steps"], 1)
    at_least("seed", asked["seed"], 0)
    asked["device"] = usable_device(asked["device"])
    asked["resume"] = asked["resume"] and not _is_new(out)
    with user_input():
        check_place(out, resume=asked["resume"], force=asked["force"])
    if name in IMAGE_RECIPES:
        return _train_images(name, out=out, quiet=quiet, as_json=as_json, **asked)
    with _told(out), told_in_logs(f"train {name}", quiet=quiet) as progress:
        run = train(name, out=out, quiet=quiet, progress=progress, **asked)
    if as_json:
        print((run.folder / RUN_FILE).read_text(encoding="utf-8"), end="")
    elif not quiet:
        bound = ["best validation bound (bits per token, <=)", run.valid_bits]
        rows = [bound, ["at step", run.best_step], ["of steps", run.steps]]
        rows += [[key.replace("_", " "), value] for key, value in run.notes.items()]
        table(f"Trained {name}", ["quantity", "value"], rows)
        print(f"wrote {run.folder}")


def _train_images(name: str, *, out: Path, quiet: bool, as_json: bool, **asked: Any) -> None:
    from ppl_diffusion.models.image_training import CHECKPOINT, train_images
    from ppl_diffusion.models.run_place import RUN_FILE
    from ppl_diffusion.models.training import TrainingDiverged

    asked.pop("force")
    for option in ("objective", "init"):
        if asked.pop(option) is not None:
            raise InputError(f"{name} is no prior and has no --{option}: leave it out.")
    try:
        with user_input():
            run = train_images(name, out=out, quiet=quiet, **asked)
    except TrainingDiverged as error:
        raise NoAnswer(str(error)) from error
    except KeyboardInterrupt as error:
        kept = (out / CHECKPOINT).is_file()
        text = "go on with --resume." if kept else f"nothing was written to {str(out)!r}."
        raise Stopped(f"Stopped: {text}") from error
    if as_json:
        print((run.folder / RUN_FILE).read_text(encoding="utf-8"), end="")
    elif not quiet:
        score = [f"best on validation images ({run.score_name})", run.score]
        rows = [score, ["at step", run.best_step], ["of steps", run.steps]]
        table(f"Trained {name}", ["quantity", "value"], rows)
        print(f"wrote {run.folder}")


def _is_new(out: Path) -> bool:
    """Whether a run has not begun: a script may ask to go on with it all the same."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def require_recipe(name: str) -> None:
    """:raises InputError: if there is neither a recipe nor a file of that name."""
    from ppl_diffusion.models.image_recipes import IMAGE_RECIPES
    from ppl_diffusion.models.recipes import RECIPES

    if name not in RECIPES and name not in IMAGE_RECIPES:
        kind = "a folder" if Path(name).is_dir() else "no file"
        raise InputError(
            f"{name!r} is {kind} and no recipe: give a file of sequences, or one of "
            f"{', '.join([*RECIPES, *IMAGE_RECIPES])}."
        )


def refuse(options: Mapping[str, object], where: str) -> None:
    """:raises InputError: if an option was given that means nothing there."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"The option --{name.replace('_', '-')} is not for {where}: leave it out."
            )


def train_file(
    source: Path,
    *,
    alphabet: str | None,
    columns: Columns,
    out: Path,
    quiet: bool,
    seed: int,
    device: str,
    as_json: bool = False,
    **asked: Any,
) -> None:
    """Train a prior on the sequences of a file, print what it is worth, and write its card.

    :param as_json: print the card as one JSON object instead of tables.
    :raises InputError: if the file, the alphabet, a number or the place is wrong.
    :raises NoAnswer: if the run diverged.
    :raises Stopped: if Ctrl-C ended it.
    """
    from ppl_diffusion.models.own_training import train_own

    at_least("seed", seed, 0)
    one_of("policy for unknown letters", asked["unknown"], UNKNOWN)
    if alphabet is None:
        raise InputError(
            f"What {source.name!r} is written in must be said: give --alphabet dna, rna, protein, "
            "smiles, selfies, safe, chars, or a file with one token per line."
        )
    place = usable_device(device)
    asked["resume"] = asked["resume"] and not _is_new(out)
    with _told(out), told_in_logs(f"train {source.name}", quiet=quiet) as progress:
        run = train_own(
            source,
            alphabet,
            columns=columns,
            out=out,
            quiet=quiet,
            progress=progress,
            seed=seed,
            device=place,
            **asked,
        )
    if as_json:
        print(json_text(run.card), end="")
    elif not quiet:
        _print_card(run.card)
        print(f"wrote {run.folder}")


def _print_card(card: dict[str, Any]) -> None:
    data, metrics, samples = card["data"], card["metrics"], card["samples"]
    for cause, number in data["dropped"].items():
        print(f"left out, {cause}: {number} rows. The first: {data['first_dropped'][cause]}")
    sizes = ", ".join(f"{number} {part}" for part, number in data["sizes"].items())
    print(f"{data['rows']} rows: {sizes}; {data['split']}")
    bound = f"<= {metrics['bound']:.3f} +- {metrics['bound_error']:.3f}"
    gain = f"{metrics['gain']:+.3f} +- {metrics['gain_error']:.3f}"
    orders = [[f"Markov chain of order {k}", bits] for k, bits in enumerate(metrics["markov"])]
    best = f"gain over order {metrics['best_order']}, the best on validation rows"
    rows = [["bound of the prior", bound], *orders, [best, gain]]
    table(f"{card['name']}: held-out rows", ["quantity", "bits per sequence"], rows)
    print("samples: " + "  ".join(samples["shown"]))
    print(
        f"{samples['in_train']:.1%} of {samples['number']} samples are training rows; of the best "
        f"chain {samples['expected_in_train']:.1%} would be."
    )


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Tell what ends a run in one sentence."""
    from ppl_diffusion.models.training import TrainingDiverged, TrainingStopped

    try:
        with user_input():
            yield
    except TrainingDiverged as error:
        raise NoAnswer(str(error)) from error
    except TrainingStopped as error:
        raise JobStopped(str(error), 128 + error.signal) from error
    except KeyboardInterrupt as error:
        raise Stopped(str(error) or f"Stopped: nothing was written to {str(out)!r}.") from error
