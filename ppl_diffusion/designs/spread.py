"""Runs of a design in processes of their own: they are independent, and their evidence pools.

Every run has a seed of its own, so that the result does not depend on how many are made at once,
nor on where. (Runs side by side in one process share their stream of random numbers, and their
calls of the network: that is faster on one machine, and another draw.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.designs.methods import infer
from ppl_diffusion.designs.own_rewards import make_executor
from ppl_diffusion.designs.program import Target, build_target
from ppl_diffusion.designs.question import Job
from ppl_diffusion.models import DiffusionProgram
from ppl_diffusion.potentials import AbstractPotential
from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.smc.checkpoint import RunStore, keep_result, keep_run
from ppl_diffusion.smc.engine import Progress
from ppl_diffusion.smc.pooling import pooled

PLACES = ("processes", "ray")
POLL = 0.2
"""Seconds between two looks at whether somebody asked the job to end."""


@dataclass(frozen=True)
class Spread:
    """How runs are spread.

    :param workers: how many are made at once.
    :param executor: where: ``"processes"`` of this machine, or ``"ray"`` for those of a cluster.
    """

    workers: int
    executor: str = "processes"


@dataclass(frozen=True)
class OneRun:
    """What a process is told about its run.

    :param job: with one run, and its seed.
    :param prior: the prior, where it lies in no folder.
    :param more: potentials that are not said in the job.
    :param folder: where its checkpoints go, None for nowhere.
    :param every: seconds between them.
    """

    job: Job
    prior: DiffusionProgram | None
    more: Mapping[str, AbstractPotential]
    folder: Path | None = None
    every: float = 0.0

    def __call__(self) -> ParticlePosterior:
        """Make the run."""
        # More threads would share sums otherwise, and round them otherwise.
        torch.set_num_threads(1)
        target = build_target(self.job, prior=self.prior, more=self.more)
        kept: Any = nullcontext()
        if self.folder is not None:
            question = self.job.settings()
            kept = keep_run(self.folder, question, resume=self.folder.is_dir(), every=self.every)
        with kept:
            return infer(target, self.job.search)


def infer_apart(
    target: Target, how: Spread, store: RunStore | None = None, progress: Progress | None = None
) -> ParticlePosterior:
    """Make every run of a job in a process of its own, and pool them.

    :param store: where the job is kept, if it is; runs write their checkpoints into it.
    :param progress: called with ``(runs done, runs in all)``.
    """
    tasks = _tasks(target, store)
    with make_executor(how.executor, min(how.workers, len(tasks))) as executor:
        calls = [executor.submit(_made, task) for task in tasks]
        _collect(calls, store, progress, executor)
        found = pooled([call.result() for call in calls])
    found = replace(found, settings={**found.settings, "seed": target.job.search.seed})
    keep_result(found.save)
    return found


def _made(task: OneRun) -> ParticlePosterior:
    return task()


def _tasks(target: Target, store: RunStore | None) -> list[OneRun]:
    job, search = target.job, target.job.search
    rewards = tuple(
        replace(spec, options=_share(spec.options, search.num_runs))
        for spec in job.question.rewards
    )
    job = job.asking(rewards=rewards)
    tasks = []
    for number in range(search.num_runs):
        seed = seed_of(search.seed, number)
        one = replace(job, search=replace(search, num_runs=1, seed=seed))
        folder = None if store is None else store.folder / f"run-{number:03d}"
        every = 0.0 if store is None else store.every
        tasks.append(OneRun(one, target.given, target.more, folder, every))
    return tasks


def seed_of(seed: int, number: int) -> int:
    """Return the seed of a run, far from those of others and of neighbouring jobs."""
    told = hashlib.sha256(f"{seed}, run {number}".encode()).digest()
    return int.from_bytes(told[:5], "big")


def _share(options: Mapping[str, Any], runs: int) -> dict[str, Any]:
    """Return the options of a reward of one of several runs, which share its budget."""
    budget = options.get("budget")
    return dict(options) if budget is None else {**options, "budget": max(1, budget // runs)}


def _collect(
    calls: list[Future[ParticlePosterior]],
    store: RunStore | None,
    progress: Progress | None,
    executor: Executor,
) -> None:
    """Wait for all runs; what fails in one, or a signal, ends the others."""
    left = set(calls)
    try:
        while left:
            done, left = wait(left, POLL, FIRST_COMPLETED)
            for call in done:
                call.result()
            if progress is not None and done:
                progress(len(calls) - len(left), len(calls))
            if store is not None:
                store.end_if_asked()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
