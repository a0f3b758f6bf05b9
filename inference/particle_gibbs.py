"""Particle Gibbs: token paths and continuous latents, each given the other.

The posterior of a program is explored by two kernels in turn (Andrieu, Doucet and Holenstein 2010,
section 2.4.3)::

    path    | latents, data    conditional SMC around the present path
    latents | path, data       the No-U-Turn sampler (Hoffman and Gelman 2014), Pyro's own

Each leaves the posterior invariant, so their composition does, for any number of particles from
two on. Masked paths coalesce early: the first reveals of a path change seldom by conditional SMC
alone, and ``moves`` that mask again (:mod:`ppl_diffusion.smc.rejuvenation`) renew them.

Draws are those of a Markov chain: equally weighted, correlated, with a warm-up, and without an
estimate of the evidence. Several chains and ArviZ's diagnostics say whether they agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, ParticleCollapse
from ppl_diffusion.inference.arguments import require_moves, require_target
from ppl_diffusion.inference.bootstrap import Bootstrap
from ppl_diffusion.inference.engine import Engine
from ppl_diffusion.inference.latent_block import LatentBlock, require_continuous
from ppl_diffusion.kernels.base import GIVEN
from ppl_diffusion.kernels.blocks import compacted, widened
from ppl_diffusion.potentials import factor
from ppl_diffusion.potentials.failures import watch_failures
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import can_hold, held_proposal
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.replay import Replay, seeded
from ppl_diffusion.programs.schedule import Plan, as_plan
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import PotentialLike, ProgramSource, State, as_potential
from ppl_diffusion.smc.conditional import ConditionalFeynmanKac, ConditionalMultinomial
from ppl_diffusion.smc.engine import SMCTrace, smc_loop
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac
from ppl_diffusion.smc.gibbs_posterior import GibbsPosterior
from ppl_diffusion.smc.late import require_in_time
from ppl_diffusion.smc.latent_rules import DISCRETE
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.rejuvenation import PathModel, PathMove, PathState
from ppl_diffusion.smc.resampling import Multinomial, Resampler
from ppl_diffusion.smc.twists import ArgmaxFill, FillTwist, TwistLike, as_twist

MAX_ROWS = 4096
"""Particles a program is evaluated for at once when draws are collected."""


@dataclass(frozen=True, eq=False)
class GibbsState:
    """Where ``C`` chains stand, and what the last sweep did.

    :param paths: token paths of every site, int64 ``(C, *plates, T + 1, L)``.
    :param latents: values of the continuous sites, each ``(C, ...)``.
    :param log_evidence: log-evidence of the last conditional SMC given the latents, ``(C,)``; too
        large on average.
    :param ess: effective sample size after each of its steps, ``(C, T)``.
    :param accept: share of accepted moves of each kind, ``(C, moves)``.
    """

    paths: dict[str, Tensor]
    latents: dict[str, Tensor]
    log_evidence: Tensor
    ess: Tensor
    accept: Tensor

    @property
    def path(self) -> Tensor:
        """The paths of the first site."""
        return next(iter(self.paths.values()))


class ParticleGibbs:
    """Posterior sampling by conditional SMC on token paths and NUTS on continuous latents.

    :param target: a Pyro program with :class:`ReverseChain` sites, which it reads through
        ``chain.x0(path)`` only, and any number of continuous latents whose support is fixed; or a
        reverse chain, with a potential. Chains may depend on latents and on each other.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: particles ``N`` of each conditional SMC, at least 2.
    :param num_runs: Markov chains ``C``; their paths move side by side.
    :param num_samples: draws kept per chain.
    :param num_warmup: sweeps before them, in which NUTS adapts.
    :param num_transitions: NUTS transitions per sweep.
    :param schedule: who moves at each step of a sweep, where there are several chains.
    :param twist: look-ahead of the conditional SMC: ``"defensive"``, ``"argmax"``,
        ``"persistent"``, a fill twist or None.
    :param ess_threshold: resample when the ESS falls below this fraction of ``N``.
    :param moves: path moves made after each conditional SMC, in order.
    :param nuts: options of :class:`pyro.infer.NUTS`.
    :param store_path: keep whole paths.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :param vectorize_particles: evaluate the program for all particles at once.
    :param progress: called with ``(sweeps done, sweeps in all)``.

    Example::

        posterior = ParticleGibbs(assay, num_samples=500).run(torch.tensor(12.0), seed=0)
        posterior.to_arviz()
    """

    def __init__(
        self,
        target: ReverseChain | Callable[..., Any],
        potential: PotentialLike | None = None,
        *,
        num_particles: int = 64,
        num_runs: int = 4,
        num_samples: int = 500,
        num_warmup: int = 200,
        num_transitions: int = 1,
        schedule: str | Plan = "lockstep",
        twist: TwistLike = "defensive",
        ess_threshold: float = 0.5,
        moves: Sequence[PathMove] = (),
        nuts: Mapping[str, Any] | None = None,
        store_path: bool = True,
        max_rows: int | None = None,
        vectorize_particles: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_counts(num_particles, num_runs, num_samples, num_warmup, num_transitions)
        require_target("ParticleGibbs", target, potential, takes_nothing=False)
        self.model = _bare(target, potential) if isinstance(target, ReverseChain) else target
        self.plan = as_plan(schedule)
        self.is_program = not isinstance(target, ReverseChain)
        self.num_particles, self.num_runs = num_particles, num_runs
        self.num_samples, self.num_warmup = num_samples, num_warmup
        self.num_transitions, self.ess_threshold = num_transitions, ess_threshold
        self.moves = require_moves("ParticleGibbs", moves)
        self.twist, self.nuts = as_twist(twist), dict(nuts or {})
        if self.twist is not None and not isinstance(self.twist, FillTwist):
            raise ValueError(
                "ParticleGibbs: a program is looked ahead by completions; use 'argmax', "
                "'persistent', a fill twist or None."
            )
        require_in_time(self.twist)
        self.store_path, self.max_rows = store_path, max_rows
        self.vectorize_particles, self.progress = vectorize_particles, progress

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> GibbsPosterior:
        """Sample the posterior of the program at these arguments.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: equally weighted, correlated draws, ``(C, num_samples, ...)``.
        :raises CapabilityError: if the program has discrete latents, or reads whole paths, or a
            chain has no density.
        :raises ParticleCollapse: if no starting path of positive probability is found.
        """
        started, total = time.perf_counter(), self.num_warmup + self.num_samples
        with seeded(seed), watch_failures() as failures:
            sampler = GibbsSampler(self, args, kwargs)
            state, draws, updated = sampler.start(), [], []
            for t in range(total):
                before, state = state.path, sampler.sweep(state)
                if t >= self.num_warmup:
                    draws.append(state)
                    updated.append((state.path != before).any(-1))
                if self.progress is not None:
                    self.progress(t + 1, total)
            return sampler.collect(
                draws,
                updated=torch.stack(updated, 1),
                settings={**self._settings(), **failures.settings(), "seed": seed},
                seconds=time.perf_counter() - started,
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "num_particles": self.num_particles,
            "num_warmup": self.num_warmup,
            "num_transitions": self.num_transitions,
            "twist": None if self.twist is None else self.twist.name,
            "ess_threshold": self.ess_threshold,
            "moves": [move.name for move in self.moves],
        }


class GibbsSampler:
    """The two kernels of a program at given arguments.

    :meth:`sweep` leaves the posterior invariant.

    :param options: the inference program.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    """

    def __init__(
        self, options: ParticleGibbs, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.options = options
        self.program = Program(
            options.model,
            args,
            kwargs,
            vectorize=options.vectorize_particles,
            owner="ParticleGibbs",
        )
        self.sites = {site.name: site for site in self.program.chains}
        self._require_movable()
        self.source = ProgramSource(self.program, {n for n, s in self.sites.items() if can_hold(s)})
        self.num_evaluations = 0
        self._nuts: LatentBlock | None = None

    def _require_movable(self) -> None:
        require_continuous(self.program)
        program, moves = self.program, self.options.moves
        program.require_clean_sequences()
        for site in self.sites.values():
            for move in moves:
                move.check(site.chain)
            if moves and program.above(site.name):
                raise CapabilityError(
                    f"ParticleGibbs: the chain {site.name!r} of {program.name} depends on the "
                    "sequence of another one, so that moves would change its law; leave moves out."
                )

    @property
    def latents(self) -> list[str]:
        """Latents that are moved; what nothing reads is drawn for every draw that is kept."""
        return [name for name in self.program.latents if name not in self.program.unread]

    @property
    def num_potential_calls(self) -> int:
        """Particles the program was evaluated for so far."""
        return self.source.num_calls

    def start(self) -> GibbsState:
        """Return latents drawn from their prior, and paths drawn by SMC given them."""
        runs = self.options.num_runs
        traces = [poutine.trace(self._prior_program).get_trace() for _ in range(runs)]
        latents = {
            name: torch.stack([trace.nodes[name]["value"].detach() for trace in traces])
            for name in self.latents
        }
        empty = torch.zeros(runs, 0, dtype=torch.float64, device="cpu")
        paths, trace = self._first_paths(latents)
        ess = torch.zeros_like(trace.ess)
        return GibbsState(paths, latents, ess[:, 0], ess, empty)

    def sweep(self, state: GibbsState, *, reverse: bool = False) -> GibbsState:
        """Return the state after one update of both blocks."""
        blocks = [self.update_paths, self.update_latents]
        for update in reversed(blocks) if reverse else blocks:
            state = update(state)
        return state

    def update_paths(self, state: GibbsState) -> GibbsState:
        """Return the state after a conditional SMC, and the path moves, given the latents."""
        run = self._bound(lambda site: self._retained(site, state.paths[site.name]))
        paths, chosen, trace = self._population(run, state.latents, ConditionalMultinomial())
        paths, accept = self._move(run, paths, chosen)
        self.num_evaluations += run.num_evaluations
        return replace(
            state,
            paths=paths,
            log_evidence=trace.log_evidence_steps[:, -1],
            ess=trace.ess,
            accept=accept,
        )

    def update_latents(self, state: GibbsState) -> GibbsState:
        """Return the state after NUTS transitions of the continuous latents, given the paths."""
        if not self.latents:
            return state
        options = self.options
        if self._nuts is None:
            self._nuts = LatentBlock(
                self.program,
                {name: path[0] for name, path in state.paths.items()},
                num_transitions=options.num_transitions,
                warmup=options.num_warmup * options.num_transitions * options.num_runs,
                options=options.nuts,
            )
        return replace(state, latents=self._nuts.update(state.paths, state.latents))

    @property
    def law(self) -> Law:
        """The law that every sweep leaves invariant."""
        why = (
            "the invariant law of a Markov chain, whose draws are correlated; log_evidence is that "
            "of conditional runs given the latents, too large on average"
        )
        return self.source.law.but(why=why, has_evidence=False)

    def collect(
        self,
        draws: Sequence[GibbsState],
        *,
        updated: Tensor,
        settings: Mapping[str, Any],
        seconds: float,
    ) -> GibbsPosterior:
        """Return draws as a posterior, with all sites of the program."""
        paths = {n: torch.stack([s.paths[n] for s in draws], 1) for n in self.sites}
        latents = {n: torch.stack([s.latents[n] for s in draws], 1) for n in self.latents}
        samples, log_density = self._values(paths, latents)
        first, site = next(iter(paths.values())), next(iter(self.sites.values()))
        is_program, replay = self.options.is_program, Replay(self.program)
        shown = paths if is_program and self.options.store_path else {}
        return GibbsPosterior(
            x0=site.chain.x0(first),
            samples={**samples, **shown},
            compact_path=compacted(first) if self.options.store_path else None,
            log_density=log_density,
            log_evidence=torch.stack([state.log_evidence for state in draws], 1),
            ess=torch.stack([state.ess for state in draws], 1),
            updated=updated.flatten(2, -2).any(2) if updated.ndim > 3 else updated,
            accept=torch.stack([state.accept for state in draws], 1),
            step_size=math.nan if self._nuts is None else float(self._nuts.kernel.step_size),
            num_divergences=0 if self._nuts is None else self._nuts.num_divergences,
            num_evaluations=self.num_evaluations,
            num_potential_calls=self.num_potential_calls,
            law=self.law,
            settings={
                **settings,
                DISCRETE: self.program.discrete,
                "num_steps": site.chain.num_steps,
            },
            seconds=seconds,
            is_program=is_program,
            plates=replay.plates,
            origin=replay if is_program else None,
        )

    def _prior_program(self) -> None:
        self.program.model(*self.program.args, **self.program.kwargs)

    def _free(self, site: ChainSite) -> BoundFeynmanKac:
        options = self.options
        return chain_mover(site, options.twist, held_proposal(site), max_rows=options.max_rows)

    def _retained(self, site: ChainSite, path: Tensor) -> Mover:
        return ConditionalFeynmanKac(self._free(site).model, path, max_rows=self.options.max_rows)

    def _bound(self, mover: Callable[[ChainSite], Mover]) -> Bound:
        options = self.options
        return Bound(
            source=self.source,
            movers={name: mover(site) for name, site in self.sites.items()},
            plan=options.plan,
            fill=options.twist if isinstance(options.twist, FillTwist) else ArgmaxFill(),
            shape=(options.num_runs, options.num_particles),
        )

    def _population(
        self, run: Bound, latents: Mapping[str, Tensor], resampler: Resampler
    ) -> tuple[dict[str, Tensor], State, SMCTrace]:
        """Move a population given the latents; return one particle of each chain, by weight."""
        engine = _GivenLatents(run, latents, self.options.twist)
        with torch.no_grad():
            trace = smc_loop(
                engine,
                len(run.groups),
                self.options.num_particles,
                self.options.num_runs,
                resampler,
                self.options.ess_threshold,
                None,
                record=run.record,
            )
        self._require_alive(trace)
        slot = torch.multinomial(trace.weights.normalised, 1)
        whole = run.own_paths(trace.carry, trace.paths())
        paths = {
            name: widened(path[torch.arange(len(slot), device=slot.device), slot[:, 0]])
            for name, path in whole.items()
        }
        return paths, run.gather(trace.carry, slot), trace

    def _require_alive(self, trace: SMCTrace) -> None:
        alive = trace.weights.alive
        if not bool(alive.all()):
            raise ParticleCollapse(
                "ParticleGibbs: no path of positive probability among "
                f"{trace.weights.num_particles} particles in {int((~alive).sum())} of {len(alive)} "
                "chains; use more particles, a better twist, or relax the constraint."
            )

    def _first_paths(self, latents: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], SMCTrace]:
        """Draw one path per chain by plain SMC given its latents."""
        run = self._bound(self._free)
        paths, _, trace = self._population(run, latents, Multinomial())
        self.num_evaluations += run.num_evaluations
        return paths, trace

    def _move(
        self, run: Bound, paths: dict[str, Tensor], state: State
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Make the path moves, site by site; ``state`` holds one particle of each chain."""
        accepted = []
        with torch.no_grad():
            for name in self.sites if self.options.moves else ():
                for move in self.options.moves:
                    moved, done = self._moved(run, state, name, move, paths[name])
                    paths = {**paths, name: moved.path[:, 0]}
                    carry = {**state["sites"][name], "tokens": moved.x0}
                    sites = {**state["sites"], name: carry}
                    state = {**state, "sites": sites, "log_g": moved.log_g}
                    accepted.append(done[:, 0].to(torch.float64))
        empty = torch.zeros(self.options.num_runs, 0, dtype=torch.float64, device="cpu")
        return paths, torch.stack(accepted, -1) if accepted else empty

    def _moved(
        self, run: Bound, state: State, name: str, move: PathMove, path: Tensor
    ) -> tuple[PathState, Tensor]:
        carry = state["sites"][name]

        def log_potential(x0: Tensor) -> Tensor:
            sites = {**state["sites"], name: {**carry, "tokens": x0}}
            return self.source.final({**state, "sites": sites})[0]

        model = PathModel(run.chain(name, carry.get(GIVEN)), log_potential)
        return move(model, PathState(path[:, None], state["log_g"]))

    def _values(
        self, paths: Mapping[str, Tensor], latents: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the values of all sites but the chains, and the density given the chains."""
        shape = next(iter(paths.values())).shape[:2]
        known = {n: v.flatten(0, 1) for n, v in (dict(paths) | dict(latents)).items()}
        parts: dict[str, list[Tensor]] = {}
        density = []
        for rows in torch.arange(shape.numel(), device="cpu").split(MAX_ROWS):
            with torch.no_grad():
                run = self.program.evaluate({n: v[rows] for n, v in known.items()}, len(rows))
            density.append(run.log_density(self.program.latents))
            for name, value in run.samples(leave_out=self.program.chain_names).items():
                parts.setdefault(name, []).append(value)
        values = {n: torch.cat(v).reshape(*shape, *v[0].shape[1:]) for n, v in parts.items()}
        return values, torch.cat(density).reshape(shape)


class _GivenLatents(Engine):
    """The bootstrap filter with all latents held at the chains' values."""

    def __init__(self, run: Bound, latents: Mapping[str, Tensor], twist: TwistLike) -> None:
        super().__init__(Bootstrap(twist=twist), run, store_path=False)
        self.latents = {
            name: value[:, None].expand(value.shape[0], run.shape[1], *value.shape[1:])
            for name, value in latents.items()
        }

    def init(self, runs: int, particles: int, generator: Any) -> State:
        return self.run.start(generator, self.latents)


def _bare(chain: ReverseChain, potential: PotentialLike | None) -> Callable[[], None]:
    assert potential is not None
    known = as_potential(potential)

    def bare_chain() -> None:
        factor("potential", known, chain.x0(pyro.sample("path", chain)))

    return bare_chain


def _check_counts(particles: int, runs: int, samples: int, warmup: int, transitions: int) -> None:
    counts = (particles, runs, samples, warmup, transitions)
    whole = all(isinstance(count, Integral) for count in counts)
    if not whole or particles < 2 or runs < 1 or samples < 1 or warmup < 0 or transitions < 1:
        raise ValueError(
            "ParticleGibbs: num_particles must be >= 2, num_runs, num_samples and num_transitions "
            ">= 1 and num_warmup >= 0, all whole, got "
            f"{particles}, {runs}, {samples}, {transitions} and {warmup}."
        )
