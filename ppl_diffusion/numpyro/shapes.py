"""Shape rules of NumPyro's distributions, where they differ from Pyro's."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from ppl_diffusion.arrays import Array


def enumerated(distribution: Distribution, num_states: int, expand: bool, limit: int) -> Array:
    """Return every array of states of the event shape.

    :raises NotImplementedError: if there are more than ``limit``.
    """
    entries = math.prod(distribution.event_shape)
    if num_states**entries > limit:
        raise NotImplementedError(
            f"{type(distribution).__name__}: the support has {num_states}**{entries} values, more "
            f"than max_enumerate = {limit}; use sampling-based inference."
        )
    values, batch = all_states(num_states, entries), distribution.batch_shape
    flat = values.reshape(-1, *(1,) * len(batch), *distribution.event_shape)
    return jnp.broadcast_to(flat, (len(values), *distribution.shape())) if expand else flat


def all_states(num_states: int, length: int) -> Array:
    """Return all sequences of states, ``(num_states ** length, length)``."""
    axes = np.indices((num_states,) * length)
    return jnp.asarray(np.stack([axis.ravel() for axis in axes], axis=-1))
