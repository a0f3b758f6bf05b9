"""How many rows a network is asked about at once.

On a processor a call is fastest while what an operation reads and writes stays in the cache, on an
accelerator the larger the better. Both are read off the machine, never timed: the number of rows
may decide the last bits of an output, and the same seed must give the same bytes.
"""

from __future__ import annotations

import functools
import operator
import re
from pathlib import Path
from typing import Any

import torch

from ppl_diffusion.denoisers.base import Denoiser

MANY = 4096
"""Rows per call of a denoiser that does not say what suits it."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 16 * 2**20
# An operation reads one tensor and writes one: half of the cache, the rest is left to others.
_SHARE_OF_CACHE = 4
# Beyond 32 MB glibc maps every tensor anew, and touching fresh pages costs more than arithmetic.
_LARGEST = 16 * 2**20
# Below so many tokens the fixed costs of a call show.
_FEWEST_TOKENS = 2048
# About 16 tensors as wide as the widest live at a time, in half of the memory.
_SHARE_OF_MEMORY = 32


def row_limit(max_rows: Any, name: str = "max_rows") -> int | None:
    """Return the largest number of rows per call, or None for what suits the network.

    :param max_rows: what was given.
    :param name: what errors call it.
    :raises TypeError: if it is neither a whole number nor None.
    :raises ValueError: if it is less than one.
    """
    if max_rows is None:
        return None
    try:
        count = operator.index(max_rows)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number or None, got {max_rows!r}.") from error
    if count < 1:
        raise ValueError(f"{name} must be >= 1 or None, got {count}.")
    return count


def rows_per_call(denoiser: Denoiser, length: int) -> int:
    """Return how many rows suit a call of a denoiser: what it says, else :data:`MANY`.

    :param denoiser: a denoiser; a method ``rows_per_call(length) -> int`` is asked if it has one.
    :param length: tokens of a row.
    """
    said = getattr(denoiser, "rows_per_call", None)
    return MANY if said is None else max(int(said(length)), 1)


def rows_that_fit(row_bytes: int, length: int, device: torch.device) -> int:
    """Return the rows for which the widest tensor of a network fits where it is fast.

    :param row_bytes: bytes of one row of that tensor.
    :param length: tokens of a row.
    :param device: where the network lives.
    """
    row_bytes, length = max(row_bytes, 1), max(length, 1)
    if device.type == "cpu":
        room = min(cache_bytes() // _SHARE_OF_CACHE, _LARGEST)
        return max(room // row_bytes, -(-_FEWEST_TOKENS // length))
    memory = _memory_bytes(device)
    return MANY if memory is None else max(memory // _SHARE_OF_MEMORY // row_bytes, 1)


@functools.cache
def cache_bytes() -> int:
    """Return the size of the largest cache of a processor, 16 MB where it is not told."""
    return max(map(_told_bytes, _CACHES.glob("index*/size")), default=0) or _USUAL_CACHE


def _told_bytes(path: Path) -> int:
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    try:
        told = re.fullmatch(r"([0-9]+)([KMG]?)", path.read_text().strip())
    except (OSError, UnicodeDecodeError):
        told = None
    return 0 if told is None else int(told[1]) * units[told[2]]


def _memory_bytes(device: torch.device) -> int | None:
    # All of it, not what is free now: that would change from run to run.
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
