"""Whether one thing of a program depends on another: read off its operations, not off draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval


def depends(fn: Callable[[Any], Any], values: Any) -> bool:
    """Return whether anything that a function returns depends on what it is given.

    :param fn: a function of ``values`` that returns a pytree of arrays.
    """
    traced = jax.make_jaxpr(fn)(values).jaxpr
    _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return any(used)
