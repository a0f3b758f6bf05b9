"""The distribution of one reverse step in NumPyro."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.batch_util import vmap_over
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from ppl_diffusion.arrays import Array
from ppl_diffusion.kernels.shapes import check_expand
from ppl_diffusion.kernels.step import MAX_ENUMERATE
from ppl_diffusion.numpyro.shapes import enumerated
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import mixture_log_prob, mixture_sample
from ppl_diffusion.processes.noise import jax_uniforms


class TokenStep(Distribution):
    """One step of a reverse chain, a product over positions of three-way mixtures.

    The twin of :class:`ppl_diffusion.distributions.TokenStep`: event shape ``(L,)``, values are
    state ids, exact and normalised; the formulas are the same code.

    :param process: the forward process.
    :param tokens: current states, integers ``(*batch, L)``.
    :param log_probs: cavity log-probabilities of the denoiser, ``(*batch, L, V)``; zeros of the
        prediction are ``-inf``.
    :param alpha_t: signal level of the current state, a number, also a traced one.
    :param alpha_s: signal level after the step, at least ``alpha_t``.
    :param kappa: Psi parameter, 1 is ancestral; a number, or one per site, broadcastable to
        ``(*batch, L)``.
    :param fixed: bool ``(*batch, L)``, positions that keep their token with probability one and
        contribute nothing to the density, or None.
    :raises ValueError: if the shapes do not fit.
    """

    # Levels are numbers: only the first two have batch dimensions that `scan` may add to.
    arg_constraints = {  # noqa: RUF012 (NumPyro's class protocol)
        "tokens": constraints.dependent(is_discrete=True, event_dim=1),
        "log_probs": constraints.dependent(is_discrete=False, event_dim=2),
    }
    pytree_data_fields = ("tokens", "log_probs", "alpha_t", "alpha_s", "kappa", "fixed")
    pytree_aux_fields = ("process",)
    has_enumerate_support = True

    def __init__(
        self,
        process: Process,
        tokens: Array,
        log_probs: Array,
        alpha_t: Array,
        alpha_s: Array,
        kappa: Array = 1.0,
        *,
        fixed: Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        length = jnp.shape(tokens)[-1]
        if jnp.shape(log_probs)[-2:] != (length, process.vocab_size):
            raise ValueError(
                f"TokenStep: log_probs must end in {(length, process.vocab_size)}, "
                f"got {jnp.shape(log_probs)}."
            )
        self.process = process
        self.tokens, self.log_probs = tokens, log_probs
        self.alpha_t, self.alpha_s, self.kappa, self.fixed = alpha_t, alpha_s, kappa, fixed
        batch = jnp.broadcast_shapes(jnp.shape(tokens)[:-1], jnp.shape(log_probs)[:-2])
        super().__init__(batch, (length,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of states."""
        last = self.process.num_states - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    def draw(self, noise: Array) -> Array:
        """Turn uniforms into next states; the same uniforms give the same states.

        :param noise: numbers in ``[0, 1)``, ``(2, *sample, *batch, L)``: of moves and of tokens.
        """
        tokens, log_c, (a, b, kappa) = self._fields(noise.shape[1:])
        value = mixture_sample(self.process, tokens, log_c, a, b, noise[0], noise[1], kappa)
        value = value.astype(tokens.dtype)
        return value if self.fixed is None else jnp.where(self._held(), tokens, value)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw next states, ``(*sample_shape, *batch, L)``.

        :param key: a JAX random key; uniforms have the resolution of
            :func:`~ppl_diffusion.processes.noise.jax_uniforms`.
        """
        assert is_prng_key(key)
        return self.draw(jax_uniforms(key, (2, *self.shape(sample_shape))))

    @validate_sample
    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Return the exact log-probability of next states.

        :param value: states, ``(*sample, *batch, L)``.
        :returns: float64 (float32 where 64-bit numbers are off), the broadcast batch shape.
        """
        shape = jnp.broadcast_shapes(jnp.shape(value), (*self.batch_shape, *self.event_shape))
        value = jnp.broadcast_to(value, shape)
        tokens, log_c, (a, b, kappa) = self._fields(shape)
        log_p = mixture_log_prob(self.process, tokens, value, log_c, a, b, kappa)
        if self.fixed is not None:
            log_p = jnp.where(self._held(), jnp.where(value == tokens, 0.0, -jnp.inf), log_p)
        return log_p.sum(-1)

    def predicting(self, log_probs: Array) -> TokenStep:
        """Return the step with another prediction of the clean tokens.

        :param log_probs: cavity log-probabilities, ``(*batch, L, V)``.
        """
        levels = self.alpha_t, self.alpha_s, self.kappa
        return TokenStep(
            self.process, self.tokens, log_probs, *levels, fixed=self.fixed, validate_args=False
        )

    def _aligned(self, x: Array, event_dim: int) -> Array:
        """Put the dimensions that ``scan`` or ``vmap`` added to a field first, ones after them."""
        added, whole = jnp.ndim(self.alpha_t), len(self.batch_shape) + event_dim
        if jnp.ndim(x) in (0, whole):
            return x
        shape = jnp.shape(x)
        return jnp.reshape(x, (*shape[:added], *(1,) * (whole - len(shape)), *shape[added:]))

    def _fields(self, shape: tuple[int, ...]) -> tuple[Array, Array, tuple[Array, ...]]:
        """Return tokens, prediction, and levels and kappa, for values of a shape."""
        size = self.process.vocab_size
        tokens = jnp.broadcast_to(self._aligned(self.tokens, 1), shape)
        log_c = jnp.broadcast_to(self._aligned(self.log_probs, 2), (*shape, size))
        numbers = tuple(self._aligned(x, 1) for x in (self.alpha_t, self.alpha_s, self.kappa))
        return tokens, log_c, numbers

    def _held(self) -> Array:
        return self._aligned(self.fixed, 1)

    def enumerate_support(self, expand: bool = True) -> Array:
        """Return every next state, ``(S ** L, *batch, L)``.

        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.process.num_states, expand, MAX_ENUMERATE)

    def expand(self, batch_shape: tuple[int, ...]) -> TokenStep:
        """Return the same law with larger batch dimensions (independent copies).

        :raises ValueError: if a batch dimension would shrink.
        """
        batch = tuple(check_expand(self.batch_shape, batch_shape))
        shape = (*batch, *self.event_shape)
        tokens, log_c, (a, b, kappa) = self._fields(shape)
        fixed = None if self.fixed is None else jnp.broadcast_to(self._held(), shape)
        return TokenStep(
            self.process, tokens, log_c, a, b, kappa, fixed=fixed, validate_args=self._validate_args
        )


@vmap_over.register
def _vmap_over(
    dist: TokenStep,
    tokens: Any = None,
    log_probs: Any = None,
    alpha_t: Any = None,
    alpha_s: Any = None,
    kappa: Any = None,
    fixed: Any = None,
) -> TokenStep:
    axes = copy.copy(dist)
    axes.tokens, axes.log_probs, axes.fixed = tokens, log_probs, fixed
    axes.alpha_t, axes.alpha_s, axes.kappa = alpha_t, alpha_s, kappa
    return axes
