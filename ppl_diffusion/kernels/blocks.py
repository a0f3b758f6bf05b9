"""What a step draws: states of tokens, and latents beside them, as a dict or as one flat vector.

A chain is one distribution, so that its value is one tensor: tokens first, then every block, row
by row. It holds whole numbers if all blocks are discrete, float64 otherwise (exact for token ids).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = "tokens"
"""Name of the block of a step, and key of the carry, that holds the states."""

Value = Tensor | Mapping[str, Tensor]
"""What a step draws: states, or a dict of blocks, the states among them."""


class BlockSpec(NamedTuple):
    """A latent that a step draws beside the tokens.

    :param event_shape: its shape per sequence.
    :param num_states: how many values an entry has; None where it is continuous.
    :param num_clean: how many of these, the first ones, a finished entry can have; None for all.
    """

    event_shape: tuple[int, ...]
    num_states: int | None = None
    num_clean: int | None = None

    @property
    def size(self) -> int:
        """Number of its entries."""
        return torch.Size(self.event_shape).numel()


Blocks = Mapping[str, BlockSpec]
"""What is drawn beside the tokens, by name."""


def tokens_of(value: Value) -> Tensor:
    """Return the states in what a step drew.

    :param value: states, or blocks.
    """
    return value if isinstance(value, Tensor) else value[TOKENS]


def are_discrete(blocks: Blocks) -> bool:
    """Return whether all blocks have countably many values."""
    return all(spec.num_states is not None for spec in blocks.values())


def width(blocks: Blocks, length: int) -> int:
    """Return the number ``W`` of entries of a flat value.

    :param length: number ``L`` of tokens.
    """
    return length + sum(spec.size for spec in blocks.values())


def flattened(value: Value, blocks: Blocks) -> Tensor:
    """Return tokens and blocks side by side, ``(*batch, W)``; tokens alone as they are.

    :param value: what a step drew, or a carry, which holds it.
    """
    tokens = tokens_of(value)
    if not blocks or isinstance(value, Tensor):
        return tokens
    kind = torch.int64 if are_discrete(blocks) else torch.float64
    lead = tokens.shape[:-1]
    parts = [value[name].reshape(*lead, -1) for name in blocks]
    return torch.cat([part.to(kind) for part in (tokens, *parts)], -1)


def split(flat: Tensor, blocks: Blocks, length: int) -> Value:
    """Return what :func:`flattened` joined, in the types that steps draw.

    :param flat: ``(*batch, W)``.
    :param length: number ``L`` of tokens.
    """
    if not blocks:
        return flat
    tokens, *parts = flat.split([length, *(spec.size for spec in blocks.values())], -1)
    found = {TOKENS: tokens.to(torch.int64)}
    for (name, spec), part in zip(blocks.items(), parts, strict=True):
        part = part if spec.num_states is None else part.to(torch.int64)
        found[name] = part.reshape(*flat.shape[:-1], *spec.event_shape)
    return found


def arbitrary(spec: BlockSpec, batch: Sequence[int], device: torch.device) -> Tensor:
    """Return random values that a finished block may have, ``(*batch, *event)``."""
    shape, top = (*batch, *spec.event_shape), spec.num_clean or spec.num_states
    if top is None:
        return torch.randn(shape, dtype=torch.float64, device=device)
    return torch.randint(top, shape, device=device)


def widened(flat: Tensor) -> Tensor:
    """Return flat states that were kept in a small type in that of chains.

    :param flat: whole numbers of any type, or floating point, which is left as it is.
    """
    return flat if flat.is_floating_point() else flat.to(torch.int64)


def compacted(flat: Tensor) -> Tensor:
    """Return a copy of flat states in the smallest integer type; of real numbers, as they are."""
    if flat.is_floating_point():
        return flat.clone()
    # Token ids are far below 2**15 or 2**31.
    top = int(flat.max()) if flat.numel() else 0
    return flat.to(torch.uint8 if top < 2**8 else torch.int16 if top < 2**15 else torch.int32)
