"""The bootstrap filter of a hidden Markov model in JAX: by hand, by our engine, by a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax

import ppl_diffusion.numpyro as ppn
from benchmarks._filters import HMM
from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.engine import Size, run_particles
from ppl_diffusion.numpyro.noise import MOVE, KeyNoise, Noise
from ppl_diffusion.smc.resampling import Resampler, as_resampler

Filter = Callable[[int, int], float]
"""``(particles, seed) -> log evidence``, compiled once for each number of particles."""

BY_HAND, ENGINE, SHUFFLED = "jitted scan", "run_particles", "run_particles, systematic"
PROGRAM = "smc_scan"


def filters(model: HMM) -> dict[str, Filter]:
    """Return the filters of a model.

    :param model: what is filtered.
    """
    return {
        BY_HAND: by_hand(model),
        ENGINE: by_engine(model, "ssp"),
        SHUFFLED: by_engine(model, "systematic"),
        PROGRAM: by_program(model),
    }


def by_hand(model: HMM) -> Filter:
    """Return what one would write for this model alone: a scan, a comb, nothing kept."""
    start, following, log_g = (jnp.asarray(table, "float32") for table in model.tables.values())
    last = model.num_steps - 1

    def evidence(key: Array, num_particles: int) -> Array:
        comb = jnp.arange(num_particles)

        def step(state: Any, x: Any) -> Any:
            (states, log_w, log_z), (k, worth) = state, x
            move, resample = jax.random.split(jax.random.fold_in(key, k))
            ends = jnp.where(k > 0, following[states], start)
            uniform = jax.random.uniform(move, (num_particles,))
            states = (uniform[:, None] >= ends[:, :-1]).sum(-1)
            log_w = log_w + worth[states]
            total = jax.nn.logsumexp(log_w)
            weights = jnp.exp(log_w - total)

            def resampled(_: Any) -> Any:
                teeth = (comb + jax.random.uniform(resample)) / num_particles
                found = jnp.searchsorted(jnp.cumsum(weights), teeth)
                gained = total - jnp.log(num_particles)
                chosen = states[jnp.minimum(found, num_particles - 1)]
                return chosen, jnp.zeros_like(log_w), log_z + gained

            due = (weights @ weights * num_particles > 2) & (k < last)
            return lax.cond(due, resampled, lambda same: same, (states, log_w, log_z)), None

        init = jnp.zeros(num_particles, int), jnp.zeros(num_particles), jnp.zeros(())
        (_, log_w, log_z), _ = lax.scan(step, init, (jnp.arange(last + 1), log_g))
        return log_z + jax.nn.logsumexp(log_w) - jnp.log(num_particles)

    compiled = jax.jit(evidence, static_argnums=1)
    return lambda num_particles, seed: float(compiled(jax.random.key(seed), num_particles))


class Bootstrap(eqx.Module):
    """The particles of the filter as :func:`~ppl_diffusion.numpyro.engine.run_particles` has them.

    :param start: running sums of the law of the first state, ``(S,)``.
    :param following: of the next state by state, ``(S, S)``.
    :param log_g: log-probability of each symbol by state, ``(T, S)``.
    """

    start: Array
    following: Array
    log_g: Array

    @property
    def num_steps(self) -> int:
        """Number ``T`` of symbols."""
        return len(self.log_g)

    def init(self, noise: Noise, size: Size) -> Array:
        """Return states before the first symbol, which do not matter."""
        return jnp.zeros(size, int)

    def move(
        self, states: Array, k: Array, base: Array, noise: Noise, size: Size
    ) -> tuple[Array, Array]:
        """Draw the states of symbol ``k`` and weigh them by it."""
        ends = jnp.where(jnp.asarray(k) > 0, self.following[states], self.start)
        uniform = noise.particles(MOVE, k, (), size)
        states = (uniform[..., None] >= ends[..., :-1]).sum(-1)
        return states, self.log_g[k][states]

    def look(self, states: Array, k: Array, base: Array) -> tuple[Array, Array]:
        """Look at nothing but what was seen."""
        return states, jnp.zeros(())

    def close(self, states: Array) -> Array:
        """Return nothing: all was weighed step by step."""
        return jnp.zeros(())

    def record(self, states: Array) -> Array:
        """Return the states."""
        return states


def by_engine(model: HMM, resampler: str) -> Filter:
    """Return the filter by the engine under all our methods.

    :param resampler: name of the scheme.
    """
    particles = Bootstrap(*(jnp.asarray(table, "float32") for table in model.tables.values()))
    scheme = as_resampler(resampler)

    def run(num_particles: int, seed: int) -> float:
        return float(
            _evidence(particles, KeyNoise(jax.random.key(seed)), (1, num_particles), scheme)
        )

    return run


@eqx.filter_jit
def _evidence(particles: Bootstrap, noise: KeyNoise, size: Size, scheme: Resampler) -> Array:
    trace = run_particles(particles, noise, size, scheme, 0.5, store_path=False)
    return trace.log_evidence_steps[0, -1]


def by_program(model: HMM) -> Filter:
    """Return the filter by a NumPyro program, with all that its posterior holds."""
    start, following, log_g = (jnp.asarray(table, "float32") for table in model.tables.values())

    def step(state: Array, x: tuple[Array, Array]) -> tuple[Array, None]:
        k, worth = x
        uniform = numpyro.sample("uniform", dist.Uniform())
        state = (uniform >= jnp.where(k > 0, following[state], start)[:-1]).sum()
        numpyro.factor("symbol", worth[state])
        return state, None

    def run(num_particles: int, seed: int) -> float:
        key, xs = jax.random.key(seed), (jnp.arange(model.num_steps), log_g)
        found = ppn.smc_scan(step, jnp.asarray(0), xs, key=key, num_particles=num_particles)
        return float(found.log_evidence[0])

    return run
