"""What lives outside of JAX: networks in torch, scoring programs, anything in Python.

A compiled run goes from step to step without asking anybody. What is asked on the host is the
exception, and is declared: at every look-ahead and at the end all sequences leave the scan in one
batch, are scored, and their scores come back (``jax.pure_callback``). Nothing is differentiated
through it, and it runs on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ppl_diffusion.arrays import Array

_MET: ContextVar[list[OnHost] | None] = ContextVar("met", default=None)


@contextmanager
def watched() -> Iterator[list[OnHost]]:
    """Note who is asked on the host by what is traced inside."""
    found: list[OnHost] = []
    token = _MET.set(found)
    try:
        yield found
    finally:
        _MET.reset(token)


Scored = Callable[[torch.Tensor], torch.Tensor]


class OnHost:
    """A function of sequences on the torch side, as a function of JAX arrays.

    :param score: int64 ``(n, L)`` -> ``(n,)``: an oracle, or a potential, whose ``lookahead`` then
        scores guesses.

    :ivar failure: what it raised, as JAX hands on no more than its text.

    Example::

        expression = OnHost(oracle)
        numpyro.sample("y", dist.Normal(gain * expression(x), 0.5), obs=y)
    """

    def __init__(self, score: Scored) -> None:
        self.score = score
        self.guessed: Scored = getattr(score, "lookahead", score)
        self.failure: Exception | None = None

    @property
    def __name__(self) -> str:
        """What results call it."""
        found: str = getattr(self.score, "name", type(self.score).__name__)
        return found

    def __call__(self, x0: Array) -> Array:
        """Return the scores of sequences, ``(*batch,)``.

        :param x0: clean tokens, ``(*batch, L)``.
        """
        return self._asked(self.score, x0)

    def lookahead(self, x0: Array) -> Array:
        """Return the finite surrogate for guesses, ``(*batch,)``."""
        return self._asked(self.guessed, x0)

    def _asked(self, score: Scored, x0: Array) -> Array:
        if (met := _MET.get()) is not None:
            met.append(self)
        answer = jnp.zeros(()).dtype

        def ask(x0: Array) -> np.ndarray:
            # NumPy first: an operation of JAX in here would wait for the one that asks.
            rows = np.asarray(x0)
            tokens = torch.from_numpy(rows.reshape(-1, rows.shape[-1]).astype(np.int64))
            try:
                with torch.no_grad():
                    values = score(tokens).cpu().numpy()
            except Exception as error:
                self.failure = error
                raise
            if values.shape != tokens.shape[:1]:
                self.failure = ValueError(
                    f"OnHost: {self.__name__} returned shape {values.shape} for {len(tokens)} "
                    "sequences; return one number for each."
                )
                raise self.failure
            return values.reshape(rows.shape[:-1]).astype(answer)

        shape = jax.ShapeDtypeStruct(jnp.shape(x0)[:-1], answer)
        scored: Array = jax.pure_callback(ask, shape, x0, vmap_method="expand_dims")
        return scored
