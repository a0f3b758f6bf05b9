"""One step of a masked chain that reveals a given number of positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction, as_prediction
from ppl_diffusion.kernels.step import StepDistribution, check_normalised, check_states


class RevealStep(StepDistribution):
    """Reveal ``count`` of the eligible masked positions, each token drawn from the prediction.

    Which ones is uniform among the subsets of that size, or follows ``order`` where that is given.
    With fewer eligible positions than ``count`` all of them are revealed. Event shape ``(L,)``,
    exact and normalised::

        p(z') = prod_{revealed l} c^l(z'^l) / C(#eligible, #revealed)

    :param tokens: current states, int64 ``(*batch, L)``; the mask has id ``V``.
    :param log_probs: log-probabilities of clean tokens, ``(*batch, L, V)``, or a
        :class:`~ppl_diffusion.denoisers.Prediction`.
    :param eligible: bool ``(*batch, L)``: masked positions that may be revealed.
    :param count: how many are revealed.
    :param order: float64 ``(*batch, L)`` or None: the highest are revealed, with certainty.
    :param fixed: bool ``(*batch, L)`` or None: positions that keep their token.
    :raises ValueError: if the prediction is for another number of sites.
    """

    def __init__(
        self,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        eligible: Tensor,
        count: int,
        *,
        order: Tensor | None = None,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch = torch.broadcast_shapes(tokens.shape[:-1], log_probs.shape[:-2])
        length, size = tokens.shape[-1], log_probs.shape[-1]
        if log_probs.shape[-2] != length:
            raise ValueError(
                f"RevealStep: log_probs of shape {tuple(log_probs.shape)} are not for {length} "
                "sites; predict every position of tokens."
            )
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"RevealStep: count must be a whole number >= 0, got {count!r}.")
        self.num_states, self.count = size + 1, count
        self.tokens = tokens.expand(*batch, length)
        self.prediction = as_prediction(log_probs).expand(batch)
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        eligible = eligible & (tokens == size)
        self.eligible = (eligible if fixed is None else eligible & ~fixed).expand(*batch, length)
        self.order = None if order is None else order.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)
        if self._validate_args:
            check_states(self)
            check_normalised(self, self.prediction)

    @property
    def log_probs(self) -> Tensor:
        """The prediction as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    @property
    def num_revealed(self) -> Tensor:
        """How many positions are revealed, int64 ``(*batch,)``."""
        return self.eligible.sum(-1).clamp_max(self.count)

    def _score(self, tokens: Tensor, value: Tensor) -> Tensor:
        size = self.num_states - 1
        changed = value != tokens
        legal = (~changed | (self.eligible & (value >= 0) & (value < size))).all(-1)
        legal = legal & (changed.sum(-1) == self.num_revealed)
        if self.order is not None:
            legal = legal & (changed == self._first(self.order).expand_as(changed)).all(-1)
        where = changed & legal[..., None]
        prediction = self.prediction.expand(value.shape[:-1])
        c = prediction.probabilities(value.clamp(0, size - 1)[..., None], where)[..., 0]
        possible = c > 0
        site = torch.where(possible, torch.where(possible, c, 1.0).log(), -torch.inf)
        log_p = torch.where(where, site, 0.0).sum(-1) + self._log_subset()
        return torch.where(legal, log_p, -torch.inf)

    def draw(self, u_order: Tensor, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        tokens = self.tokens.expand_as(u_order)
        chosen = self._first(u_order if self.order is None else self.order).expand_as(tokens)
        return self.prediction.expand(tokens.shape[:-1]).draw(u_token, chosen, tokens)

    def with_log_probs(self, log_probs: Tensor) -> RevealStep:
        """Return the same step with another prediction of the clean tokens.

        :param log_probs: log-probabilities, ``(*batch, L, V)``.
        """
        return RevealStep(
            self.tokens,
            log_probs,
            self.eligible,
            self.count,
            order=self.order,
            fixed=self.fixed,
            validate_args=False,
        )

    def _first(self, order: Tensor) -> Tensor:
        """Return the ``count`` eligible positions of highest order, bool."""
        key = torch.where(self.eligible, order, -torch.inf)
        rank = key.argsort(-1, descending=True).argsort(-1)
        return self.eligible & (rank < self.count)

    def _log_subset(self) -> Tensor:
        """Return minus the log of the number of subsets there are to choose from."""
        if self.order is not None:
            shape, device = self.batch_shape, self.tokens.device
            return torch.zeros(shape, dtype=torch.float64, device=device)
        n, m = self.eligible.sum(-1).to(torch.float64), self.num_revealed.to(torch.float64)
        return torch.lgamma(m + 1) + torch.lgamma(n - m + 1) - torch.lgamma(n + 1)
