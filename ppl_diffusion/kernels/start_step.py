"""The law of a noisiest state that is no product over positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.processes.padded import Padded


class StartStep(StepDistribution):
    """Masks as many as a sequence has letters, then what fills it up; event shape ``(L,)``.

    :param process: whose law of lengths it is.
    :param prompt: tokens that are there from the start, int64 ``(*batch, L)``, -1 elsewhere.
    """

    num_uniforms = 1

    def __init__(
        self, process: Padded, prompt: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.process, self.tokens, self.fixed = process, prompt, None
        self.num_states = process.num_states
        batch, event = prompt.shape[:-1], prompt.shape[-1:]
        super().__init__(batch, event, validate_args=validate_args)

    @classmethod
    def of(
        cls, process: Padded, shape: Sequence[int], prompt: Tensor | None, device: torch.device
    ) -> StartStep:
        """Return the law of states of a shape.

        :param shape: ``(*batch, L)``.
        """
        none = torch.full((shape[-1],), -1, device=device)
        known = none if prompt is None else prompt
        return cls(process, known.expand(*shape), validate_args=False)

    def draw(self, u_length: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into noisiest states; the first of each row is that of the length."""
        start: Tensor = self.process.draw_start(u_length, self.tokens)
        return start

    def _score(self, tokens: Tensor, value: Tensor) -> Tensor:
        log_p: Tensor = self.process.log_start(value, tokens)
        return log_p
