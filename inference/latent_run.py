"""The moves of latents around one run: whether there are any, the scout, what is reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ppl_diffusion.inference.latent_paths import PathMover, path_sites
from ppl_diffusion.inference.latent_sites import LatentSites, latent_sites
from ppl_diffusion.inference.scout import SCOUTS, LatentMover, LatentMoves
from ppl_diffusion.programs.ahead import Levels
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.resampling import Resampler

TUNED_ON_THEMSELVES = (
    "moves of latents tuned on themselves make the evidence consistent, not unbiased"
)

Scout = Callable[[Bound, LatentMover], None]
"""Runs a population of a few particles that is not reported."""


@dataclass(frozen=True)
class LatentRun:
    """How latents move during a run, and what that costs.

    :param mover: their moves; None if there are none.
    :param scout: those of the scout run; None if there was none.
    :param num_scout_rows: rows of networks and programs that the scout asked for.
    :param left: latents that are carried as they were drawn, and why.
    """

    mover: LatentMover | None = None
    scout: LatentMover | None = None
    num_scout_rows: int = 0
    left: dict[str, str] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the program evaluated to move latents, the scout's included."""
        return sum(mover.num_rows for mover in self._movers)

    @property
    def num_gradients(self) -> int:
        """How many of them were differentiated."""
        return sum(mover.num_gradients for mover in self._movers)

    @property
    def _movers(self) -> list[LatentMover]:
        first = [mover for mover in (self.mover, self.scout) if mover is not None]
        return [mover for one in first for mover in one.every]

    def law(self, law: Law) -> Law:
        """Return the law of a method, with what moves change about its evidence."""
        if self.mover is None or self.mover.options.tuning != "own":
            return law
        words = TUNED_ON_THEMSELVES
        return law.but(why=f"{law.why}; {words}" if law.why else words)

    def settings(self, run: Bound) -> dict[str, Any]:
        """Return what was done, in JSON types; nothing where a program carries no latents."""
        if self.left is None:
            return {}
        if self.mover is None:
            return {"latent_moves": {"kernels": {}, "left": self.left}}
        mover, along = self.mover, self.mover.then
        own = mover.options.tuning == "own"
        steps = {step for one in mover.every for step in one.steps}
        found = {
            "kernels": {name: k for one in mover.every for name, k in kernels(one).items()},
            **_steps(mover),
            "left": self.left,
            "tuning": mover.options.tuning,
            "tempering": run.levels is not None and run.levels.tempered,
            "evidence": "consistent, not unbiased" if own else "unbiased",
        }
        late = {"note": _AT_THE_END} if len(steps) == 1 else {}
        rows = {"network_rows": sum(one.num_network_rows for one in self._movers)}
        paths = {"along_paths": {**_steps(along), **rows}} if along is not None else {}
        return {"latent_moves": {**found, **paths, **late}}


def _steps(mover: LatentMover) -> dict[str, Any]:
    steps = sorted(mover.steps)
    return {
        "schedule": steps,
        "numbers": [mover.steps[k].number for k in steps],
        "acceptance": [mover.acceptance.get(k, 0.0) for k in steps],
    }


_AT_THE_END = (
    "latents are moved when the sequences are finished, and not before: the scout was not "
    "resampled until then, or at no step with a look-ahead that depends on them"
)


def kernels(mover: LatentMover) -> dict[str, str]:
    """Return the kernel that moved each latent."""
    moves = [tuned.move.kernel for tuned in mover.steps.values() if tuned.move is not None]
    real = " + ".join(dict.fromkeys(moves))
    found = {site.name: real for site in mover.sites.real.sites}
    return found | {site.name: "gibbs" for site in mover.sites.discrete}


def latent_run(
    options: LatentMoves | None, method: Method, run: Bound, resampler: Resampler, scout: Scout
) -> LatentRun:
    """Return how latents move in a run, after the scout run if that is what they are tuned by.

    :param options: what was asked for; None moves nothing.
    :param method: the method.
    :param run: the run, whose look-aheads are tempered and floored from here on.
    :param resampler: its scheme, which may not fit any number of particles.
    :param scout: runs a few particles.
    """
    program = run.program
    if program is None or not program.carried:
        return LatentRun()
    why = _refusal(options, method, run)
    if options is None or why is not None:
        return LatentRun(left=dict.fromkeys(program.carried, why or ""))
    sites, fed = latent_sites(program), path_sites(method, run)
    left = {**sites.left, **fed.left}
    if not (sites.names or fed.names):
        return LatentRun(left=left)
    if options.tuning == "own":
        run.levels = Levels(options.tempering)
        return LatentRun(_movers(options, sites, fed), left=left)
    found = _scouted(options, run, (sites, fed), few(run.shape[1], resampler), scout)
    return replace(found, left=left)


def _movers(
    options: LatentMoves, sites: LatentSites, fed: LatentSites, known: LatentMover | None = None
) -> LatentMover:
    """Return the moves of latents, those that chains depend on last.

    :param known: the moves of a scout.
    """
    mover = LatentMover(options, sites, None if known is None else known.steps)
    if fed.names:
        along = None if known is None or known.then is None else known.then.steps
        mover.then = PathMover(options, fed, along)
    return mover


def _refusal(options: LatentMoves | None, method: Method, run: Bound) -> str | None:
    if options is None:
        return "moves=None"
    if not (method.exact and method.law(run).exact):
        return "the method has no law that moves could leave alone"
    return None


def few(size: int, resampler: Resampler) -> int:
    """Return the number of particles of a scout beside a run of a size."""
    for number in range(min(size, SCOUTS), 0, -1):
        try:
            resampler.num_uniforms(number)
        except ValueError:  # chains of a fixed length must fit in
            continue
        return number
    return size


def _scouted(
    options: LatentMoves,
    run: Bound,
    sites: tuple[LatentSites, LatentSites],
    size: int,
    scout: Scout,
) -> LatentRun:
    first, pilot = _movers(options, *sites), run.at((1, size))
    pilot.notes, pilot.levels = dict(run.notes), Levels(options.tempering)
    before = run.num_evaluations + run.source.num_calls
    with warnings.catch_warnings():  # about the few particles of a run that nobody sees
        warnings.simplefilter("ignore")
        scout(pilot, first)
    rows = run.num_evaluations + run.source.num_calls - before
    steps = {step for mover in first.every for step in mover.steps}
    early = any(step < max(steps) for step in steps)
    if early or not first.waiting:
        run.levels = Levels(options.tempering, learning=False, log_c=pilot.levels.log_c)
    return LatentRun(_movers(options, *sites, first), first, rows)
