"""Shape rules that steps and chains follow (Pyro's contract, enforced)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


def check_expand(old: Sequence[int], new: Sequence[int]) -> torch.Size:
    """Return ``new`` as a size, refusing to shrink or change a batch dimension."""
    new = torch.Size(new)
    aligned = tuple(new)[len(new) - len(old) :]
    if len(new) < len(old) or any(o not in (1, n) for o, n in zip(old, aligned, strict=True)):
        raise ValueError(f"Cannot broadcast distribution of shape {tuple(old)} to {tuple(new)}.")
    return new


def check_value(distribution: TorchDistribution, value: Tensor, *, whole: bool = True) -> Tensor:
    """Return ``value`` after checking its event shape, as int64 if it holds whole numbers."""
    event = tuple(distribution.event_shape)
    if value.ndim < len(event) or tuple(value.shape[value.ndim - len(event) :]) != event:
        raise ValueError(
            f"{type(distribution).__name__}: a value must end in shape {event}, "
            f"got {tuple(value.shape)}."
        )
    try:
        torch.broadcast_shapes(value.shape[: value.ndim - len(event)], distribution.batch_shape)
    except RuntimeError as error:
        raise ValueError(
            f"{type(distribution).__name__}: value of shape {tuple(value.shape)} does not "
            f"broadcast with batch shape {tuple(distribution.batch_shape)}."
        ) from error
    return value.to(torch.int64) if whole else value


def enumerated(
    distribution: TorchDistribution,
    num_states: int | Sequence[int],
    expand: bool,
    limit: int,
    device: torch.device,
) -> Tensor:
    """Return every array of states of the event shape, as Pyro's ``enumerate_support`` wants it.

    :param num_states: states of every entry, or of each entry of the last dimension.
    """
    entries, last = distribution.event_shape.numel(), distribution.event_shape[-1]
    own = [num_states] * last if isinstance(num_states, int) else list(num_states)
    sizes = own * (entries // last)
    if math.prod(sizes) > limit:
        shown = f"{own[0]}**{entries}" if len(set(own)) == 1 else str(math.prod(sizes))
        raise NotImplementedError(
            f"{type(distribution).__name__}: the support has {shown} values, "
            f"more than max_enumerate = {limit}; use sampling-based inference."
        )
    grid = torch.cartesian_prod(*[torch.arange(size, device=device) for size in sizes])
    batch = distribution.batch_shape
    values = grid.reshape(-1, *[1] * len(batch), *distribution.event_shape)
    return values.expand(-1, *batch, *distribution.event_shape) if expand else values
