"""Networks that give the law of the next state, and beside it a look-ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Kind, move

Head = Callable[[Tensor, float | Tensor], Tensor]
"""``(states (*batch, L), t) -> log-probabilities (*batch, L, columns)``, ``t`` as of a denoiser."""


class DirectDenoiser:
    """The law of the next state and the prediction of the clean tokens, side by side.

    What a :class:`~ppl_diffusion.kernels.DirectKernel` asks. Both in one output, so that a network
    with two heads reads a state once.

    :param head: ``log v`` over the ``S`` states of the next one.
    :param look_ahead: ``log p(x | z_t)`` over the ``V`` clean tokens, from the state of the site
        itself too.
    :param vocab_size: number ``V`` of clean tokens.
    :param num_states: number ``S`` of states.

    :ivar output_size: ``S + V``: the columns of the head first.
    """

    kind: Kind = "posterior"
    time_free = False

    def __init__(self, head: Head, look_ahead: Head, *, vocab_size: int, num_states: int) -> None:
        self.head, self.look_ahead = head, look_ahead
        self.vocab_size, self.num_states = vocab_size, num_states
        self.output_size = num_states + vocab_size
        if all(callable(getattr(part, "parameters", None)) for part in (head, look_ahead)):
            vars(self)["parameters"] = self._parameters

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return both, ``(*batch, L, S + V)``."""
        return torch.cat([self.head(tokens, t), self.look_ahead(tokens, t)], -1)

    def _parameters(self) -> Iterator[Tensor]:
        for part in (self.head, self.look_ahead):
            yield from part.parameters()  # type: ignore[attr-defined]

    def to(self, device: torch.device | str) -> Self:
        """Move both in place, where they can be moved."""
        move(self.head, device)
        move(self.look_ahead, device)
        return self
