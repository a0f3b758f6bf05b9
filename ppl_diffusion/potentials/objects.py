"""Objects by name, as the command line is given them."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_SHOWN = 8


def load_object(name: str) -> Any:
    """Return the object that ``"module:object"`` names.

    Modules of the working folder are found, after all others; objects inside of objects are named
    with dots.

    :param name: such as ``"rewards:score"``.
    :raises ValueError: if it is no such name, or there is none of that name.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"{name!r} names no object; write module:object, such as rewards:score.")
    found: Any = _module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name!r}: {module_name} has no {path}{_own(found)}.")
        found = getattr(found, part)
    return found


def _own(found: Any) -> str:
    """Return what a module defines itself, in words."""
    name = getattr(found, "__name__", None)
    own = [n for n, one in vars(found).items() if getattr(one, "__module__", None) == name]
    return f"; it defines {', '.join(own[:_SHOWN])}" if own else ""


def _module(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.append("")
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise ValueError(
                f"there is no module {name!r}; run where {name.partition('.')[0]}.py lies, or "
                "install it."
            ) from error
        raise ValueError(
            f"the module {name!r} needs {missing!r}, which is not installed."
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the module {name!r} cannot be imported ({reason}); mend it.") from error
