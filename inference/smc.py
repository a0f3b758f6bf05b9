"""The one runner: particles, runs, resampling, rows, paths, progress and seed are said here.

What is sampled is a Pyro program with reverse-chain sites (or a bare chain with a potential, a
program of one site). *How* is a method: a small object that says how particles move, how they look
ahead and what pays for it. Whatever the method, the engine is :func:`ppl_diffusion.smc.smc_loop`,
and a particle holds the states of all chains and one draw of every other latent::

    weight = p(latents, observations | x0) / r(latents)

with ``r`` the law the latents were drawn from, when the first chain began that may read them.
Latents that come after the sequences are drawn anew whenever the program is asked. Take the program
away from here and give it to ``pyro.infer.Importance``: the answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from ppl_diffusion.denoisers.batching import row_limit
from ppl_diffusion.distributed import share_rows, shared_seed
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference.arguments import require_counts, require_latent_moves, require_target
from ppl_diffusion.inference.bootstrap import Bootstrap
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.correctors import Corrector
from ppl_diffusion.inference.engine import Engine, MovingEngine
from ppl_diffusion.inference.latent_run import LatentRun, latent_run
from ppl_diffusion.inference.scout import LatentMover, LatentMoves
from ppl_diffusion.inference.sentinels import require_sentinels, sentinels
from ppl_diffusion.kernels.blocks import widened
from ppl_diffusion.potentials import AbstractPotential
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Method, can_hold, methods
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.replay import Replay, seeded
from ppl_diffusion.programs.schedule import Plan, as_plan
from ppl_diffusion.programs.sources import PotentialLike, ProgramSource, Source, State
from ppl_diffusion.smc.checkpoint import keep_result
from ppl_diffusion.smc.engine import Progress, SMCTrace, smc_loop
from ppl_diffusion.smc.latent_rules import DISCRETE
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler, as_resampler

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Target = ReverseChain | Composition | Callable[..., Any]


class SMC:
    """Posterior sampling by weighted particles.

    :param model: a Pyro program with one or more :class:`ReverseChain` sites, a bare chain (with a
        potential), or a composition of chains. Programs broadcast over one more plate on the left.
        Other latents, plates, ``factor``, ``obs``, chains that depend on what was drawn before
        them, :func:`~ppl_diffusion.handlers.clamp`, :func:`~ppl_diffusion.handlers.twist` and
        ``infer={"steer": ...}`` hints (which then serve as the look-ahead) are honoured.
    :param potential: ``log G`` of a bare chain, or on top of a composition; None for a program.
    :param method: how particles move and look ahead: a name of
        :func:`~ppl_diffusion.inference.methods`, an instance, or None for
        :class:`~ppl_diffusion.inference.Bootstrap` (of a composition,
        :class:`~ppl_diffusion.inference.Corrector`).
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, vectorised.
    :param schedule: who moves at each step, where there are several chains: ``"lockstep"``,
        ``"sequential"``, ``"interleaved"``, or a function of the numbers of steps.
    :param resampler: resampling scheme.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``; None
        takes the method's own.
    :param store_path: keep the states of all steps, and hand whole paths to programs that read
        them; without, such programs are refused.
    :param max_rows: largest number of rows sent to a network at once, None for what suits it.
    :param vectorize_particles: evaluate the program for all particles at once (values arrive as
        ``(particles, 1 for each plate a site is not in, ...)``); otherwise one after the other,
        which any program survives.
    :param moves: how latents that were drawn before the sequences are renewed, which resampling
        only copies: ``"auto"`` (by :class:`LatentMoves` as they come), options, or None for not at
        all. Where the method is given by name and has ``moves`` of paths, these may be given here.
    :param num_sentinels: draws beside the run that are never resampled (64 do): they see what the
        look-ahead costs where the run cannot, for the verdict ``lookahead``.
    :param process_group: processes of ``torch.distributed`` that run this at once and share what
        networks and potentials are asked about (:mod:`ppl_diffusion.distributed`); None is this one
        alone.
    :param progress: called with ``(steps done, steps in all)``.
    :param options: options of the method, where it is given by name.
    :raises TypeError: if the target is none, or an option is not the method's.
    :raises ValueError: if a number or a name is not usable.

    Example::

        posterior = SMC(assay, num_particles=256, num_runs=4).run(torch.tensor(12.0), seed=0)
        steered = SMC(assay, method="steering", kind="max", every=4).run(torch.tensor(12.0))
    """

    def __init__(
        self,
        model: Target,
        potential: PotentialLike | None = None,
        *,
        method: Method | str | None = None,
        num_particles: int = 256,
        num_runs: int = 1,
        schedule: str | Plan = "lockstep",
        resampler: str | Resampler = "systematic",
        ess_threshold: float | None = None,
        store_path: bool = True,
        max_rows: int | None = None,
        vectorize_particles: bool = True,
        moves: LatentMoves | Literal["auto"] | None = "auto",
        num_sentinels: int = 0,
        process_group: ProcessGroup | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        composed = isinstance(model, Composition)
        if not (moves is None or moves == "auto" or isinstance(moves, LatentMoves)):
            require_latent_moves(moves)
            options["moves"], moves = moves, "auto"  # path moves: an option of some methods
        self.moves = LatentMoves() if moves == "auto" else moves
        self.method = as_method(method, Corrector if composed else Bootstrap, options)
        takes_nothing = composed or getattr(self.method, "compose", None) is not None
        require_target(self.owner, model, potential, takes_nothing)
        require_counts("SMC", num_particles, num_runs)
        self.model, self.potential = model, potential
        self.num_particles, self.num_runs = num_particles, num_runs
        self.asked = self.method.ess_threshold if ess_threshold is None else ess_threshold
        self.scheme = as_resampler(resampler)
        self.resampler, self.ess_threshold = self.method.resampling(self.scheme, self.asked)
        self.resampler.num_uniforms(num_particles)  # a scheme may not fit the number
        self.plan = as_plan(schedule)
        self.store_path, self.max_rows, self.progress = store_path, row_limit(max_rows), progress
        self.vectorize_particles = vectorize_particles
        self.num_sentinels = require_sentinels(self.method, num_sentinels)
        self.process_group = process_group

    @property
    def owner(self) -> str:
        """What errors call the method."""
        return "SMC" if type(self.method) is Bootstrap else type(self.method).__name__

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> ParticlePosterior:
        """Sample the posterior of the program at these arguments.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: the weighted particles; ``law`` says what they are exact for, ``samples`` holds
            every site, ``(R, N, ...)``, but for deterministic ones that show whole paths where the
            method keeps none: ``settings["left_out"]`` names them.
        :raises ValueError: if the program has no chain site, or does not broadcast.
        :raises CapabilityError: if it is random from run to run, or lacks what the method needs.
        :raises PotentialError: if a potential or a site's density is NaN or ``+inf``.
        :raises RuntimeError: if another process of the group failed, or does not answer.
        """
        started = time.perf_counter()
        seed, group = shared_seed(seed, self.process_group), self.process_group
        with torch.no_grad(), seeded(seed), share_rows(group), watch_failures() as failures:
            if isinstance(self.potential, AbstractPotential):
                self.potential.keep_back(self.num_particles * self.num_runs)
            run = self.bind(args, kwargs)
            moves = self._latent_moves(run)
            trace = self._trace(run, moves.mover, self.progress)
            watched = self._sentinels(run) if self.num_sentinels else {}
            found = {**moves.settings(run), **failures.settings(), **watched}
            posterior = self._posterior(run, trace, moves, found, seed, started)
        posterior = self.method.finish(posterior)
        keep_result(posterior.save)
        return posterior

    def _sentinels(self, run: Bound) -> dict[str, Any]:
        beside = run.at((1, self.num_sentinels))
        engine = Engine(self.method, beside, self.store_path)
        record = beside.record if self._records else None
        return sentinels(
            engine, self.method.num_steps(run), beside.shape[1], self.ess_threshold, record
        )

    @property
    def _records(self) -> bool:
        return (self.store_path or self.method.needs_paths) and not self.method.keeps_paths

    def _trace(
        self,
        run: Bound,
        mover: LatentMover | None,
        progress: Progress | None = None,
        *,
        scouts: bool = False,
    ) -> SMCTrace:
        options = (self.method, run, self.store_path)
        engine = Engine(*options) if mover is None else MovingEngine(*options, mover)
        trace = smc_loop(
            engine,
            self.method.num_steps(run),
            run.shape[1],
            run.shape[0],
            self.resampler,
            self.ess_threshold,
            None,
            record=run.record if self._records else None,
            progress=progress,
        )
        if not scouts:
            trace = self.method.end(run, trace)
        if isinstance(engine, MovingEngine):  # last: an end may keep a few of the particles only
            engine.finish(trace, self.scheme, self.ess_threshold)
        return trace

    def _latent_moves(self, run: Bound) -> LatentRun:
        """Return how latents move, found out by a scout run where that is asked for."""
        return latent_run(self.moves, self.method, run, self.resampler, self._scout)

    def _scout(self, run: Bound, mover: LatentMover) -> None:
        self._trace(run, mover, scouts=True)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Return the target bound to one run.

        :param args: arguments of the program.
        :param kwargs: keyword arguments of the program.
        """
        source = self._source(args, kwargs)
        self.method.require(source)
        if source.program is not None and not self.store_path:
            source.program.require_clean_sequences()
        run = Bound(
            source=source,
            movers={s.name: self.method.mover(s, source, self.max_rows) for s in source.chains},
            plan=self.plan,
            fill=self.method.fill,
            shape=(self.num_runs, self.num_particles),
            normalised=self.method.normalised,
        )
        self.method.prepare(run, self.resampler, self.asked)
        return run

    def _source(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source:
        model = self.model
        if isinstance(model, Composition | ReverseChain):
            if args or kwargs:
                raise TypeError(
                    "run takes no arguments of a program here: the target is a bare chain, or a "
                    "composition of chains."
                )
            return self.method.source(model, self.potential)
        program = Program(model, args, kwargs, vectorize=self.vectorize_particles, owner=self.owner)
        holding = {s.name for s in program.chains if self.method.holds_clamps and can_hold(s)}
        return ProgramSource(program, holding)

    def _posterior(
        self,
        run: Bound,
        trace: SMCTrace,
        moves: LatentRun,
        found: dict[str, Any],
        seed: int | None,
        started: float,
    ) -> ParticlePosterior:
        state: State = trace.carry
        paths = None
        if self.store_path:
            paths = self.method.paths(run, state) or run.own_paths(state, trace.paths())
        steps = self.method.num_steps(run)
        if steps == len(run.groups):  # rounds of reveals stand for steps of the grid
            steps = run.num_steps
        trace = trace.spread(steps)
        first = run.source.chains[0].name
        samples = dict(state["values"])
        if run.source.is_program:
            samples |= {name: widened(path) for name, path in (paths or {}).items()}
        rounds = {"num_rounds": len(run.groups)} if run.on_events else {}
        shown = frozenset() if run.program is None else run.program.shows
        # Values that read whole paths, where the method did not keep these: not lost in silence.
        left_out = {"left_out": sorted(shown - samples.keys())} if shown - samples.keys() else {}
        # The loop knows what paid, which a method may have changed; and no path of one's own steps.
        known = trace.posterior_fields() | {"log_potential": state["log_g"]}
        law = moves.law(self.method.law(run))
        if not (self.method.normalised and law.has_evidence):
            known["log_mass"] = None
        known["compact_path"] = None if paths is None else paths[first]
        posterior = ParticlePosterior(
            x0=state["sites"][first]["tokens"],
            times=self.method.times(run),
            samples=samples,
            num_evaluations=run.num_evaluations,
            num_potential_calls=self.method.num_calls(run) - moves.num_rows,
            law=law,
            settings={
                "method": self.method.name,
                "resampler": self.resampler.name,
                "ess_threshold": self.ess_threshold,
                **self.method.settings(run),
                **left_out,
                **_discrete(run),
                **found,
                "num_steps": steps,
                **rounds,
                "seed": seed,
            },
            seconds=time.perf_counter() - started,
            is_program=run.source.is_program,
            **_origin(run),
            num_move_rows=moves.num_rows,
            num_move_gradients=moves.num_gradients,
            num_scout_rows=moves.num_scout_rows,
            **known,
        )
        return posterior.to("cpu")  # where people look at results, whatever they ran on


def _discrete(run: Bound) -> dict[str, Any]:
    program = run.program
    return {DISCRETE: program.discrete} if program is not None and program.latents else {}


def _origin(run: Bound) -> dict[str, Any]:
    """Return the fields by which a result remembers its program."""
    if run.program is None:
        return {}
    replay = Replay(run.program)
    return {"origin": replay, "plates": replay.plates}


def as_method(
    method: Method | str | None, default: type[Method], options: dict[str, Any]
) -> Method:
    """Return a method from its name and options."""
    if isinstance(method, Method):
        if options:
            raise TypeError(
                f"SMC: {', '.join(options)} given beside a method that is made already; give "
                f"them to {type(method).__name__}(...)."
            )
        return method
    if not (method is None or isinstance(method, str)):
        raise TypeError(f"SMC: a method is a name or an instance, got {type(method).__name__}.")
    known = methods()
    if method is not None and method not in known:
        raise ValueError(f"SMC: unknown method {method!r}; choose one of {', '.join(known)}.")
    cls = default if method is None else known[method]
    own = [f.name for f in fields(cls) if f.init]
    unknown = [name for name in options if name not in own]
    if unknown:
        raise TypeError(
            f"SMC: the method {cls.name!r} has no option {unknown[0]!r}; it has "
            f"{', '.join(own) or 'none'}."
        )
    return cls(**options)
