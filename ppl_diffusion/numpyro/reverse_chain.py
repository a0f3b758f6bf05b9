"""The path distribution of a reverse chain in NumPyro."""

from __future__ import annotations

import copy
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from ppl_diffusion.arrays import Array, int64_of
from ppl_diffusion.kernels.shapes import check_expand
from ppl_diffusion.kernels.step import MAX_ENUMERATE
from ppl_diffusion.numpyro.kernel import InterpolatingKernel
from ppl_diffusion.numpyro.marginal import ChainMarginal
from ppl_diffusion.numpyro.shapes import enumerated
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.processes.base import whole_number
from ppl_diffusion.processes.noise import jax_uniforms


class ReverseChain(Distribution):
    """All states of a reverse chain, noisiest first: event shape ``(T + 1, L)``.

    The twin of :class:`ppl_diffusion.distributions.ReverseChain`. Its ``log_prob`` is exact and
    normalised, the clean sequence is :meth:`x0`; sampling scans over the steps and keeps the
    density, so that a site that is sampled and scored costs ``T`` network calls.

    :param kernel: the reverse kernel, a pytree.
    :param length: number ``L`` of positions.
    :param prompt: integers ``(L,)`` or ``(*batch, L)``: tokens present from the start, -1 where the
        chain is free. To condition on tokens of ``x0`` use
        :func:`ppl_diffusion.numpyro.clamp`.
    :raises ValueError: if the length or the prompt does not fit.
    """

    arg_constraints = {  # noqa: RUF012 (NumPyro's class protocol)
        "prompt": constraints.dependent(is_discrete=True, event_dim=1)
    }
    pytree_data_fields: tuple[str, ...] = ("kernel", "prompt", "added")
    pytree_aux_fields: tuple[str, ...] = ("length",)
    has_enumerate_support = True

    def __init__(
        self,
        kernel: InterpolatingKernel,
        length: int,
        prompt: Array | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.kernel = kernel
        self.length = whole_number(length, "ReverseChain: length")
        self.prompt = _check_prompt(prompt, self.length, kernel)
        # A leaf of no dimension: what `scan` and `vmap` put in front of it they put in front of all
        # leaves, those of the network too, whose own number of dimensions nobody knows.
        self.added = jnp.zeros(())
        event = (kernel.num_steps + 1, self.length)
        super().__init__(jnp.shape(self.prompt)[:-1], event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Constraint:
        """Paths of states."""
        last = self.kernel.process.num_states - 1
        return constraints.independent(constraints.integer_interval(0, last), 2)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return self.kernel.num_steps

    @property
    def fixed(self) -> Array:
        """Prompt positions, bool, broadcastable to ``(*batch, L)``."""
        return self.prompt >= 0

    @property
    def known(self) -> Array:
        """Tokens of the clean sequence that are known, ``(L,)`` or with a batch, -1 elsewhere."""
        return self.prompt

    def x0(self, path: Array) -> Array:
        """Return the clean sequence of a path.

        :param path: ``(*batch, T + 1, L)``.
        :returns: integers ``(*batch, L)``.
        :raises ValueError: if it is no path.
        """
        if jnp.shape(path)[-2:] != self.event_shape:
            raise ValueError(
                f"x0: expected a path (*batch, {self.event_shape[0]}, {self.length}), got shape "
                f"{jnp.shape(path)}."
            )
        return path[..., -1, :]

    def marginal(self) -> ChainMarginal:
        """Return the law of the clean sequence, as a distribution of its own."""
        return ChainMarginal(self)

    def start(self, noise: Array) -> Array:
        """Return noisiest states, with the prompt, from uniforms of their shape."""
        return self.kernel.start(noise, self.prompt)

    def start_log_prob(self, tokens: Array) -> Array:
        """Return the log-probability of noisiest states, ``(*batch,)``; a prompt is certain."""
        return self.kernel.prior_log_prob(tokens, self.prompt)

    def draw(self, noise: Array) -> tuple[Array, Array]:
        """Turn uniforms into paths; the same uniforms give the same path in torch and in JAX.

        :param noise: numbers in ``[0, 1)``, ``(2 T + 1, *batch, L)``: of the start, then two per
            step, of moves and of tokens.
        :returns: the path ``(*batch, T + 1, L)`` and its log-probability ``(*batch,)``.
        """
        start = self.start(noise[0])
        steps = noise[1:].reshape(self.num_steps, 2, *noise.shape[1:])
        path, log_p, _ = self._scanned(start, lambda step, u: step.draw(u), steps)
        return path, log_p

    def proposal(self, step: TokenStep, k: Array) -> TokenStep:
        """Return how a path is drawn that is weighed by ``step``: by that step itself."""
        return step

    def sample_with_intermediates(
        self, key: Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, list[Any]]:
        """Draw paths with ``T`` network calls, and keep their log-probabilities."""
        path, log_p, _ = self._drawn(key, sample_shape)
        return path, [log_p]

    # Compiled once for a chain and a shape: programs are run many times before they are compiled.
    @eqx.filter_jit
    def _drawn(self, key: Array, sample_shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
        assert is_prng_key(key)
        if self.added.ndim:
            raise ValueError("ReverseChain: a stacked chain is scored, not drawn from.")
        first, *keys = jax.random.split(key, self.num_steps + 1)
        shape = (*sample_shape, *self.batch_shape, self.length)
        start = self.start(jax_uniforms(first, shape))
        return self._scanned(start, lambda step, k: step.sample(k), jnp.stack(keys))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw paths, integers ``(*sample_shape, *batch, T + 1, L)``."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def _scanned(self, start: Array, draw: Any, noise: Array) -> tuple[Array, Array, Array]:
        """Return a path, its log-density, and that under the law it was drawn from."""

        def move(tokens: Array, given: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
            k, own = given
            step = self.kernel.step(tokens, k, fixed=self.fixed)
            moves = self.proposal(step, k)
            new = draw(moves, own)
            log_p = step.log_prob(new)
            return new, (new, log_p, log_p if moves is step else moves.log_prob(new))

        ks = jnp.arange(self.num_steps)
        _, (states, *steps) = lax.scan(move, start, (ks, noise))
        path = jnp.moveaxis(jnp.concatenate([start[None], states]), 0, -2)
        log_p, log_q = (self.start_log_prob(start) + x.sum(0) for x in steps)
        return path, log_p, log_q

    @validate_sample
    def log_prob(self, value: Array, intermediates: list[Any] | None = None) -> Array:
        """Return the exact log-probability of paths.

        :param value: states, ``(*sample, *batch, T + 1, L)``.
        :param intermediates: what sampling kept: the answer, at no network call.
        :returns: the broadcast batch shape; ``-inf`` for impossible paths.
        """
        if intermediates:
            return intermediates[0]
        if self.added.ndim:
            return self._stacked_log_prob(value)
        shape = jnp.broadcast_shapes(jnp.shape(value)[:-2], self.batch_shape)
        path = jnp.broadcast_to(value, (*shape, *self.event_shape))
        states = jnp.moveaxis(path, -2, 0)

        def score(total: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
            k, before, after = given
            return total + self.kernel.step(before, k, fixed=self.fixed).log_prob(after), None

        start = self.start_log_prob(states[0])
        ks = jnp.arange(self.num_steps)
        return lax.scan(score, start, (ks, states[:-1], states[1:]))[0]

    def _stacked_log_prob(self, value: Array) -> Array:
        # One law for each entry of the dimensions that were put in front of all leaves.
        one = copy.copy(self)
        one._batch_shape = self.batch_shape[1:]
        one.added = self.added
        value = jnp.broadcast_to(value, (*self.batch_shape, *self.event_shape))
        return jax.vmap(lambda chain, path: chain.log_prob(path))(one, value)

    def enumerate_support(self, expand: bool = True) -> Array:
        """Return all paths, ``(S ** (L (T + 1)), *batch, T + 1, L)``, for tiny chains.

        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.kernel.process.num_states, expand, MAX_ENUMERATE)

    def expand(self, batch_shape: tuple[int, ...]) -> ReverseChain:
        """Return the same chain with larger batch dimensions (independent copies).

        :raises ValueError: if a batch dimension would shrink.
        """
        batch = tuple(check_expand(self.batch_shape, batch_shape))
        prompt = jnp.broadcast_to(self.prompt, (*batch, self.length))
        new = copy.copy(self)
        new.prompt, new._batch_shape = prompt, batch
        return new

    def __repr__(self) -> str:
        shapes = f"batch_shape={self.batch_shape}, event_shape={self.event_shape}"
        return f"ReverseChain({self.kernel.process!r}, {shapes})"


@promote_batch_shape.register
def _promote(d: ReverseChain) -> ReverseChain:
    new = copy.copy(d)
    new._batch_shape = (*d.added.shape, *d.batch_shape[max(0, _known(d)) :])
    return new


def _known(d: ReverseChain) -> int:
    """Return how many of the added dimensions the batch shape has already."""
    own = jnp.ndim(d.prompt) - 1 - d.added.ndim
    return len(d.batch_shape) - own


@vmap_over.register
def _vmap_over(dist: ReverseChain, kernel: Any = None, prompt: Any = None) -> ReverseChain:
    axes = copy.copy(dist)
    axes.kernel, axes.prompt = kernel, prompt
    axes.added = None
    return axes


def _check_prompt(prompt: Array | None, length: int, kernel: InterpolatingKernel) -> Array:
    if prompt is None:
        return jnp.full((length,), -1, int64_of(jnp))
    if not jnp.issubdtype(jnp.result_type(prompt), jnp.integer):
        raise TypeError(
            f"ReverseChain: prompt must hold integer ids, got {jnp.result_type(prompt)}."
        )
    if jnp.shape(prompt)[-1:] != (length,):
        raise ValueError(
            f"ReverseChain: prompt must have shape ({length},) or (*batch, {length}), got "
            f"{jnp.shape(prompt)}."
        )
    if not isinstance(prompt, jax.core.Tracer):
        ids = np.asarray(prompt)
        if ids.max() >= kernel.process.vocab_size or ids.min() < -1:
            raise ValueError(
                "ReverseChain: prompt must hold clean token ids, and -1 where it is free."
            )
    return jnp.asarray(prompt)
