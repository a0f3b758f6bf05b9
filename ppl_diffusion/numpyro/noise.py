"""Where uniforms come from: random keys, with a stream for each particle.

Particle ``n`` of run ``r`` draws from stream ``n`` of ``fold_in(fold_in(key, step), r)``: what it
draws depends neither on how many others there are nor on how many devices they live on. Keys are
made only where a program asks for them: one for each particle would cost as much as the numbers.
"""

from __future__ import annotations

from typing import Protocol

import equinox as eqx
import jax
import jax.numpy as jnp

from ppl_diffusion.arrays import Array
from ppl_diffusion.numpyro.sharding import Shards
from ppl_diffusion.processes.noise import jax_uniforms

MOVE, RESAMPLE, LATENT, FILL, PICK, RENEW, SCOUT = range(7)
"""What noise is for; each has a stream of its own."""


class Noise(Protocol):
    """A source of noise for ``(R, N)`` particles; a pytree."""

    def particles(self, use: int, k: Array, shape: tuple[int, ...], size: tuple[int, int]) -> Array:
        """Return uniforms of each particle, ``(R, N, *shape)``.

        :param use: :data:`MOVE` or :data:`FILL`.
        :param k: step, also a traced one.
        :param size: ``(R, N)``.
        """
        ...

    def runs(self, use: int, k: Array, shape: tuple[int, ...], size: int) -> Array:
        """Return uniforms of each run, ``(R, *shape)``."""
        ...

    def keys(self, use: int, k: Array, size: tuple[int, int]) -> Array:
        """Return random keys of each particle, ``(R, N)``."""
        ...


class KeyNoise(eqx.Module):
    """Noise from one random key.

    :param key: a JAX random key.
    :param shards: how particles lie on devices.
    """

    key: Array
    shards: Shards = eqx.field(static=True, default=Shards())

    def keys(self, use: int, k: Array, size: tuple[int, int]) -> Array:
        """Return random keys of each particle, see :class:`Noise`."""
        rows = self._run_keys(use, k, size[0])
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return fold(rows, self._numbers(size))

    def particles(self, use: int, k: Array, shape: tuple[int, ...], size: tuple[int, int]) -> Array:
        """Return uniforms of each particle, see :class:`Noise`."""
        rows, numbers = self._run_keys(use, k, size[0]), self._numbers(size)
        return jax.vmap(lambda key: jax_uniforms(key, shape, numbers))(rows)

    def runs(self, use: int, k: Array, shape: tuple[int, ...], size: int) -> Array:
        """Return uniforms of each run, see :class:`Noise`."""
        return jax.vmap(lambda key: jax_uniforms(key, shape))(self._run_keys(use, k, size))

    def _numbers(self, size: tuple[int, int]) -> Array:
        """Return which of all particles those of this device are, ``(N,)``."""
        return self.shards.own(jnp.arange(size[1] * self.shards.count)[None])[0]

    def _run_keys(self, use: int, k: Array, size: int) -> Array:
        step = jax.random.fold_in(jax.random.fold_in(self.key, use), k)
        return jax.vmap(jax.random.fold_in, (None, 0))(step, jnp.arange(size))
