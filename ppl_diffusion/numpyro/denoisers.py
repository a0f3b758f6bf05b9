"""Denoisers in JAX: callables ``(tokens, t) -> log-probabilities`` that are pytrees.

What is written in array-API code serves both backends: the exact denoisers of tables and Markov
chains are those of :mod:`ppl_diffusion.denoisers`, made of JAX arrays. Networks are Equinox modules
(:class:`~ppl_diffusion.numpyro.Transformer`).
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from ppl_diffusion.arrays import Array
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.oracles import MarkovDenoiser, TableDenoiser


class Denoiser(Protocol):
    """A predictor of clean tokens; a pytree, so that it passes through ``jit`` and ``vmap``.

    See :class:`ppl_diffusion.denoisers.Denoiser` for the meaning of the attributes.
    """

    vocab_size: int
    kind: Kind
    time_free: bool

    def __call__(self, tokens: Array, t: Array, /) -> Array:
        """Return log-probabilities, ``(*batch, L, V)``.

        :param tokens: states, integers ``(*batch, L)``; the mask has id ``V``.
        :param t: one time in ``[0, 1]``.
        """
        ...


def register(cls: type, names: tuple[str, ...]) -> None:
    """Make a class of denoisers a pytree, so that it passes through ``jit``.

    :param names: of its arrays; whatever else it holds is static and must be hashable.
    """

    def flatten(denoiser: Any) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        held = vars(denoiser)
        rest = tuple((k, v) for k, v in held.items() if k not in names)
        return tuple(held[name] for name in names), rest

    def unflatten(rest: tuple[tuple[str, Any], ...], arrays: tuple[Any, ...]) -> Any:
        denoiser: Any = object.__new__(cls)
        vars(denoiser).update(dict(rest), **dict(zip(names, arrays, strict=True)))
        return denoiser

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


register(TableDenoiser, ("joint",))
register(MarkovDenoiser, ("initial", "transition"))
