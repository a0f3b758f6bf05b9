"""One reverse step whose law is given as a table over all states of every site."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.processes.noise import draw_categorical


class StateStep(StepDistribution):
    """A product over positions of categoricals over states, event shape ``(L,)``.

    For kernels that are no three-way mixture, such as guided ones; memory grows with the number
    of states. Rows are normalised here.

    :param log_probs: log-probabilities of the next states, ``(*batch, L, S)``, up to a constant
        per site.
    :param tokens: current states, int64 ``(*batch, L)``.
    :param fixed: bool ``(*batch, L)`` or None: positions that keep their token.
    :raises ValueError: if shapes do not fit, or a site has no possible state.
    """

    num_uniforms = 1

    def __init__(
        self,
        log_probs: Tensor,
        *,
        tokens: Tensor,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch = torch.broadcast_shapes(tokens.shape[:-1], log_probs.shape[:-2])
        length, self.num_states = tokens.shape[-1], log_probs.shape[-1]
        if log_probs.shape[-2] != length:
            raise ValueError(
                f"StateStep: log_probs of shape {tuple(log_probs.shape)} do not fit {length} sites."
            )
        log_probs = torch.log_softmax(log_probs.to(torch.float64), -1)
        if bool(torch.isnan(log_probs).any()):
            raise ValueError("StateStep: a site has no possible next state, or a NaN among them.")
        self.log_probs = log_probs.expand(*batch, length, self.num_states)
        self.tokens = tokens.expand(*batch, length)
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)

    def _site_log_probs(self, tokens: Tensor, value: Tensor) -> Tensor:
        table = self.log_probs.expand(*value.shape, -1)
        return table.gather(-1, value[..., None])[..., 0]

    def dense_log_probs(self) -> Tensor:
        """Return the law of every site as a table, float64 ``(*batch, L, S)``."""
        if self.fixed is None:
            return self.log_probs
        here = torch.nn.functional.one_hot(self.tokens, self.num_states).to(torch.float64)
        return torch.where(self.fixed[..., None], here.log(), self.log_probs)

    def draw(self, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        drawn = draw_categorical(self.log_probs.expand(*u_token.shape, -1), u_token)
        return drawn if self.fixed is None else torch.where(self.fixed, self.tokens, drawn)
