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

import torch
from pyro import poutine
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.inference._arguments import require_moves
from ppl_diffusion.inference._gibbs_blocks import (
    GivenLatents,
    LatentKernel,
    PerChainPotential,
    TokenBlock,
    as_program,
    require_continuous,
)
from ppl_diffusion.inference._gibbs_posterior import GibbsPosterior
from ppl_diffusion.inference._path_reading import require_sequences_only
from ppl_diffusion.inference._program import Program
from ppl_diffusion.inference._sites import held_positions
from ppl_diffusion.inference._task import PotentialLike, seeded
from ppl_diffusion.smc.conditional import ConditionalFeynmanKac, conditional_smc
from ppl_diffusion.smc.engine import smc_loop
from ppl_diffusion.smc.feynman_kac import EvaluatedPotential, FeynmanKac
from ppl_diffusion.smc.rejuvenation import PathModel, PathMove
from ppl_diffusion.smc.resampling import Multinomial
from ppl_diffusion.smc.twists import FillTwist, TwistLike, as_twist

MAX_ROWS = 4096
"""Particles a program is evaluated for at once when draws are collected."""


@dataclass(frozen=True, eq=False)
class GibbsState:
    """Where ``C`` chains stand, and what the last sweep did.

    :param path: token paths, int64 ``(C, *plates, T + 1, L)``.
    :param latents: values of the continuous sites, each ``(C, ...)``.
    :param log_evidence: log-evidence of the last conditional SMC given the latents, ``(C,)``; too
        large on average.
    :param ess: effective sample size after each of its steps, ``(C, T)``.
    :param accept: share of accepted moves of each kind, ``(C, moves)``.
    """

    path: Tensor
    latents: dict[str, Tensor]
    log_evidence: Tensor
    ess: Tensor
    accept: Tensor


class ParticleGibbs:
    """Posterior sampling by conditional SMC on token paths and NUTS on continuous latents.

    :param target: a Pyro program with :class:`ReverseChain` sites, which it reads through
        ``chain.x0(path)`` only, and any number of continuous latents whose support is fixed; or a
        reverse chain, with a potential. Several sites move as one chain, side by side.
    :param potential: ``log G`` of a bare chain; None for a program.
    :param num_particles: particles ``N`` of each conditional SMC, at least 2.
    :param num_runs: Markov chains ``C``; their paths move side by side.
    :param num_samples: draws kept per chain.
    :param num_warmup: sweeps before them, in which NUTS adapts.
    :param num_transitions: NUTS transitions per sweep.
    :param twist: look-ahead of the conditional SMC: ``"argmax"``, ``"persistent"``, a fill twist
        or None.
    :param ess_threshold: resample when the ESS falls below this fraction of ``N``.
    :param moves: path moves made after each conditional SMC, in order.
    :param nuts: options of :class:`pyro.infer.NUTS`.
    :param store_path: keep whole paths.
    :param max_rows: largest number of rows sent to the network at once.
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
        twist: TwistLike = "argmax",
        ess_threshold: float = 0.5,
        moves: Sequence[PathMove] = (),
        nuts: Mapping[str, Any] | None = None,
        store_path: bool = True,
        max_rows: int | None = 4096,
        vectorize_particles: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _check_counts(num_particles, num_runs, num_samples, num_warmup, num_transitions)
        self.model = as_program(target, potential)
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
        self.store_path, self.max_rows = store_path, max_rows
        self.vectorize_particles, self.progress = vectorize_particles, progress

    def run(self, *args: Any, seed: int | None = None, **kwargs: Any) -> GibbsPosterior:
        """Sample the posterior of the program at these arguments.

        :param args: arguments of the program.
        :param seed: seed of this run; the global random state is left alone if it is given.
        :param kwargs: keyword arguments of the program.
        :returns: equally weighted, correlated draws, ``(C, num_samples, ...)``.
        :raises CapabilityError: if the program has discrete latents, reads whole paths, or has
            several chains that cannot be run as one, or the chain has no density.
        :raises ParticleCollapse: if no starting path of positive probability is found.
        """
        started, total = time.perf_counter(), self.num_warmup + self.num_samples
        with seeded(seed):
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
                settings={**self._settings(), "seed": seed},
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
            otherwise="pass vectorize_particles=False",
        )
        self.site = TokenBlock(self.program)
        require_continuous(self.program)
        require_sequences_only(self.program)
        # Every latent is given here, also those whose law depends on the sequence.
        self.program.carried, self.program.redrawn = self.program.latents, []
        for move in options.moves:
            move.check(self.site.chain)
        self.num_evaluations = self.num_potential_calls = 0
        self._nuts: LatentKernel | None = None

    def start(self) -> GibbsState:
        """Return latents drawn from their prior, and paths drawn by SMC given them."""
        runs, steps = self.options.num_runs, self.site.chain.num_steps
        traces = [poutine.trace(self._prior_program).get_trace() for _ in range(runs)]
        latents = {
            name: torch.stack([trace.nodes[name]["value"].detach() for trace in traces])
            for name in self.program.latents
        }
        empty = torch.zeros(runs, 0, dtype=torch.float64)
        ess = torch.zeros(runs, steps, dtype=torch.float64)
        return GibbsState(self._first_paths(latents), latents, ess[:, 0], ess, empty)

    def sweep(self, state: GibbsState, *, reverse: bool = False) -> GibbsState:
        """Return the state after one update of both blocks.

        :param state: where the chains stand.
        :param reverse: update the latents first: with reversible blocks, the time reversal.
        """
        blocks = [self.update_paths, self.update_latents]
        for update in reversed(blocks) if reverse else blocks:
            state = update(state)
        return state

    def update_paths(self, state: GibbsState) -> GibbsState:
        """Return the state after a conditional SMC, and the path moves, given the latents."""
        potential = self._potential(state.latents)
        bound = ConditionalFeynmanKac(
            self._model, state.path, max_rows=self.options.max_rows, potential=potential
        )
        done = conditional_smc(
            bound,
            num_particles=self.options.num_particles,
            ess_threshold=self.options.ess_threshold,
        )
        path, accept = self._move(done.path, potential)
        self.num_evaluations += bound.num_evaluations
        self.num_potential_calls += potential.num_calls
        return replace(
            state, path=path, log_evidence=done.log_evidence, ess=done.trace.ess, accept=accept
        )

    def update_latents(self, state: GibbsState) -> GibbsState:
        """Return the state after NUTS transitions of the continuous latents, given the paths."""
        if not self.program.latents:
            return state
        if self._nuts is None:
            self._nuts = LatentKernel(self.program, self.site, self.options, state.path)
        return replace(state, latents=self._nuts.update(state.path, state.latents))

    @property
    def target(self) -> str:
        """The law that every sweep leaves invariant, in words."""
        names = ", ".join(self.program.latents)
        latents = f" and the latents {names}" if names else ""
        chain = self.site.chain
        changes = "".join(f", {change}" for change in chain.kernel.changes)
        held = held_positions([(site.chain, site.clamp) for site in self.site.sites])
        held_words = "".join(f", {words}" for words in held)
        return (
            f"the posterior of {self.program.name} over the {chain.num_steps}-step reverse chain "
            f"{self.site.names}{held_words}{changes}{latents}: the invariant law of the Markov "
            "chain, whose draws are correlated"
        )

    def collect(
        self,
        draws: Sequence[GibbsState],
        *,
        updated: Tensor,
        settings: Mapping[str, Any],
        seconds: float,
    ) -> GibbsPosterior:
        """Return draws as a posterior, with all sites of the program.

        :param draws: the states of the kept sweeps.
        :param updated: whether each state of the path changed in the sweep, ``(C, S, T + 1)``.
        :param settings: what was chosen.
        :param seconds: wall time.
        """
        path = torch.stack([state.path for state in draws], 1)
        latents = {n: torch.stack([s.latents[n] for s in draws], 1) for n in self.program.latents}
        samples, log_density = self._sites(path, latents)
        kind = torch.uint8 if self.site.chain.kernel.process.num_states <= 256 else torch.int32
        shown = self.site.shown(path, whole_path=True).to(kind)
        return GibbsPosterior(
            x0=self.site.shown(path[..., -1, :]),
            samples={**samples, **self.site.own_paths(path)},
            compact_path=shown if self.options.store_path else None,
            log_density=log_density,
            log_evidence=torch.stack([state.log_evidence for state in draws], 1),
            ess=torch.stack([state.ess for state in draws], 1),
            updated=updated.flatten(2, -2).any(2) if updated.ndim > 3 else updated,
            accept=torch.stack([state.accept for state in draws], 1),
            step_size=math.nan if self._nuts is None else float(self._nuts.kernel.step_size),
            num_divergences=0 if self._nuts is None else self._nuts.num_divergences,
            num_evaluations=self.num_evaluations,
            num_potential_calls=self.num_potential_calls,
            target=self.target,
            settings={**settings, "num_steps": self.site.chain.num_steps},
            seconds=seconds,
            is_program=self.options.is_program,
        )

    @property
    def _model(self) -> FeynmanKac:
        chain, proposal = self.site.chain, self.site.proposal
        return FeynmanKac(chain, _unused_potential, twist=self.options.twist, proposal=proposal)

    def _prior_program(self) -> None:
        self.program.model(*self.program.args, **self.program.kwargs)

    def _potential(self, latents: Mapping[str, Tensor]) -> EvaluatedPotential:
        return PerChainPotential(GivenLatents(self.program, self.site, latents))

    def _first_paths(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Draw one path per chain by plain SMC given its latents."""
        bound = self._model.bind(max_rows=self.options.max_rows)
        bound.potential = self._potential(latents)
        size, runs = self.options.num_particles, self.options.num_runs
        threshold, steps = self.options.ess_threshold, self.site.chain.num_steps
        scheme = Multinomial()
        with torch.no_grad():
            trace = smc_loop(bound, steps, size, runs, scheme, threshold, None, record="tokens")
        self.num_evaluations += bound.num_evaluations
        self.num_potential_calls += bound.num_potential_calls
        if not bool(trace.weights.alive.all()):
            raise ParticleCollapse(
                f"ParticleGibbs: no path of positive probability among {size} particles in "
                f"{int((~trace.weights.alive).sum())} of {runs} chains; use more particles, a "
                "better twist, or relax the constraint."
            )
        slot = torch.multinomial(trace.weights.normalised, 1)[:, 0]
        paths = trace.paths()
        assert paths is not None  # the tokens were recorded
        return paths[torch.arange(runs), slot].to(torch.int64)

    def _move(self, path: Tensor, potential: EvaluatedPotential) -> tuple[Tensor, Tensor]:
        if not self.options.moves:
            return path, torch.zeros(len(path), 0, dtype=torch.float64)
        clamp = self.site.clamp

        def log_potential(x0: Tensor) -> Tensor:  # moves by the bare chain do not know the clamp
            value = potential(x0)
            if clamp is None:
                return value
            held = clamp.holds(x0)
            return value.masked_fill(
                ~(held.flatten(2).all(-1) if held.ndim > 2 else held), -math.inf
            )

        model = PathModel(self.site.chain, log_potential, max_rows=self.options.max_rows)
        accepted = []
        with torch.no_grad():
            state = model.state(path[:, None])
            for move in self.options.moves:
                state, done = move(model, state)
                accepted.append(done[:, 0].to(torch.float64))
        self.num_evaluations += model.num_evaluations
        return state.path[:, 0], torch.stack(accepted, -1)

    def _sites(
        self, path: Tensor, latents: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the values of all sites but the chain, and the density given the chain."""
        shape = path.shape[:2]
        flat, density = path.flatten(0, 1), []
        parts: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(flat)).split(MAX_ROWS):
            given = {name: value.flatten(0, 1)[rows] for name, value in latents.items()}
            paths = self.site.whole_paths(flat[rows])
            with torch.no_grad():
                run = self.program.evaluate({**paths, **given}, len(rows))
            density.append(run.log_density())
            for name in run.site_names:
                value = run.value(name) if run.is_latent_or_deterministic(name) else None
                if value is not None and name not in paths:
                    parts.setdefault(name, []).append(value)
        sites = {n: torch.cat(v).reshape(*shape, *v[0].shape[1:]) for n, v in parts.items()}
        return sites, torch.cat(density).reshape(shape)


def _check_counts(particles: int, runs: int, samples: int, warmup: int, transitions: int) -> None:
    counts = (particles, runs, samples, warmup, transitions)
    whole = all(isinstance(count, Integral) for count in counts)
    if not whole or particles < 2 or runs < 1 or samples < 1 or warmup < 0 or transitions < 1:
        raise ValueError(
            "ParticleGibbs: num_particles must be >= 2, num_runs, num_samples and num_transitions "
            ">= 1 and num_warmup >= 0, all whole, got "
            f"{particles}, {runs}, {samples}, {transitions} and {warmup}."
        )


def _unused_potential(x0: Tensor) -> Tensor:
    return torch.zeros(x0.shape[:-1], dtype=torch.float64)
