"""Potentials that live outside of JAX: networks in torch, scoring programs, anything in Python.

A compiled run goes from step to step without asking anybody. A potential of the torch side is the
exception, and says so: at every look-ahead and at the end all sequences leave the scan in one
batch, are scored on the host, and their scores come back (``jax.pure_callback``). Nothing
differentiates it, and it runs on one device.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ppl_diffusion.arrays import Array
from ppl_diffusion.potentials import AbstractPotential


class HostPotential:
    """A potential of the torch side as a function of JAX arrays.

    :param potential: the potential.

    :ivar failure: what it raised, as JAX hands on no more than its text.

    Example::

        reward = HostPotential(Reward(oracle, temperature=0.4))
        SMC(chain, reward).run(jax.random.key(0))  # SMC(chain, Reward(...)) does the same
    """

    def __init__(self, potential: AbstractPotential) -> None:
        self.potential = potential
        self.failure: Exception | None = None

    @property
    def __name__(self) -> str:
        """What results call it."""
        return self.potential.name

    def __call__(self, x0: Array) -> Array:
        """Return ``log G`` of finished sequences, ``(*batch,)``.

        :param x0: clean tokens, ``(*batch, L)``.
        """
        return self._asked(self.potential, x0)

    def lookahead(self, x0: Array) -> Array:
        """Return the finite surrogate for guesses, ``(*batch,)``."""
        return self._asked(self.potential.lookahead, x0)

    def _asked(self, score: Callable[[torch.Tensor], torch.Tensor], x0: Array) -> Array:
        answer = jax.ShapeDtypeStruct(jnp.shape(x0)[:-1], jnp.zeros(()).dtype)

        def ask(x0: Array) -> np.ndarray:
            # NumPy first: an operation of JAX in here would wait for the one that asks.
            rows = np.asarray(x0)
            try:
                with torch.no_grad():
                    tokens = torch.from_numpy(rows.reshape(-1, rows.shape[-1]).astype(np.int64))
                    values = score(tokens).cpu().numpy()
            except Exception as error:
                self.failure = error
                raise
            return values.reshape(rows.shape[:-1]).astype(answer.dtype)

        scored: Array = jax.pure_callback(ask, answer, x0, vmap_method="expand_dims")
        return scored
