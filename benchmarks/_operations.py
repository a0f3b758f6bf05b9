"""What a piece of work asks of torch: operations, and waits for a value (host reads).

Counted by dispatch, on any device, in the calling thread. An *operation* is a call of an aten
operator below autograd (views included). A *host read* is one of those that make the host wait on
an accelerator for what was computed:

* ``_local_scalar_dense``: ``.item()``, and with it ``bool(x)``, ``int(x)``, ``float(x)``, ``if x:``
  of a tensor;
* ``equal`` and ``allclose``;
* operators whose output's size depends on values: ``nonzero`` (and ``where(x)``, ``argwhere``),
  ``unique``, ``unique_consecutive``, ``masked_select``, ``bincount``, ``repeat_interleave`` by a
  tensor without ``output_size``, and indexing by a boolean mask (``x[mask]``; assigning through one
  too, unless what is assigned is a single number);
* ``tolist()``, ``numpy()`` and ``numpy.asarray``;
* copies to the host from another device.

Copies of host tensors to the host are nothing and not seen: run on an accelerator to count those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = frozenset(
    {
        *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    }
)
"""Operators that always wait."""

HAND_OVERS = frozenset({"tolist", "numpy", "__array__"})
"""Methods of tensors that read without an operator."""


@dataclass
class Operations:
    """What was counted.

    :param calls: calls by operator.
    :param reads: host reads by operator or method.
    """

    calls: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    @property
    def num_calls(self) -> int:
        """Operations in all."""
        return self.calls.total()

    @property
    def num_reads(self) -> int:
        """Host reads in all."""
        return self.reads.total()


def count_operations(work: Callable[[], object]) -> Operations:
    """Return what a piece of work asks of torch.

    :param work: what is run.
    """
    counted = Operations()
    with _HandOvers(counted), _Dispatched(counted):
        work()
    return counted


class _Dispatched(TorchDispatchMode):
    def __init__(self, counted: Operations) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.counted.calls[name] += 1
        if _waits(name, args, kwargs):
            self.counted.reads[name] += 1
        return func(*args, **kwargs)


class _HandOvers(TorchFunctionMode):
    def __init__(self, counted: Operations) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in HAND_OVERS:
            self.counted.reads[name] += 1
        return func(*args, **(kwargs or {}))


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in READS:
        return True
    if name == "index":
        return _has_mask(args[1])
    if name in {"index_put", "index_put_", "_index_put_impl_"}:
        # A single number goes through a mask by masked_fill, which waits for nothing.
        return _has_mask(args[1]) and args[2].numel() != 1
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in {"_to_copy", "copy_"}:
        source, target = (args[1], args[0].device) if name == "copy_" else (args[0], None)
        target = kwargs.get("device") if target is None else target
        return target is not None and torch.device(target).type == "cpu" != source.device.type
    return False


def _has_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(index, Tensor) and index.dtype in masks for index in indices)
