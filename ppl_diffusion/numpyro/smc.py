"""Particles over NumPyro programs: one call, compiled, with the results of the torch engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from ppl_diffusion.arrays import Array
from ppl_diffusion.inference import Bootstrap, LatentMoves, Method
from ppl_diffusion.inference.arguments import require_latent_moves
from ppl_diffusion.inference.latent_run import TUNED_ON_THEMSELVES, few
from ppl_diffusion.inference.smc import as_method
from ppl_diffusion.numpyro.engine import Trace, check, run_particles
from ppl_diffusion.numpyro.feynman_kac import ChainParticles
from ppl_diffusion.numpyro.host import OnHost, watched
from ppl_diffusion.numpyro.latent_moves import Mover, Tuned
from ppl_diffusion.numpyro.methods import (
    moves_latents,
    options_of,
    particles_of,
    require_method,
    rows_per_step,
)
from ppl_diffusion.numpyro.noise import SCOUT, KeyNoise
from ppl_diffusion.numpyro.program import PotentialTarget, read, sites_of
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.numpyro.sharding import Shards, Size, on_each_device, on_mesh, shards_of
from ppl_diffusion.potentials import AbstractPotential
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.latent_rules import DISCRETE
from ppl_diffusion.smc.law import Base, Law, Tilt, digest
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Multinomial, Resampler, as_resampler
from ppl_diffusion.smc.weights import Weights

Program = Callable[..., Any]


class SMC:
    """Sequential Monte Carlo over a NumPyro program, or over a chain with a potential.

    The twin of :class:`ppl_diffusion.inference.SMC`, with the same methods as far as their formulas
    are array code: particles move by their chains, look ahead defensively, and are weighed by
    everything the program observes. Latents are drawn from their law and moved whenever resampling
    has copied them. The result is the same :class:`~ppl_diffusion.smc.ParticlePosterior`: evidence,
    verdicts, ArviZ.

    :param program: a NumPyro model with at least one :class:`ReverseChain` site, or a chain.
    :param potential: of a chain: ``x0 (*batch, L) -> log G (*batch,)``, written in JAX; or a
        potential of the torch side, which is then asked on the host
        (:class:`~ppl_diffusion.numpyro.OnHost`), as ``settings["host"]`` says.
    :param method: how particles move and look ahead: a method of
        :mod:`ppl_diffusion.inference` or its name; None is
        :class:`~ppl_diffusion.inference.Bootstrap`.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, side by side.
    :param resampler: a name, or a :class:`~ppl_diffusion.smc.Resampler`.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``; None takes
        the method's own.
    :param store_path: keep the states of all steps.
    :param moves: how latents are renewed: ``"auto"``, a
        :class:`~ppl_diffusion.inference.LatentMoves`, or None for not at all.
    :param mesh: devices that share the particles, ``N`` cut along its one axis, as in
        ``jax.make_mesh((8,), ("particles",))``; None is one device.
    :param options: options of the method, such as ``twist``, where it is given by name.
    :raises CapabilityError: if the JAX engine does not have the method.
    :raises TypeError: if an option is not the method's.
    :raises ValueError: if the settings are impossible.

    Example::

        posterior = SMC(assay, num_particles=256, num_runs=4).run(jax.random.key(0), y=3.0)
        posterior.log_evidence
        steered = SMC(assay, method="steering", kind="max").run(jax.random.key(0), y=3.0)
    """

    def __init__(
        self,
        program: Program | ReverseChain,
        potential: Callable[[Array], Array] | AbstractPotential | None = None,
        *,
        method: Method | str | None = None,
        num_particles: int = 64,
        num_runs: int = 1,
        resampler: str | Resampler = "systematic",
        ess_threshold: float | None = None,
        store_path: bool = True,
        moves: LatentMoves | Literal["auto"] | None = "auto",
        mesh: Mesh | None = None,
        **options: Any,
    ) -> None:
        if isinstance(program, ReverseChain) == (potential is None):
            raise ValueError(
                "SMC: give a program alone, or a ReverseChain with a potential; what weighs a "
                "program's sequences are its own observations and factors."
            )
        self.method = as_method(method, Bootstrap, options)
        require_method(self.method)
        asked = self.method.ess_threshold if ess_threshold is None else ess_threshold
        if num_particles < 1 or num_runs < 1 or not 0 <= asked < math.inf:
            raise ValueError(
                "SMC: num_particles and num_runs must be >= 1 and ess_threshold >= 0, got "
                f"{num_particles}, {num_runs} and {asked}."
            )
        if not (moves is None or moves == "auto"):
            require_latent_moves(moves)
        if isinstance(potential, AbstractPotential):
            potential = OnHost(potential)
        self.program, self.potential = program, potential
        self.size, self.store_path = (num_runs, num_particles), store_path
        scheme = as_resampler(resampler)
        self.resampler, self.ess_threshold = self.method.resampling(scheme, asked)
        self.resampler.num_uniforms(num_particles)  # a scheme may not fit the number
        self.moves = LatentMoves() if moves == "auto" else moves
        self.hosts: set[OnHost] = set()
        self.mesh, self.shards = mesh, shards_of(mesh, num_particles, "SMC")
        if mesh is not None and self.moves is not None and self.moves.tuning == "own":
            raise ValueError(
                "SMC: moves tuned on the particles themselves need all of them on one device; drop "
                "the mesh, or take tuning='scout'."
            )

    def run(self, key: Array, *args: Any, **kwargs: Any) -> ParticlePosterior:
        """Run all particles, in one compiled scan.

        :param key: a JAX random key.
        :param args: arguments of the program. Arrays among them are traced; numbers are compiled
            in, so that another one compiles anew.
        :raises CapabilityError: if the engine cannot move the program's chains.
        :raises ValueError: if a weight became NaN or ``+inf``.
        """
        started = time.perf_counter()
        with watched() as met:
            particles, scout = self._bound(args, kwargs), None
        self.hosts = {*met, *([self.potential] if isinstance(self.potential, OnHost) else [])}
        for host in self.hosts:
            host.failure = None
        if self.hosts and self.mesh is not None:
            raise ValueError("SMC: what is asked on the host runs on one device; drop the mesh.")
        if particles.mover is not None and particles.mover.options.tuning == "scout":
            size = (1, few(self.size[1], self.resampler))
            own = KeyNoise(jax.random.fold_in(key, SCOUT))
            # It is small, and learns from all of its particles: on one device, whatever the mesh.
            scout = self._trace(replace(particles, shards=Shards()), own, size, None)
            known = replace(particles.mover, tuned=_tuned(scout))
            particles = replace(particles, mover=known)
        trace = self._trace(particles, KeyNoise(key, self.shards), self.size, self.mesh)
        check(trace.log_evidence_steps)
        return self._posterior(particles, trace, scout, time.perf_counter() - started)

    def _trace(
        self, particles: ChainParticles, noise: KeyNoise, size: Size, mesh: Mesh | None
    ) -> Trace:
        options = (size, self.resampler, self.ess_threshold, self.store_path, mesh)
        spread = on_each_device(mesh, (particles, noise))
        try:
            trace: Trace = jax.block_until_ready(_compiled(*spread, *options))
        except jax.errors.JaxRuntimeError:
            failure = next((h.failure for h in self.hosts if h.failure is not None), None)
            if failure is None:
                raise
            raise failure from None
        return trace

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChainParticles:
        """Return particles of the program at its arguments."""
        if isinstance(self.program, ReverseChain):
            assert self.potential is not None
            plates = len(self.program.batch_shape)
            alone = PotentialTarget(self.potential, "x", plates)
            return particles_of(self.method, {"x": self.program}, alone, None, self.shards)
        # What is read does not depend on the key, so that one program is compiled once.
        chains, target = read(self.program, args, kwargs, jax.random.key(0))
        mover = None
        steps = next(iter(chains.values())).num_steps
        if target.latents and self.moves is not None and moves_latents(self.method, steps):
            sites = sites_of(target)
            mover = Mover(sites, self.moves) if sites.names else None
        return particles_of(self.method, chains, target, mover, self.shards)

    def _posterior(
        self, particles: ChainParticles, trace: Trace, scout: Trace | None, seconds: float
    ) -> ParticlePosterior:
        tokens = {name: _tensor(x) for name, x in trace.carry["tokens"].items()}
        first = next(iter(particles.chains))
        program = not isinstance(self.program, ReverseChain)
        alive = torch.isfinite(_tensor(trace.log_evidence_steps))
        dead = ~alive.all(-1)
        fields = SMCTrace(
            carry={},
            weights=Weights(_float(trace.log_weights)),
            log_potential=_float(trace.log_potential),
            log_evidence_steps=_float(trace.log_evidence_steps),
            ess=_float(trace.ess),
            resampled=_tensor(trace.resampled),
            ancestors=_tensor(trace.ancestors).long(),
            log_mass=_float(trace.log_mass),
            died_at=torch.where(dead, alive.sum(-1), -1),
            multinomial=isinstance(self.resampler, Multinomial),
            history=[{"state": x} for x in _tensor(trace.history)] if self.store_path else [],
        )
        runs, num = self.size
        paths = self._paths(fields, particles)
        samples = {**paths, **_samples(particles, trace)} if program else {"x0": tokens[first]}
        return ParticlePosterior(
            x0=tokens[first],
            times=torch.tensor(particles.chains[first].kernel.times, dtype=torch.float64),
            samples=samples,
            num_evaluations=runs * num * self._rows(particles) * len(particles.chains),
            num_potential_calls=runs * num * self._calls(particles),
            law=self._law(particles),
            settings={
                "backend": "numpyro",
                "method": self.method.name,
                "twist": None if particles.twist is None else particles.twist.name,
                **options_of(self.method),
                **({"host": True} if self.hosts else {}),
                "resampler": self.resampler.name,
                "ess_threshold": self.ess_threshold,
                **self._latent_settings(particles, trace),
                "num_steps": particles.num_steps,
            },
            seconds=seconds,
            num_move_rows=_move_rows(particles, trace) + _scout_rows(particles, scout),
            num_scout_rows=_scout_rows(particles, scout),
            compact_path=None if program else paths.get(first),
            is_program=program,
            **fields.posterior_fields(),
        )

    def _rows(self, particles: ChainParticles) -> int:
        """Return how many states of each particle the network of a chain sees."""
        return particles.num_steps * rows_per_step(self.method)

    def _calls(self, particles: ChainParticles) -> int:
        """Return how many sequences of each particle are weighed."""
        each = rows_per_step(self.method)
        return each * (1 + (particles.num_steps - (each > 1)) * _fills(particles))

    def _latent_settings(self, particles: ChainParticles, trace: Trace) -> dict[str, Any]:
        """Return what was done about latents, in JSON types."""
        target: Any = particles.target
        if not _drawn_of(target):
            return {}
        discrete = {DISCRETE: sites_of(target).listed}
        if particles.mover is None:
            left = {"kernels": {}, "left": self._left(target, particles.num_steps)}
            return {**discrete, "latent_moves": left}
        return {**discrete, "latent_moves": _moves_made(particles.mover, trace)}

    def _left(self, target: Any, num_steps: int) -> dict[str, str]:
        if self.moves is None:
            return dict.fromkeys(_drawn_of(target), "moves=None")
        if not moves_latents(self.method, num_steps):
            return dict.fromkeys(
                _drawn_of(target), "the method keeps scores of latents of the past"
            )
        return dict(sites_of(target).left)

    def _paths(self, trace: SMCTrace, particles: ChainParticles) -> dict[str, torch.Tensor]:
        """Return the paths of all chains, ``(R, N, *plates, T + 1, L)``, where they were stored."""
        states, paths, at = trace.path(), {}, 0
        if states is None:
            return {}
        for name, chain in particles.chains.items():
            shape = (*chain.batch_shape, chain.length)
            own = states[..., at : (at := at + math.prod(shape))]
            paths[name] = own.reshape(*states.shape[:3], *shape).movedim(2, -2)
        return paths

    def _law(self, particles: ChainParticles) -> Law:
        bases = [_base(name, chain) for name, chain in particles.chains.items()]
        of = getattr(self.potential or self.program, "__name__", "potential")
        law = Law.tilted(bases, [Tilt(of)], _drawn_of(particles.target))
        own = particles.mover is not None and particles.mover.options.tuning == "own"
        return law.but(why=TUNED_ON_THEMSELVES) if own else law


def _drawn_of(target: Any) -> tuple[str, ...]:
    """Return the names of all latents of a target."""
    return tuple(getattr(target, "latents", ())) + tuple(getattr(target, "late", ()))


def _run(
    particles: ChainParticles,
    noise: KeyNoise,
    size: Size,
    resampler: Resampler,
    ess_threshold: float,
    store_path: bool,
    mesh: Mesh | None,
) -> Trace:
    def run(particles: ChainParticles, noise: KeyNoise) -> Trace:
        options: dict[str, Any] = {"store_path": store_path, "shards": particles.shards}
        if particles.mover is not None:
            options["renew"] = partial(particles.renew, noise, particles.shards.part(size))
        return run_particles(particles, noise, size, resampler, ess_threshold, **options)

    return on_mesh(mesh, run, Trace.layout(particles.shards.axis))(particles, noise)


_compiled = eqx.filter_jit(_run)


@eqx.filter_jit
def _shown(target: Any, latents: dict[str, Array], tokens: dict[str, Array]) -> dict[str, Array]:
    values: dict[str, Array] = target.samples(latents, tokens)
    return values


def _tuned(scout: Trace) -> Tuned:
    """Return what a scout found out; before the first step nothing is done."""
    found = scout.renewals
    ready = {k: jnp.concatenate([jnp.zeros_like(x[:1]), x]) for k, x in found.items()}
    level = jnp.concatenate([jnp.full_like(found["level"][:1], -jnp.inf), found["level"]])
    return Tuned(ready["due"] > 0, ready["number"], ready["scale"], ready["root"], level)


def _moves_made(mover: Mover, trace: Trace) -> dict[str, Any]:
    """Return what was done, by steps made."""
    found = {name: np.asarray(x) for name, x in trace.renewals.items()}
    steps = np.flatnonzero(found["due"])
    return {
        "kernels": mover.kernels,
        "schedule": [int(k) + 1 for k in steps],
        "numbers": [int(n) for n in found["number"][steps]],
        "acceptance": [round(float(x), 3) for x in found["share"][steps]],
        "left": dict(mover.sites.left),
        "tuning": mover.options.tuning,
        "tempering": mover.options.tempering,
        "evidence": "consistent, not unbiased" if mover.options.tuning == "own" else "unbiased",
    }


def _move_rows(particles: ChainParticles, trace: Trace) -> int:
    """Return how many sequences were weighed to move latents."""
    if particles.mover is None:
        return 0
    number = np.asarray(trace.renewals["number"]) * np.asarray(trace.renewals["due"])
    each = np.full(len(number), _fills(particles))
    each[-1] = 1  # finished sequences
    return int(trace.log_weights.size * particles.mover.rows * (number * each).sum())


def _scout_rows(particles: ChainParticles, scout: Trace | None) -> int:
    """Return how many states and sequences a scout asked about."""
    if scout is None:
        return 0
    steps = particles.num_steps
    asked = steps * (len(particles.chains) + _fills(particles)) + 1
    return scout.log_weights.size * asked + _move_rows(particles, scout)


def _fills(particles: ChainParticles) -> int:
    return 0 if particles.twist is None else particles.twist.num_fills


def _samples(particles: ChainParticles, trace: Trace) -> dict[str, torch.Tensor]:
    target: Any = particles.target
    # Once, on one device, whoever moved them.
    latents, tokens = jax.device_get((trace.carry["latents"], trace.carry["tokens"]))
    values = _shown(target, latents, tokens)
    return {name: _tensor(value) for name, value in values.items()}


def _base(name: str, chain: ReverseChain) -> Base:
    prompted = int(
        np.broadcast_to(np.asarray(chain.fixed), (*chain.batch_shape, chain.length)).sum()
    )
    free = chain.length - prompted / math.prod(chain.batch_shape)
    leaves = [_tensor(x) for x in jax.tree.leaves((chain.kernel, chain.prompt))]
    return Base(
        site=name,
        kernel=f"InterpolatingKernel({chain.kernel.process!r}, {chain.num_steps} steps)",
        steps=chain.num_steps,
        length=chain.length,
        plates=tuple(chain.batch_shape),
        prompted=prompted,
        digest=digest(leaves),
        masked=free if chain.kernel.process.absorbing else 0.0,
    )


def _tensor(x: Array) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(x))
    # Whole numbers have 32 bits where JAX's 64-bit numbers are off.
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _float(x: Array) -> torch.Tensor:
    return _tensor(x).double()
