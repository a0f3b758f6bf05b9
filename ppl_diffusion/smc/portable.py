"""States of a run as plain containers, so that a file of them can be read without running code.

Tensors stay the objects they are: two entries that hold one tensor hold one again after loading,
which is how caches know that they are asked about what they have just seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

AnyClass = TypeVar("AnyClass", bound=type)

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_PORTABLE: dict[str, type] = {}
_LEFT_OUT: dict[type, tuple[str, ...]] = {}


class NotPortable(TypeError):
    """A value that no checkpoint can hold; the text names its type."""


def portable(cls: AnyClass, *left_out: str) -> AnyClass:
    """Let checkpoints hold instances of a class, by the values of their fields.

    :param cls: the class.
    :param left_out: fields that whoever owns an instance puts back.
    """
    _PORTABLE[_name(cls)] = cls
    _LEFT_OUT[cls] = left_out
    return cls


def packed(value: Any) -> Any:
    """Return a value as tensors, numbers, words and tuples of them.

    :raises NotPortable: if something inside is neither, nor of a class known to be portable.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return ("bytes", value.decode("latin-1"))
    return _packed_container(value)


def unpacked(value: Any) -> Any:
    """Return what :func:`packed` was given.

    :param value: its answer, perhaps out of a file.
    :raises ValueError: if it names a class that is not portable.
    """
    if not isinstance(value, tuple):
        return value
    return _UNPACK[value[0]](*value[1:])


def _packed_container(value: Any) -> Any:
    name = _name(type(value))
    if name in _PORTABLE:
        entries = _entries(value)
        return ("object", name, tuple(entries), tuple(map(packed, entries.values())))
    if isinstance(value, Mapping):
        return ("dict", tuple(map(packed, value)), tuple(map(packed, value.values())))
    for word, kind in (("size", torch.Size), ("tuple", tuple), ("list", list), ("set", set)):
        if type(value) is kind:
            return (word, tuple(map(packed, value)))
    raise NotPortable(name)


def _entries(value: Any) -> dict[str, Any]:
    named = getattr(value, "_asdict", None)
    fields: dict[str, Any] = vars(value) if named is None else named()
    return {name: x for name, x in fields.items() if name not in _LEFT_OUT[type(value)]}


def _object(name: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    if name not in _PORTABLE:
        raise ValueError(f"a checkpoint holds the class {name!r}, which is not known here.")
    cls, fields = _PORTABLE[name], dict(zip(names, map(unpacked, values), strict=True))
    if issubclass(cls, tuple):
        return cls(**fields)
    made = object.__new__(cls)
    vars(made).update(fields)  # past __init__, which may compute what is known already
    return made


def _dict(keys: tuple[Any, ...], values: tuple[Any, ...]) -> dict[Any, Any]:
    return dict(zip(map(unpacked, keys), map(unpacked, values), strict=True))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


_UNPACK: dict[str, Any] = {
    "bytes": lambda text: text.encode("latin-1"),
    "object": _object,
    "dict": _dict,
    "size": torch.Size,
    "tuple": lambda items: tuple(map(unpacked, items)),
    "list": lambda items: list(map(unpacked, items)),
    "set": lambda items: set(map(unpacked, items)),
}
