"""Sampled paths whose log-probability is known.

Keyed by the tensor object, weakly and beside it: a path that is saved, copied or sent to another
process does not take the network along, and forgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ppl_diffusion.kernels.base import Kernel

_Versions = tuple[tuple[int, int], ...]


class _Memo(NamedTuple):
    kernel: Kernel
    prompt: Tensor | None
    given: Mapping[str, Tensor]
    version: int
    parameters: _Versions
    log_p: Tensor


_MEMOS = WeakTensorKeyDictionary()


def remember(
    path: Tensor,
    kernel: Kernel,
    log_p: Tensor,
    *,
    prompt: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> None:
    """Note a path's log-probability; not in inference mode, where edits leave no trace."""
    if not path.is_inference():
        own = {name: value.detach().clone() for name, value in (given or {}).items()}
        _MEMOS[path] = _Memo(kernel, prompt, own, path._version, _versions(kernel), log_p)


def recall(
    path: Tensor,
    kernel: Kernel,
    *,
    prompt: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor | None:
    """Return the remembered log-probability where it is still valid, else None.

    It is not where the path was edited, the kernel, the prompt or a condition is another one, a
    parameter of the network moved, or a gradient is wanted (the memo was computed without one).
    """
    given = given or {}
    memo: _Memo | None = _MEMOS.get(path)
    if memo is None or not memo.kernel.same_as(kernel) or memo.version != path._version:
        return None
    if not _same(memo.prompt, prompt) or memo.parameters != _versions(kernel):
        return None
    if memo.given.keys() != given.keys():
        return None
    if not all(_same(value, given[name]) for name, value in memo.given.items()):
        return None
    moving = declares_gradient(kernel) or any(value.requires_grad for value in given.values())
    if torch.is_grad_enabled() and moving:
        return None
    return memo.log_p


def declares_gradient(kernel: Kernel) -> bool:
    """Return whether the denoiser is known to depend on a tensor that requires a gradient."""
    return any(p.requires_grad for p in kernel.declared_parameters() or [])


def _versions(kernel: Kernel) -> _Versions:
    parameters = kernel.declared_parameters() or []
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters)


def _same(here: Tensor | None, there: Tensor | None) -> bool:
    if here is None or there is None:
        return here is there
    # What an expanded chain has is the same, repeated.
    try:
        return bool((here == there).all())
    except RuntimeError:
        return False
