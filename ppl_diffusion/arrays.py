"""Small helpers for arrays of any backend, shared by all rooms."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_jax_array, is_jax_namespace

__all__ = [
    "Array",
    "array_namespace",
    "device_of",
    "float64_of",
    "int64_of",
    "json_types",
    "to_float64",
]

Array = Any  # torch.Tensor | jax.Array | numpy.ndarray: the array API has no common type yet


def float64_of(xp: ModuleType) -> Any:
    """Return the widest float of a namespace: float64, or JAX's default when x64 is off.

    :param xp: an array-API namespace.
    """
    return xp.asarray(0.0).dtype if is_jax_namespace(xp) else xp.float64


def int64_of(xp: ModuleType) -> Any:
    """Return the widest integer of a namespace: int64, or JAX's default when x64 is off.

    :param xp: an array-API namespace.
    """
    return xp.asarray(0).dtype if is_jax_namespace(xp) else xp.int64


def device_of(x: Array) -> Any:
    """Return the device on which to put arrays that meet ``x``; JAX decides that by itself.

    :param x: an array; a traced JAX array has no device.
    """
    return None if is_jax_array(x) else x.device


def to_float64(x: Any) -> Array:
    """Return ``x`` in float64; Python numbers become NumPy scalars.

    :param x: a number or an array of any array-API library.
    """
    if isinstance(x, int | float):
        return np.float64(x)
    xp = array_namespace(x)
    return xp.astype(x, float64_of(xp), copy=False) if not is_jax_array(x) else x.astype(float)


def json_types(value: Any) -> Any:
    """Return ``value`` in JSON types: numpy and torch numbers as Python's, the unknown as text.

    :param value: nested mappings, sequences, numbers, arrays and anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_types(item) for item in value]
    if hasattr(value, "tolist"):
        return json_types(value.tolist())
    return value if value is None or isinstance(value, str | int | float) else str(value)
