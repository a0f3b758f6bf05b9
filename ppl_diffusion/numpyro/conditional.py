"""Conditional SMC in one scan: a population of particles around paths that are kept.

Slot 0 follows the retained path, and keeps itself at every resampling; the others draw their
ancestors independently. One slot drawn by the final weights, traced back, is the next path: a
Markov kernel that leaves ``p(path) G(x0)`` invariant (Andrieu, Doucet and Holenstein 2010; see
:mod:`ppl_diffusion.smc.conditional`, whose scheme of resampling this is).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.engine import Size, Trace, run_particles
from ppl_diffusion.numpyro.feynman_kac import ChainParticles
from ppl_diffusion.numpyro.noise import PICK, Noise
from ppl_diffusion.processes.noise import draw_categorical
from ppl_diffusion.smc.conditional import ConditionalMultinomial
from ppl_diffusion.smc.resampling import Resampler


class RetainedParticles(ChainParticles):
    """Particles whose slot 0 follows a retained path.

    :param retained: one path per run by chain, ``(R, *plates, T + 1, L)``.
    """

    retained: Mapping[str, Array]

    def held(self, tokens: Mapping[str, Array], k: Array) -> dict[str, Array]:
        """Put the retained states into slot 0."""
        return {
            name: x.at[:, 0].set(jnp.take(self.retained[name], k, axis=-2).astype(x.dtype))
            for name, x in tokens.items()
        }


class Sweep(NamedTuple):
    """What a conditional sweep leaves behind.

    :param paths: the next paths, ``(R, *plates, T + 1, L)`` by chain.
    :param slot: the slots they were drawn from, ``(R,)``; 0 is the retained one.
    :param ess: smallest effective sample size of the steps, as a share of ``N``, ``(R,)``.
    """

    paths: dict[str, Array]
    slot: Array
    ess: Array


def sweep(
    particles: RetainedParticles,
    noise: Noise,
    size: Size,
    ess_threshold: float,
    resampler: Resampler | None = None,
) -> Sweep:
    """Make one conditional SMC sweep from each of ``R`` retained paths. Pure: to be compiled.

    :param size: runs ``R`` and particles ``N`` of each, at least 2, the retained one included.
    :param ess_threshold: fraction of ``N`` below which a run is resampled.
    """
    scheme = ConditionalMultinomial() if resampler is None else resampler
    trace = run_particles(particles, noise, size, scheme, ess_threshold)
    states, slot = picked(trace, noise)
    paths, at = {}, 0
    for name, chain in particles.chains.items():
        shape = (*chain.batch_shape, chain.length)
        count = math.prod(shape)
        own = states[:, :, at : at + count].reshape(*states.shape[:2], *shape)
        paths[name], at = jnp.moveaxis(own, 1, -2), at + count
    return Sweep(paths, slot, trace.ess.min(-1) / size[1])


def picked(trace: Trace, noise: Noise) -> tuple[Array, Array]:
    """Draw one particle of each run by its weight.

    :returns: the states it descends from, ``(R, T + 1, W)``, and its slot, ``(R,)``; slot 0 of a
        run in which all are dead.
    """
    alive = trace.log_weights.max(-1) > -jnp.inf
    log_w = jnp.where(alive[:, None], trace.log_weights, 0.0)
    slot = draw_categorical(log_w, noise.runs(PICK, 0, (), len(alive)))
    slot = jnp.where(alive, slot, 0)
    return _traced_back(trace, slot), slot


def _traced_back(trace: Trace, slot: Array) -> Array:
    """Return the states that one particle of each run descends from, ``(R, T + 1, W)``."""
    runs = jnp.arange(len(slot))

    def back(slot: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        states, parents = step
        return parents[runs, slot], states[runs, slot]

    after, start = trace.history[1:], trace.history[0]
    first, states = lax.scan(back, slot, (after, trace.ancestors), reverse=True)
    return jnp.moveaxis(jnp.concatenate([start[runs, first][None], states]), 0, 1)
