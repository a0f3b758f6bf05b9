"""Restoring measured images: anchored posterior sampling, its exact form, and its rivals.

All methods have the same prior over tokens, the same codec and the same measurements of held-out
images: ``y = A(u) + sigma n``. "PSNR" is that of the mean of a method's draws, which is what a
squared error asks for, and "one" that of each of them on average; tables compare both with the
published settings, a mean with the mean of as many restorations, one with one. Standard errors of
differences are those of pairs, image by image, as images differ far more than methods do. Intervals
are those of the draws; those of an optimiser differ by luck.

Cases go image by image through all tasks, and with ``--kept FILE`` each is written down when it is
done: a run that is stopped (Ctrl-C) shows what it has, and the same command goes on from there, as
does one that asks for more methods. ``benchmarks/restore.jsonl`` holds the cases that were done so
far; ``--kept benchmarks/restore.jsonl --only-kept`` shows them.

Methods that end in ``+error`` count what the codec cannot express as a part of the model
(:mod:`ppl_diffusion.imaging.codec_error`); for all others decoded tokens are images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks._report import JsonFile, Quick, Row, console, in_a_folder, table, verdict, write
from benchmarks._restore_methods import Problem, Restorer, restorers
from benchmarks._restore_scores import Scores, mean_of, paired, score, wins
from ppl_diffusion import models
from ppl_diffusion.imaging.measurement import measure
from ppl_diffusion.imaging.operators import make_operator
from ppl_diffusion.models.image_data import load_images

TASKS = ("sr4", "gblur", "mblur", "rinp", "box", "hdr", "nlblur")
NOISES = (0.05, 0.2)
PUBLISHED, EXACT = "aps-published", "aps-smc+error"
OURS = ("aps", "aps-100", "aps+error", "aps-published+error", "aps-smc+error")
EQUAL = "aps-equal"
"""On demand: as many restorations as the gradients of a published one are enough for."""
RIVALS = tuple(
    f"{name}+error"
    for name in ("g2d2-star", "g2d2-markov", "split-gibbs", "d-cbg", "relaxed-dps", "svdd-pm")
)
"""In their stronger form: what is compared is a method, not who knows the codec better."""
REFERENCES = ("prior", "pseudo-inverse", "codec-ceiling")
METHODS = (PUBLISHED, *OURS, *RIVALS, *REFERENCES)
SMOKE_METHODS = (PUBLISHED, "aps", "aps-smc+error", "svdd-pm", "pseudo-inverse", "codec-ceiling")
"""What a test runs."""

GAIN, LOST_TASKS, COVERAGE = 1.0, 2, (0.85, 0.95)
"""Goals: decibels over the published settings, tasks that a rival may win, share of pixels."""

ONE, MEAN = "sample_psnr", "psnr"
COMPARED: Mapping[str, tuple[str, str, Sequence[str], float | None]] = {
    "one_published_minus_best": (ONE, MEAN, OURS, -GAIN),
    "one_published_minus_equal_cost": (ONE, MEAN, (EQUAL,), None),
    "one_published_minus_one": (ONE, ONE, OURS, None),
    "mean_published_minus_best": (MEAN, MEAN, OURS, None),
}
"""What is published, what of ours, by which methods, and the goal. What is published is one
restoration, and what one has of ours is the mean of several; the others compare at equal cost, and
like with like."""


@dataclass(frozen=True)
class Plan:
    """What is restored, and how long methods take.

    :param dataset: of which test images are taken, spread over all of them.
    :param num_images: of each task at each noise.
    :param num_steps: steps ``T`` of chains.
    :param num_iterations: inner iterations ``J``.
    :param num_samples: draws of methods that nothing weighs.
    :param num_particles: particles of those that are weighed.
    """

    dataset: str = "digits"
    tasks: Sequence[str] = TASKS
    noises: Sequence[float] = NOISES
    methods: Sequence[str] = METHODS
    num_images: int = 64
    num_steps: int = 8
    num_iterations: int = 30
    num_samples: int = 8
    num_particles: int = 32


FULL = Plan()
QUICK = Plan(tasks=("sr4", "hdr"), noises=(0.05,), num_images=8, num_steps=4, num_iterations=10)
SMOKE = replace(QUICK, methods=SMOKE_METHODS, num_samples=4, num_particles=8)


@dataclass(frozen=True)
class Case:
    """One image, measured once."""

    task: str
    noise: float
    image: int


@cache
def _parts(dataset: str, data: str | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    names = set(models.names())
    uniform = f"{dataset}-uniform"
    classifier = f"{dataset}-classifier"
    known = classifier in models.list_classifiers()
    return {
        "prior": models.load(dataset),
        "uniform": models.load(uniform) if uniform in names else None,
        "codec": models.load_codec(f"{dataset}-codec"),
        "network": models.load_classifier(classifier if known else "digits-classifier"),
        "test": load_images(dataset, data).test,
    }


@cache
def _restorers(plan: Plan) -> Mapping[str, Restorer]:
    error = models.load_codec_error(f"{plan.dataset}-codec")
    sizes = (plan.num_samples, plan.num_steps, plan.num_iterations, plan.num_particles)
    return restorers(*sizes, error)


def restore_case(plan: Plan, data: str | None, case: Case) -> dict[str, Scores]:
    """Return the figures of every method on one measured image.

    :param data: the data folder, of sets that come with no package.
    """
    parts = _parts(plan.dataset, data)
    test = parts["test"]
    # Spread over the set, which need not be in random order.
    truth = test[case.image * (len(test) // plan.num_images)]
    operator = make_operator(case.task, tuple(truth.shape), seed=case.image)
    measurement = measure(operator, truth, case.noise, seed=case.image)
    problem = Problem(parts["prior"], parts["uniform"], parts["codec"], measurement, truth)
    found = {}
    for name in plan.methods:
        restored = _restorers(plan)[name](problem, case.image)
        found[name] = score(restored, truth, measurement, parts["network"])
    return found


def measure_all(
    plan: Plan,
    data: str | None = None,
    workers: int = 1,
    kept: Path | None = None,
    *,
    go_on: bool = True,
) -> Found:
    """Return all figures by task and noise, then method, one for each image.

    :param data: the data folder, of sets that come with no package.
    :param workers: processes side by side.
    :param kept: a file of finished cases, which is read first and added to.
    :param go_on: restore what is missing there.
    :raises ValueError: if it was written for another plan.
    """
    done = {} if kept is None else _read(kept, plan)
    every = product(range(plan.num_images), plan.noises, plan.tasks)
    cases = [Case(task, noise, image) for image, noise, task in every]
    missing = {
        case: tuple(name for name in plan.methods if name not in done.get(case, {}))
        for case in cases
    }
    left = [(case, names) for case, names in missing.items() if names and go_on]
    try:
        for (case, _), scores in zip(left, _mapped(plan, data, left, workers), strict=True):
            done[case] = {**done.get(case, {}), **scores}
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    # On a line of its own, whatever the one before it ended with.
                    print("\n" + json.dumps([_key(plan, case), _plain(scores)]), file=file)
    except KeyboardInterrupt:
        seen = sum(all(name in done.get(case, {}) for name in plan.methods) for case in cases)
        Console(stderr=True).print(f"stopped after {seen} of {len(cases)} cases")
    found: Found = {(task, noise): {} for task in plan.tasks for noise in plan.noises}
    # Methods are compared on the same images: those that all of them have seen.
    for case in cases:
        if all(name in done.get(case, {}) for name in plan.methods):
            for name in plan.methods:
                found[case.task, case.noise].setdefault(name, []).append(done[case][name])
    return {where: by_method for where, by_method in found.items() if by_method}


def _key(plan: Plan, case: Case) -> dict[str, Any]:
    own = {k: v for k, v in asdict(plan).items() if k not in ("tasks", "noises", "methods")}
    return {**own, **asdict(case)}


def _plain(scores: Mapping[str, Scores]) -> dict[str, Any]:
    # Shorter than a file of all digits, and nobody reads more of them.
    return {
        name: {k: float(f"{v:.6g}") for k, v in asdict(value).items()}
        for name, value in scores.items()
    }


def _read(kept: Path, plan: Plan) -> dict[Case, dict[str, Scores]]:
    done: dict[Case, dict[str, Scores]] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []:
        try:
            key, scores = json.loads(line)
        except ValueError:
            continue  # cut off while it was written: the case is done again
        case = Case(key["task"], key["noise"], key["image"])
        if key != _key(plan, case):
            raise ValueError(f"{kept} holds cases of another plan; give another file.")
        read = {name: Scores(**figures) for name, figures in scores.items()}
        done[case] = {**done.get(case, {}), **read}
    return done


Found = dict[tuple[str, float], dict[str, list[Scores]]]


def _mapped(
    plan: Plan, data: str | None, cases: Sequence[tuple[Case, tuple[str, ...]]], workers: int
) -> Iterator[dict[str, Scores]]:
    work = partial(_restore, plan, data)
    described = {"description": "images", "transient": True, "console": Console(stderr=True)}
    if workers == 1:
        yield from track(map(work, cases), total=len(cases), **described)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from track(pool.map(work, cases), total=len(cases), **described)


def _restore(
    plan: Plan, data: str | None, asked: tuple[Case, tuple[str, ...]]
) -> dict[str, Scores]:
    case, names = asked
    return restore_case(replace(plan, methods=names), data, case)


def rows_of(found: Found) -> Iterator[Row]:
    """Return a row for each task, noise and method: PSNR, with all else as coordinates."""
    for (task, noise), by_method in found.items():
        for name, scores in by_method.items():
            means = mean_of(scores)
            coordinates: dict[str, Any] = {"task": task, "noise": noise, "method": name, **means}
            _, coordinates["psnr_se"] = paired([s.psnr for s in scores], [0.0] * len(scores))
            if PUBLISHED in by_method:
                for kind, field in (("one", ONE), ("mean", MEAN)):
                    values = [getattr(s, field) for s in scores]
                    against = [getattr(s, field) for s in by_method[PUBLISHED]]
                    gain, error = paired(values, against)
                    coordinates |= {f"{kind}_gain": gain, f"{kind}_gain_se": error}
            yield Row("restore", means["psnr"], "dB", len(scores), coordinates=coordinates)


def goals_of(found: Found) -> Iterator[Row]:
    """Return the goals that these figures can decide."""
    first = next(iter(found))
    by_method = found[first]
    n = len(by_method[PUBLISHED])
    where = {"task": first[0], "noise": first[1]}
    for name, (theirs, field, candidates, goal) in COMPARED.items():
        known = [each for each in candidates if each in by_method]
        if known:
            best = max(known, key=lambda each: mean_of(by_method[each])[field])
            lost, error = paired(
                [getattr(s, theirs) for s in by_method[PUBLISHED]],
                [getattr(s, field) for s in by_method[best]],
            )
            own: dict[str, Any] = {**where, "method": best, "se": error}
            yield Row(name, lost, "dB", n, goal=goal, coordinates=own)
    if EXACT in by_method:
        means = mean_of(by_method[EXACT])
        middle = sum(COVERAGE) / 2
        half = (COVERAGE[1] - COVERAGE[0]) / 2
        gap = abs(means["coverage"] - middle)
        own = {**where, "method": EXACT, "coverage": means["coverage"]}
        yield Row("coverage_from_middle", gap, "share", n, goal=half, coordinates=own)
    at_first = {task: by for (task, noise), by in found.items() if noise == first[1]}
    if len(at_first) < len(TASKS):
        return
    values = {
        task: {name: mean_of(scores)["psnr"] for name, scores in by.items()}
        for task, by in at_first.items()
    }
    ours = [name for name in OURS if name in by_method]
    for rival in RIVALS:
        if all(rival in by for by in values.values()):
            champion = max(ours, key=lambda name: wins(values, name, rival))
            lost = len(values) - wins(values, champion, rival)
            own = {"rival": rival, "method": champion, "noise": first[1]}
            yield Row("tasks_lost", lost, "tasks", n, goal=LOST_TASKS, coordinates=own)


def show(found: Found, screen: Console) -> None:
    """Print a table for each task and noise."""
    columns = ["method", "PSNR", "over published", "one", "over published", "SSIM", "perc."]
    columns += ["resid.", "cover", "CRPS", "denoiser", "decoder", "backward", "s"]
    for (task, noise), by_method in found.items():
        n = len(next(iter(by_method.values())))
        made = table(
            f"{task}, noise {noise:g}, {n} images",
            columns,
            "PSNR in dB of the mean of the draws, and of one of them, with what they gain over the "
            "published settings and one standard error of pairs",
        )
        for row in rows_of({(task, noise): by_method}):
            c = row.coordinates
            made.add_row(
                c["method"],
                f"{c['psnr']:.2f}",
                _with_error(c, "mean_gain"),
                f"{c['sample_psnr']:.2f}",
                _with_error(c, "one_gain"),
                f"{c['ssim']:.3f}",
                f"{c['perceptual']:.3f}",
                f"{c['residual']:.2f}",
                f"{c['coverage']:.3f}",
                f"{c['crps']:.4f}",
                f"{c['denoiser_rows']:.0f}",
                f"{c['decoder_forward']:.0f}",
                f"{c['decoder_backward']:.0f}",
                f"{c['seconds']:.2f}",
            )
        screen.print(made)


def _with_error(coordinates: Mapping[str, Any], name: str) -> str:
    if name not in coordinates:
        return ""
    return f"{coordinates[name]:+.2f} ± {coordinates[name + '_se']:.2f}"


def show_goals(goals: Iterable[Row], screen: Console) -> None:
    """Print what was asked for, and whether it is met."""
    made = table("Goals", ["what", "value", "of", "verdict"])
    for row in goals:
        of = ", ".join(f"{k} {v}" for k, v in row.coordinates.items() if isinstance(v, str))
        error = row.coordinates.get("se", math.nan)
        value = f"{row.value:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")
        made.add_row(row.name, value, of, verdict(row))
    screen.print(made)


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    dataset: Annotated[str, typer.Option(help="digits, mnist, faces.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Data folder, of sets but digits.")] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Images of each task.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks.")] = None,
    noise: Annotated[list[float] | None, typer.Option(help="Only these levels.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    kept: Annotated[
        Path | None,
        typer.Option(callback=in_a_folder, help="File of finished cases, to go on."),
    ] = None,
    only_kept: Annotated[
        bool, typer.Option("--only-kept", help="Show what is kept, and restore nothing.")
    ] = False,
) -> None:
    """Restore measured images by every method."""
    plan = replace(QUICK if quick else FULL, dataset=dataset)
    asked = {"num_images": images, "tasks": task, "noises": noise, "methods": method}
    plan = replace(
        plan, **{k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v}
    )
    screen = console(160)
    try:
        folder = None if data is None else str(data)
        found = measure_all(plan, folder, workers, kept, go_on=not only_kept)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if not found:
        screen.print(
            f"No case of {', '.join(plan.tasks)} has been restored by all of "
            f"{', '.join(plan.methods)}: choose among them (--method), or go on without "
            "--only-kept."
        )
        return
    show(found, screen)
    goals = list(goals_of(found)) if PUBLISHED in plan.methods else []
    show_goals(goals, screen)
    write([*rows_of(found), *goals], json_file)


if __name__ == "__main__":
    typer.run(main)
