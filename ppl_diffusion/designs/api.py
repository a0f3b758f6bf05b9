"""The job of the command ``design`` from Python: ``ppd.design``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ppl_diffusion.designs.brief import brief_reward, job_of
from ppl_diffusion.designs.program import build_target
from ppl_diffusion.designs.question import Job, Question, parse_fix
from ppl_diffusion.designs.reward_spec import RewardSpec
from ppl_diffusion.designs.run import Result, write_run
from ppl_diffusion.designs.run import design as follow
from ppl_diffusion.designs.spread import Spread
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.folder import check_target
from ppl_diffusion.jobs.keeping import EVERY, kept_job
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.models import DiffusionProgram
from ppl_diffusion.potentials import AbstractPotential
from ppl_diffusion.smc.engine import Progress

Asked = AbstractPotential | RewardSpec | Mapping[str, Any] | Callable[[list[str]], Any]
"""What can be asked for: a potential of tokens, a table of a brief, or a function of texts."""


def design(
    prior: DiffusionProgram | str | Path,
    *,
    rewards: Asked | Iterable[Asked] = (),
    judges: Asked | Iterable[Asked] = (),
    constraints: AbstractPotential | Iterable[AbstractPotential] = (),
    gc: tuple[float, float] | None = None,
    forbid: Sequence[str] = (),
    fix: Sequence[str] = (),
    lengths: tuple[int, int] | None = None,
    label: str | int | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    checkpoint_every: float = EVERY,
    progress: Progress | None = None,
    method: str | None = None,
    particles: int | None = None,
    runs: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    executor: str = "processes",
    **options: Any,
) -> Result:
    """Design sequences: the posterior of a prior under rewards and constraints.

    The same as the command: what comes back holds the weighted particles, the ranked designs with
    all of their scores, and a summary that says how far to trust them; a run folder that
    ``diagnose`` and ``compare`` read is written where ``out`` says.

    :param prior: a prior, the name of a shipped one, a folder, or a brief, ``FILE.toml``. Of a
        shipped prior the brief is followed that comes with it; what is given here is added to it.
    :param rewards: functions of a list of texts that return a number for each (to be maximised at
        temperature 1), tables as in a brief (``{"python": fn, "temperature": 0.2}``, where a
        function or a network may stand in place of its name), or potentials of tokens, which are
        taken as they are.
    :param judges: functions or tables that are no part of the target: they score what came out.
    :param constraints: potentials that are 0 or ``-inf``.
    :param gc: lowest and highest share of G and C.
    :param forbid: pieces that occur nowhere; of bases IUPAC patterns, of DNA on both strands.
    :param fix: fixed tokens, ``"POS:TEXT"`` each.
    :param lengths: fewest and most tokens.
    :param label: a class, of a prior that knows some.
    :param guidance: weight of classifier-free guidance towards it; 1 is the conditional prior.
    :param out: run folder; nothing is written without.
    :param force: replace a run that is there.
    :param resume: go on with one that was interrupted.
    :param checkpoint_every: seconds between two checkpoints of a run that is written, at least.
    :param progress: called with ``(steps done, steps in all)``.
    :param method: name of a method, refinement by default.
    :param particles: particles of a run, 72 by default.
    :param runs: independent runs, 4 by default.
    :param steps: steps of the reverse chain.
    :param seed: 0 by default; the same seed gives the same designs.
    :param workers: processes that runs are spread over; each has a seed of its own then, and the
        result is the same for any number. All are made in this process if it is None.
    :param executor: ``"processes"`` of this machine, or ``"ray"``.
    :param options: of the method, and ``device``, ``resampler``, ``ess_threshold``, ``backend``.
    :raises InputError: if something asked for cannot be done.
    :raises PotentialError: if a reward failed where it may not.
    :raises ParticleCollapse: if no sequence that meets the hard constraints was found.

    Example::

        pairs = lambda texts: [text.count("GC") for text in texts]
        found = ppd.design(prior, rewards=pairs, out="runs/pairs")
        found.sequences[:3]
    """
    job = Job(prior.name) if isinstance(prior, DiffusionProgram) else job_of(str(prior))
    numbers = {"num_particles": particles, "num_runs": runs, "num_steps": steps, "seed": seed}
    spread = None if workers is None else True
    asked = {"method": method, "spread": spread, **numbers, **options}
    job = replace(job, search=_search(job.search, asked))
    how = Spread(workers or 1, executor)
    specs, more = _sorted(rewards, "reward")
    judging, odd = _sorted(judges, "judge")
    if odd:
        raise InputError("A judge scores texts: give functions of texts, or tables of a brief.")
    named = {potential.name: potential for potential in (*more, *_many(constraints))}
    known = job.question
    question = Question(
        rewards=(*known.rewards, *specs),
        judges=(*known.judges, *judging),
        gc=gc or known.gc,
        forbid=(*known.forbid, *forbid),
        fix=(*known.fix, *map(parse_fix, fix)),
        lengths=lengths or known.lengths,
        label=known.label if label is None else str(label),
        guidance=known.guidance if guidance is None else guidance,
    )
    loaded = prior if isinstance(prior, DiffusionProgram) else None
    folder = None if out is None else Path(out)
    if folder is not None:
        check_target(folder, replace=force, resume=resume)
    target = build_target(replace(job, question=question), prior=loaded, more=named)
    if folder is None:
        return follow(target, progress=progress, how=how)
    asked_now = target.job.settings()
    with kept_job(folder, asked_now, resume=resume, every=checkpoint_every) as store:
        result = follow(target, progress=progress, how=how, store=store)
        write_run(result, folder, replace=force)
    return result


def _search(search: Search, asked: Mapping[str, Any]) -> Search:
    given = {name: value for name, value in asked.items() if value is not None}
    known = {f.name for f in fields(Search)} - {"options"}
    numbers = {name: given.pop(name) for name in known & given.keys()}
    kept = {name: getattr(search, name) for name in known} | numbers
    same = kept["method"] == search.method
    if not same:
        kept |= {name: None for name in ("ess_threshold", "resampler") if name not in numbers}
    return Search(**kept, options={**(search.options if same else {}), **given})


def _many(asked: Any) -> list[Any]:
    one = isinstance(asked, AbstractPotential | RewardSpec | Mapping) or callable(asked)
    return [asked] if one else list(asked)


def _sorted(asked: Any, kind: str) -> tuple[list[RewardSpec], list[AbstractPotential]]:
    """Return what can be said in words, and potentials."""
    specs: list[RewardSpec] = []
    potentials: list[AbstractPotential] = []
    for number, one in enumerate(_many(asked), 1):
        if isinstance(one, AbstractPotential):
            potentials.append(one)
        elif isinstance(one, RewardSpec):
            specs.append(one)
        elif isinstance(one, Mapping):
            specs.append(brief_reward(one, f"The {kind} {number}", judge=kind == "judge"))
        elif callable(one):
            table = {"python": one}
            specs.append(brief_reward(table, f"The {kind} {number}", judge=kind == "judge"))
        else:
            raise InputError(
                f"The {kind} {number} is an object of type {type(one).__name__}: give a function "
                "of a list of texts, a table of a brief, or a potential."
            )
    return specs, potentials
