"""A step of a masked chain whose positions are known and whose tokens are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction, as_prediction
from ppl_diffusion.kernels.shapes import check_expand
from ppl_diffusion.kernels.step import StepDistribution, check_normalised, check_states
from ppl_diffusion.processes.noise import uniforms


class EventStep(StepDistribution):
    """Reveal given positions, each token drawn from the prediction; all others stay.

    Event shape ``(L,)``, exact and normalised::

        p(z') = prod_{revealed l} c^l(z'^l)

    :param tokens: current states, int64 ``(*batch, L)``; the mask has id ``V``.
    :param log_probs: log-probabilities of clean tokens, ``(*batch, L, V)``, or a
        :class:`~ppl_diffusion.denoisers.Prediction`.
    :param sites: the positions, masked ones only, as indices into the flattened ``(*batch, L)`` of
        ``tokens``, int64 ``(m,)``.
    :param fixed: bool ``(*batch, L)`` or None: positions of a prompt, which keep their token.
    :raises ValueError: if shapes do not fit.
    """

    num_uniforms = 1

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        sites: Tensor,
        *,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch, length, size = tokens.shape[:-1], tokens.shape[-1], log_probs.shape[-1]
        if log_probs.shape[:-1] != tokens.shape:
            raise ValueError(
                f"EventStep: log_probs of shape {tuple(log_probs.shape)} are no predictions of "
                f"tokens of shape {tuple(tokens.shape)}."
            )
        self.num_states = size + 1
        self.tokens, self.prediction = tokens, as_prediction(log_probs)
        self.sites = sites
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        super().__init__(batch, torch.Size((length,)), validate_args=validate_args)
        if self._validate_args:
            check_states(self)
            check_normalised(self, self.prediction)

    @property
    def log_probs(self) -> Tensor:
        """The prediction as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    @property
    def revealed(self) -> Tensor:
        """The revealed positions, bool ``(*batch, L)``."""
        where = torch.zeros(self.tokens.numel(), dtype=torch.bool, device=self.tokens.device)
        return where.index_fill(0, self.sites, True).view(self.tokens.shape)

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
        flat, sites = self.tokens.flatten(), self.sites
        noise = uniforms(sites.shape, generator=generator, device=sites.device)
        with torch.no_grad():
            drawn = self.prediction.draw_at(sites, noise)
        return flat.index_put((sites,), drawn).view(self.tokens.shape)

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
        parts = [
            log_c.gather(-1, value.flatten()[own].clamp(0, size - 1)[:, None])[:, 0]
            for own, log_c in self.prediction.rows(sites)
        ]
        log_c = torch.cat(parts) if parts else legal.new_zeros(0, dtype=torch.float64)
        total = log_c.new_zeros(legal.numel()).index_add(0, sites // length, log_c)
        return torch.where(legal, total.reshape(legal.shape), -torch.inf)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Return the same distribution with larger batch dimensions."""
        shape = check_expand(self.batch_shape, batch_shape)
        new: Self = self._get_checked_instance(type(self), _instance)
        new.num_states, new.prediction = self.num_states, self.prediction.expand(shape)
        new.tokens = self.tokens.expand(*shape, -1)
        new.sites = self.revealed.expand(new.tokens.shape).flatten().nonzero()[:, 0]
        new.fixed = None if self.fixed is None else self.fixed.expand(new.tokens.shape)
        super(StepDistribution, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def with_log_probs(self, log_probs: Tensor) -> EventStep:
        """Return the same step with another prediction of the clean tokens.

        :param log_probs: log-probabilities, ``(*batch, L, V)``.
        """
        return EventStep(
            self.tokens,
            log_probs,
            self.sites,
            fixed=self.fixed,
            validate_args=False,
        )
