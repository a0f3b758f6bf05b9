"""Forward noising processes that interpolate between the data and a categorical prior.

A token survives with probability ``alpha(t)`` and is otherwise redrawn from the prior ``pi``::

    q(z_t = j | x) = alpha 1[j = x] + (1 - alpha) pi_j

The absorbing process has ``pi = delta_mask`` over ``V + 1`` states (the mask has id ``V``), the
uniform one ``pi = 1/V``, and :class:`Interpolating` any categorical prior over the clean tokens
(D3PM, Austin et al. 2021, arXiv:2107.03006; UDLM, Schiff et al. 2024, arXiv:2412.10193).
"""

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, int64_of
from ppl_diffusion.processes.schedules import Linear, Schedule


class Process:
    """Base of the interpolating processes.

    :param vocab_size: number ``V`` of clean tokens; states from ``V`` on are never clean.
    :raises ValueError: if the prior is not a distribution over at least ``V`` states.
    """

    def __init__(
        self, prior: Sequence[float] | Array, vocab_size: int, schedule: Schedule | None = None
    ) -> None:
        vocab_size = whole_number(vocab_size, f"{type(self).__name__}: vocab_size")
        probs = np.asarray(prior, dtype=np.float64)
        if probs.ndim != 1 or probs.size < vocab_size:
            raise ValueError(
                f"prior must be a vector over >= {vocab_size} states, got shape {probs.shape}."
            )
        if not np.all(np.isfinite(probs)) or probs.min() < 0 or abs(probs.sum() - 1) > 1e-6:
            raise ValueError("prior must hold finite, non-negative probabilities that sum to one.")
        self.vocab_size = vocab_size
        self.schedule = Linear() if schedule is None else schedule
        self.prior = probs / probs.sum()

    @property
    def num_states(self) -> int:
        """Number of states a noised token can take (``V``, or ``V + 1`` with a mask)."""
        return int(self.prior.size)

    @property
    def mask_id(self) -> int | None:
        """Id of the mask state, or None."""
        return self.vocab_size if self.absorbing else None

    @property
    def absorbing(self) -> bool:
        """Whether all prior mass sits on one extra mask state."""
        return self.num_states == self.vocab_size + 1 and bool(self.prior[-1] == 1.0)

    @cached_property
    def _prior_cdf(self) -> np.ndarray:
        cdf = np.cumsum(self.prior)
        cdf[np.flatnonzero(self.prior)[-1] :] = 1.0  # round-off must not reach a state of mass 0
        return cdf

    def prior_array(self, like: Array) -> Array:
        """Return ``pi`` as a float64 array of the library (and device) of ``like``.

        :param like: any array; shape ``(num_states,)`` is returned.
        """
        xp = array_namespace(like)
        return xp.asarray(self.prior, dtype=float64_of(xp), device=device_of(like))

    def prior_prob(self, z: Array) -> Array:
        """Return ``pi_z``, float64, shaped like ``z``.

        :param z: state ids.
        """
        prior = self.prior_array(z)
        return array_namespace(z).take(prior, z.reshape(-1), axis=0).reshape(z.shape)

    def draw_prior(self, uniforms: Array) -> Array:
        """Draw states from ``pi`` by inverting its distribution function.

        :param uniforms: numbers in ``[0, 1)``, any shape.
        :returns: int64 ids, shaped like ``uniforms``.
        """
        xp = array_namespace(uniforms)
        cdf = xp.asarray(self._prior_cdf, dtype=float64_of(xp), device=device_of(uniforms))
        index = xp.searchsorted(cdf, xp.astype(uniforms.reshape(-1), cdf.dtype), side="right")
        return xp.astype(index.reshape(uniforms.shape), int64_of(xp))

    # The noisiest state: here every site of it on its own.

    @property
    def padding(self) -> int | None:
        """Id of a token that fills sequences up and is never noised, or None."""
        return None

    @property
    def start_is_random(self) -> bool:
        """Whether noisiest states differ."""
        return not self.absorbing

    def draw_start(self, noise: Array, prompt: Array | None = None) -> Array:
        """Draw noisiest states.

        :param noise: uniforms in ``[0, 1)``, ``(*batch, L)``.
        :param prompt: tokens that are there from the start, broadcastable, -1 elsewhere.
        :returns: int64, shaped like ``noise``.
        """
        tokens = self.draw_prior(noise)
        if prompt is None:
            return tokens
        return array_namespace(noise).where(prompt >= 0, prompt, tokens)

    def log_start(self, z: Array, prompt: Array | None = None) -> Array:
        """Return the log-probability of noisiest states, float64 ``(*batch,)``.

        :param z: states, ``(*batch, L)``.
        :param prompt: as in :meth:`draw_start`; its positions are certain.
        """
        xp = array_namespace(z)
        p = self.prior_prob(z)
        if prompt is not None:
            certain = xp.astype(z == prompt, p.dtype)
            p = xp.where(prompt >= 0, certain, p)
        possible = p > 0
        log_p = xp.log(xp.where(possible, p, xp.ones_like(p)))
        return xp.sum(xp.where(possible, log_p, xp.full_like(log_p, -xp.inf)), axis=-1)

    def start_of(self, x0: Array) -> Array | None:
        """Return the noisiest states that clean sequences can only come from, None for any.

        :param x0: clean tokens, ``(*batch, L)``.
        """
        return None

    def shown(self, start: Array, prompt: Array | None = None) -> Array | None:
        """Return the tokens that noisiest states show from the start, -1 elsewhere.

        :param start: noisiest states, ``(*batch, L)``.
        :param prompt: what all of them show, or None.
        """
        return prompt

    def log_length(self, x0: Array) -> Array | float:
        """Return what the lengths of clean sequences add to their log-probability.

        :param x0: clean tokens, ``(*batch, L)``.
        """
        return 0.0

    def corrupt(self, x0: Array, alpha: Array, u_keep: Array, u_prior: Array) -> Array:
        """Draw ``z_t ~ q(. | x0)`` at signal level ``alpha``.

        :param x0: clean tokens, any shape.
        :param alpha: signal level, broadcastable to ``x0``.
        :param u_keep: uniforms shaped like ``x0``: the token is kept where ``u_keep < alpha``.
        :param u_prior: uniforms shaped like ``x0`` for the redrawn states.
        :returns: states, shaped like ``x0``.
        """
        xp = array_namespace(x0)
        return xp.where(u_keep < alpha, x0, self.draw_prior(u_prior))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, schedule={self.schedule})"


class Absorbing(Process):
    """Masking: every token is replaced by the mask ``V`` with probability ``1 - alpha(t)``.

    :param schedule: signal schedule (linear by default).
    """

    def __init__(self, vocab_size: int, schedule: Schedule | None = None) -> None:
        vocab_size = whole_number(vocab_size, "Absorbing: vocab_size")
        super().__init__([0.0] * vocab_size + [1.0], vocab_size, schedule)

    def draw_prior(self, uniforms: Array) -> Array:
        """Return masks, shaped like ``uniforms``."""
        xp = array_namespace(uniforms)
        return xp.full(
            uniforms.shape, self.vocab_size, dtype=int64_of(xp), device=device_of(uniforms)
        )


class Uniform(Process):
    """Replacement by a uniformly drawn clean token with probability ``1 - alpha(t)``.

    :param schedule: signal schedule (linear by default).
    """

    def __init__(self, vocab_size: int, schedule: Schedule | None = None) -> None:
        vocab_size = whole_number(vocab_size, "Uniform: vocab_size")
        super().__init__([1.0 / vocab_size] * vocab_size, vocab_size, schedule)


class Interpolating(Process):
    """Replacement by a draw from any categorical prior over the clean tokens.

    :param prior: probabilities, shape ``(V,)``.
    :param schedule: signal schedule (linear by default).
    """

    def __init__(self, prior: Sequence[float] | Array, schedule: Schedule | None = None) -> None:
        super().__init__(prior, len(prior), schedule)


def whole_number(value: Any, name: str) -> int:
    """Return a count as an int, refusing what would have to be rounded.

    :raises TypeError: if it is not an integer.
    :raises ValueError: if it is less than one.
    """
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}.") from error
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {count}.")
    return count
