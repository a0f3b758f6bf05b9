"""Options of functions of sequences, and the sentence for each that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from ppl_diffusion.potentials.evaluation import SequenceFunction

OnError = Literal["raise", "reject"] | float
KeyFunction = Callable[[Tensor], Sequence[bytes | str]]
"""``rows (B, L) -> B`` names, equal where the function's answer is the same."""


class FunctionOptions(TypedDict, total=False):
    """Options of a :class:`SequenceFunction` that the potentials made from one hand on."""

    name: str | None
    batch_size: int | None
    executor: Executor | None
    num_workers: int | None
    timeout: float | None
    on_error: OnError
    retries: int
    key: KeyFunction | None
    cache_size: int
    cache: str | Path | None
    version: str
    retry_failed: bool
    budget: int | None
    reserve: int | None


_LEAST = {
    "batch_size": 1,
    "cache_size": 1,
    "num_workers": 1,
    "retries": 0,
    "budget": 1,
    "reserve": 0,
}


def check_options(function: SequenceFunction) -> None:
    """Check what a function of sequences was given.

    :raises TypeError: if the function or the executor is none.
    :raises ValueError: if an option cannot be used.
    """
    name = function.name
    if not callable(function.fn):
        raise TypeError(f"{name}: fn must be callable, got {type(function.fn).__name__}.")
    _check_executor(function)
    _check_policy(function)
    for option, least in _LEAST.items():
        number = getattr(function, option)
        if number is not None and not _whole(number, least):
            raise ValueError(
                f"{name}: {option} must be a whole number, at least {least}, got {number!r}."
            )
    if function.reserve is not None and function.budget is None:
        raise ValueError(f"{name}: reserve={function.reserve} needs the budget it is a part of.")
    if function.cache is None and (function.version or function.retry_failed):
        raise ValueError(f"{name}: version and retry_failed need the file they are about, cache=.")


def _check_policy(function: SequenceFunction) -> None:
    policy = function.on_error
    if isinstance(policy, str) and policy in ("raise", "reject"):
        return
    if not isinstance(policy, int | float) or isinstance(policy, bool):
        raise ValueError(
            f'{function.name}: on_error is "raise" or "reject", or a value that failed sequences '
            f"get, got {policy!r}."
        )
    if not (math.isfinite(policy) or policy == function.worst):
        raise ValueError(
            f"{function.name}: the value of failed sequences must be finite, got "
            f'on_error={policy!r}; "reject" gives them probability zero.'
        )


def _check_executor(function: SequenceFunction) -> None:
    name, executor, timeout = function.name, function.executor, function.timeout
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"{name}: an executor has a method submit, such as Processes(4), got "
            f"{type(executor).__name__}."
        )
    if function.num_workers is not None and executor is None:
        raise ValueError(
            f"{name}: num_workers={function.num_workers!r} needs the executor they work in; "
            "pass executor=Processes(...), which knows its own number."
        )
    if timeout is not None and (executor is None or not timeout > 0):
        raise ValueError(
            f"{name}: timeout needs an executor and a positive number of seconds, got "
            f"{timeout} with executor={executor}."
        )


def _whole(number: Any, least: int) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool) and number >= least
