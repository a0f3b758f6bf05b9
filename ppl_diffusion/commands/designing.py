"""The body of the command ``design``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ppl_diffusion.commands.complain import OK, complain, note
from ppl_diffusion.commands.progress import progress_bar
from ppl_diffusion.commands.tables import design_tables
from ppl_diffusion.designs.brief import SUFFIX, job_of
from ppl_diffusion.designs.flags import Asked
from ppl_diffusion.designs.question import Job
from ppl_diffusion.designs.spread import PLACES, Spread
from ppl_diffusion.jobs.backends import NUMPYRO, is_jax
from ppl_diffusion.jobs.checks import InputError, at_least, one_of
from ppl_diffusion.jobs.folder import MARKER, check_target, is_finished
from ppl_diffusion.jobs.keeping import EVERY, kept_job
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.jobs.writing import json_text


@dataclass(frozen=True)
class Options:
    """Where a run goes, and what is said on the way.

    :param out: the run folder, ``runs/NAME`` if None.
    :param replace: an earlier run in it.
    :param resume: go on with a run that was interrupted; one that is finished stays as it is.
    :param every: seconds between two checkpoints, at least.
    :param quiet: print errors only.
    :param workers: processes that runs are spread over; None for all in this one.
    :param executor: what they are processes of.
    :param as_json: print the summary as one JSON object instead of tables.
    """

    out: Path | None
    replace: bool = False
    resume: bool = False
    every: float = EVERY
    quiet: bool = False
    workers: int | None = None
    executor: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if not self.every >= 0:
            raise InputError(f"--checkpoint-every must be 0 or more seconds, not {self.every}.")
        if self.executor is not None:
            one_of("executor", self.executor, PLACES)

    @property
    def spread(self) -> Spread:
        """How runs are spread."""
        at_least("workers", 1 if self.workers is None else self.workers, 1)
        return Spread(self.workers or os.cpu_count() or 1, self.executor or "processes")


def run_design(name: str, asked: Asked, search: Mapping[str, Any], options: Options) -> None:
    """Follow a brief, or design with a prior; write the run folder, print its tables.

    :param name: of a prior, or the file of a brief.
    :param asked: what changes in its question.
    :param search: what changes in its search, by name; None changes nothing.
    :raises InputError: if something asked for cannot be done.
    """
    from ppl_diffusion.designs.program import build_target
    from ppl_diffusion.designs.run import design, write_run

    job = job_of(name)
    spread = None if options.workers is None and options.executor is None else True
    job = asked.change(replace(job, search=_changed(job.search, {**search, "spread": spread})))
    out = options.out or _place(name)
    if options.resume and is_finished(out):
        if options.as_json:
            print((out / MARKER).read_text(encoding="utf-8"), end="")
        text = f"The run in {str(out)!r} is finished: nothing is left to do."
        return note(text, quiet=options.quiet)
    check_target(out, replace=options.replace, resume=options.resume)
    target = build_target(job)
    question = target.job.settings()
    how = options.spread if job.search.spread else None
    with kept_job(out, question, resume=options.resume, every=options.every) as store:
        with progress_bar(f"design {_shown(job)}", quiet=options.quiet) as advance:
            result = design(target, progress=advance, how=how, store=store)
        left_out = write_run(result, out, replace=options.replace)
    if options.as_json:
        print(json_text(result.summary), end="")
    elif not options.quiet:
        design_tables(result)
        print(f"wrote {out}")
    if left_out is not None:
        complain(f"{left_out} Every other file of the run was written.", OK)


def _place(name: str) -> Path:
    """Return where a design goes if nothing is said: never into the folder of its prior."""
    place = Path("runs") / Path(name).name.removesuffix(SUFFIX)
    same = place.resolve() == Path(name).resolve()
    return place.with_name(f"design-{place.name}") if same else place


def _shown(job: Job) -> str:
    return Path(job.name).name or job.name


def _changed(search: Search, asked: Mapping[str, Any]) -> Search:
    """Return a search with what was asked for in place of what it says.

    Options of another method than that of the brief are forgotten with it.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    backend, device = given.pop("backend", None), given.pop("device", None)
    device = device or search.device or "cpu"
    backend = backend or search.backend or "torch"
    known = {f.name for f in fields(Search)} - {"options"}
    numbers = {name: given.pop(name) for name in known & given.keys()}
    same = numbers.get("method", search.method) == search.method
    kept = {f.name: getattr(search, f.name) for f in fields(search)}
    if not same:
        kept |= {"ess_threshold": None, "resampler": None}
    kept |= numbers
    kept["options"] = {**(search.options if same else {}), **given}
    kept["device"] = None if device == "cpu" else device
    kept["backend"] = NUMPYRO if is_jax(backend, device) else None
    return Search(**kept)
