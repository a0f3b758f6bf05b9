"""A step of a masked chain whose positions are known and whose tokens are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import HeadPrediction, Prediction, as_prediction
from ppl_diffusion.kernels.step import StepDistribution, check_normalised, check_states
from ppl_diffusion.processes.noise import draw_categorical, uniforms


class EventStep(StepDistribution):
    """Reveal given positions, each token drawn from the prediction; all others stay.

    Event shape ``(L,)``, exact and normalised::

        p(z') = prod_{revealed l} c^l(z'^l)

    :param tokens: current states, int64 ``(*batch, L)``; the mask has id ``V``.
    :param log_probs: log-probabilities of clean tokens, ``(*batch, L, V)``, or a
        :class:`~ppl_diffusion.denoisers.Prediction`.
    :param revealed: bool ``(*batch, L)``: the positions; masked ones only.
    :param sites: their indices into the flattened ``(*batch, L)``, where the caller knows them.
    :param fixed: bool ``(*batch, L)`` or None: positions of a prompt, which keep their token.
    :raises ValueError: if shapes do not fit.
    """

    num_uniforms = 1

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        revealed: Tensor,
        *,
        sites: Tensor | None = None,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch = torch.broadcast_shapes(tokens.shape[:-1], log_probs.shape[:-2])
        length, size = tokens.shape[-1], log_probs.shape[-1]
        if log_probs.shape[-2] != length or revealed.shape[-1] != length:
            raise ValueError(
                f"EventStep: log_probs of shape {tuple(log_probs.shape)} and revealed of shape "
                f"{tuple(revealed.shape)} are not for {length} sites."
            )
        self.num_states = size + 1
        self.tokens = tokens.expand(*batch, length)
        self.prediction = as_prediction(log_probs).expand(batch)
        self.revealed = revealed.expand(*batch, length)
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        self._sites = sites if revealed.shape[:-1] == batch else None
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)
        if self._validate_args:
            check_states(self)
            check_normalised(self, self.prediction)

    @property
    def log_probs(self) -> Tensor:
        """The prediction as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    @property
    def sites(self) -> Tensor:
        """The revealed positions as indices into the flattened ``(*batch, L)``, int64 ``(m,)``."""
        if self._sites is None:
            self._sites = self.revealed.flatten().nonzero()[:, 0]
        return self._sites

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw next states, from one uniform per revealed position.

        :returns: int64 ``(*sample_shape, *batch, L)``.
        """
        if tuple(sample_shape):
            return super().sample(sample_shape, generator=generator)
        sites = self.sites
        noise = uniforms(sites.shape, generator=generator, device=sites.device)
        with torch.no_grad():
            drawn = draw_categorical(self._rows(sites), noise)
        return self.tokens.flatten().index_put((sites,), drawn).view(self.tokens.shape)

    def draw(self, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        tokens, where = self.tokens.expand_as(u_token), self.revealed.expand(u_token.shape)
        return self.prediction.expand(tokens.shape[:-1]).draw(u_token, where, tokens)

    def _score(self, tokens: Tensor, value: Tensor) -> Tensor:
        if value.shape != self.tokens.shape:
            many = self.expand(value.shape[:-1])
            return many._score(many.tokens, value)
        size, sites, length = self.num_states - 1, self.sites, value.shape[-1]
        legal = torch.where(self.revealed, (value >= 0) & (value < size), value == tokens).all(-1)
        drawn = value.flatten()[sites].clamp(0, size - 1)
        log_c = self._rows(sites).gather(-1, drawn[:, None])[:, 0]
        total = log_c.new_zeros(legal.numel()).index_add(0, sites // length, log_c)
        return torch.where(legal, total.reshape(legal.shape), -torch.inf)

    def _rows(self, sites: Tensor) -> Tensor:
        """Return the predictions of some sites, ``(m, V)``; the head runs at these alone."""
        prediction = self.prediction
        if isinstance(prediction, HeadPrediction):
            return prediction.head(prediction.hidden.flatten(0, -2)[sites])
        return prediction.dense().flatten(0, -2)[sites]

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with larger batch dimensions."""
        known, self._sites = self._sites, None  # indices into another batch
        try:
            return super().expand(batch_shape, _instance)
        finally:
            self._sites = known

    def with_log_probs(self, log_probs: Tensor) -> EventStep:
        """Return the same step with another prediction of the clean tokens.

        :param log_probs: log-probabilities, ``(*batch, L, V)``.
        """
        return EventStep(
            self.tokens,
            log_probs,
            self.revealed,
            sites=self._sites,
            fixed=self.fixed,
            validate_args=False,
        )
