"""A mode in which library code must say where its tensors live."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FACTORIES = {
    getattr(torch, name)
    for name in (
        *("zeros", "ones", "full", "empty", "arange", "linspace", "eye", "tensor", "as_tensor"),
        *("rand", "randn", "randint", "randperm", "normal"),
    )
}


class DeviceDiscipline(TorchFunctionMode):
    """Fails when code of the library makes a tensor without a ``device``.

    A tensor without one lands on the CPU (or the default device), not beside the tokens or the
    network it meets: right on every machine but those with an accelerator. Code of users, tests
    and other packages may do as it likes, and so may the exhaustive tools of ``testing``::

        with DeviceDiscipline():
            chain.log_prob(chain.sample((10,)))

    :raises AssertionError: inside the mode, naming file and line.
    """

    def __enter__(self) -> Self:
        self._from_numpy = torch.from_numpy  # torch does not dispatch this one
        torch.from_numpy = self._refused  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.from_numpy = self._from_numpy

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None and not _moves(func, args):
            _require_user(sys._getframe(1), func.__name__)
        return func(*args, **kwargs)

    def _refused(self, array: Any) -> Tensor:
        _require_user(sys._getframe(1), "from_numpy")
        made: Tensor = self._from_numpy(array)
        return made


def _moves(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    # as_tensor of a tensor, and normal of tensors, stay where they are.
    return func in (torch.as_tensor, torch.normal) and bool(args) and isinstance(args[0], Tensor)


def _require_user(frame: FrameType | None, name: str) -> None:
    while frame is not None and "array_api_compat" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None or not _is_library(Path(frame.f_code.co_filename)):
        return
    raise AssertionError(
        f"{frame.f_code.co_filename}:{frame.f_lineno} calls torch.{name} without a device; put the "
        "tensor where its inputs or its network live."
    )


def _is_library(file: Path) -> bool:
    return any(file.is_relative_to(root) for root in _roots()) and file.parent.name != "testing"


def _roots() -> list[Path]:
    names = ("ppl_diffusion", "ppl_diffusion.models", "ppl_diffusion.inference")
    specs = [find_spec(name) for name in names]
    found = [path for spec in specs if spec for path in spec.submodule_search_locations or ()]
    return [Path(path) for path in found]
