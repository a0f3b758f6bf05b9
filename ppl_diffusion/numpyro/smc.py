"""Particles over NumPyro programs: one call, compiled, with the results of the torch engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
import torch

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.engine import Trace, check, run_particles
from ppl_diffusion.numpyro.feynman_kac import ChainParticles, Look, look_ahead
from ppl_diffusion.numpyro.noise import KeyNoise
from ppl_diffusion.numpyro.program import PotentialTarget, read
from ppl_diffusion.numpyro.reverse_chain import ReverseChain
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.law import Base, Law, Tilt, digest
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Multinomial, Resampler, as_resampler
from ppl_diffusion.smc.weights import Weights

Program = Callable[..., Any]


class SMC:
    """Sequential Monte Carlo over a NumPyro program, or over a chain with a potential.

    The twin of :class:`ppl_diffusion.inference.SMC` with the bootstrap proposal: particles move by
    their chains, look ahead defensively, and are weighed by everything the program observes. Its
    result is the same :class:`~ppl_diffusion.smc.ParticlePosterior`: evidence, verdicts, ArviZ.
    Latents are drawn once, from their prior, and not moved afterwards.

    :param program: a NumPyro model with at least one :class:`ReverseChain` site, or a chain.
    :param potential: of a chain: ``x0 (*batch, L) -> log G (*batch,)``, written in JAX.
    :param num_particles: particles ``N`` per run.
    :param num_runs: independent runs ``R``, side by side.
    :param twist: ``"defensive"`` or :class:`~ppl_diffusion.smc.twists.Defensive`; None is plain
        importance sampling until the end.
    :param resampler: a name, or a :class:`~ppl_diffusion.smc.Resampler`.
    :param ess_threshold: resample a run when its ESS falls below this fraction of ``N``.
    :raises ValueError: if the settings are impossible.

    Example::

        posterior = SMC(assay, num_particles=256, num_runs=4).run(jax.random.key(0), y=3.0)
        posterior.log_evidence
    """

    def __init__(
        self,
        program: Program | ReverseChain,
        potential: Callable[[Array], Array] | None = None,
        *,
        num_particles: int = 64,
        num_runs: int = 1,
        twist: Look = "defensive",
        resampler: str | Resampler = "systematic",
        ess_threshold: float = 0.5,
        store_path: bool = True,
    ) -> None:
        if isinstance(program, ReverseChain) == (potential is None):
            raise ValueError(
                "SMC: give a program alone, or a ReverseChain with a potential; what weighs a "
                "program's sequences are its own observations and factors."
            )
        if num_particles < 1 or num_runs < 1 or not 0 <= ess_threshold < math.inf:
            raise ValueError(
                "SMC: num_particles and num_runs must be >= 1 and ess_threshold >= 0, got "
                f"{num_particles}, {num_runs} and {ess_threshold}."
            )
        self.program, self.potential = program, potential
        self.twist = look_ahead(twist, "SMC")
        self.size = (num_runs, num_particles)
        self.resampler, self.ess_threshold = as_resampler(resampler), ess_threshold
        self.store_path = store_path

    def run(self, key: Array, *args: Any, **kwargs: Any) -> ParticlePosterior:
        """Run all particles, in one compiled scan.

        :param key: a JAX random key.
        :param args: arguments of the program. Arrays among them are traced; numbers are compiled
            in, so that another one compiles anew.
        :raises CapabilityError: if the engine cannot move the program's chains.
        :raises ValueError: if a weight became NaN or ``+inf``.
        """
        started = time.perf_counter()
        particles = self._particles(args, kwargs)
        trace = _compiled(
            particles,
            KeyNoise(key),
            self.size,
            self.resampler,
            self.ess_threshold,
            self.store_path,
        )
        check(trace.log_evidence_steps)
        return self._posterior(particles, trace, time.perf_counter() - started)

    def _particles(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChainParticles:
        if isinstance(self.program, ReverseChain):
            assert self.potential is not None
            plates = len(self.program.batch_shape)
            target = PotentialTarget(self.potential, "x", plates)
            return ChainParticles({"x": self.program}, target, self.twist)
        # What is read does not depend on the key, so that one program is compiled once.
        chains, weighed = read(self.program, args, kwargs, jax.random.key(0))
        return ChainParticles(chains, weighed, self.twist)

    def _posterior(
        self, particles: ChainParticles, trace: Trace, seconds: float
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
            num_evaluations=runs * num * particles.num_steps * len(particles.chains),
            num_potential_calls=runs * num * self._calls(particles.num_steps),
            law=self._law(particles),
            settings={
                "backend": "numpyro",
                "twist": None if self.twist is None else self.twist.name,
                "resampler": self.resampler.name,
                "ess_threshold": self.ess_threshold,
                "num_steps": particles.num_steps,
            },
            seconds=seconds,
            compact_path=None if program else paths.get(first),
            is_program=program,
            **fields.posterior_fields(),
        )

    def _calls(self, steps: int) -> int:
        return 1 + (0 if self.twist is None else steps * self.twist.num_fills)

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
        latents = getattr(particles.target, "latents", ())
        return Law.tilted(bases, [Tilt(of)], latents)


@partial(eqx.filter_jit)
def _compiled(
    particles: ChainParticles,
    noise: KeyNoise,
    size: tuple[int, int],
    resampler: Resampler,
    ess_threshold: float,
    store_path: bool,
) -> Trace:
    return run_particles(particles, noise, size, resampler, ess_threshold, store_path=store_path)


def _samples(particles: ChainParticles, trace: Trace) -> dict[str, torch.Tensor]:
    target: Any = particles.target
    values = eqx.filter_jit(target.samples)(trace.carry["latents"], trace.carry["tokens"])
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
    return torch.from_numpy(np.array(x))


def _float(x: Array) -> torch.Tensor:
    return _tensor(x).double()
