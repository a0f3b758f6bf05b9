"""Shape rules that steps and chains follow (Pyro's contract, enforced)."""

from __future__ import annotations

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


def check_value(distribution: TorchDistribution, value: Tensor) -> Tensor:
    """Return ``value`` as int64 after checking its event shape."""
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
    return value.to(torch.int64)


def enumerated(
    distribution: TorchDistribution,
    num_states: int,
    expand: bool,
    limit: int,
    device: torch.device,
) -> Tensor:
    """Return every array of states of the event shape, as Pyro's ``enumerate_support`` wants it."""
    entries = distribution.event_shape.numel()
    if num_states**entries > limit:
        raise NotImplementedError(
            f"{type(distribution).__name__}: the support has {num_states}**{entries} values, "
            f"more than max_enumerate = {limit}; use sampling-based inference."
        )
    grid = torch.cartesian_prod(*[torch.arange(num_states, device=device)] * entries)
    batch = distribution.batch_shape
    values = grid.reshape(-1, *[1] * len(batch), *distribution.event_shape)
    return values.expand(-1, *batch, *distribution.event_shape) if expand else values
