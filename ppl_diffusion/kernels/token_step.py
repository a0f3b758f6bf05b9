"""The distribution of one reverse step: every position moves independently given the state."""

from __future__ import annotations

import numpy as np
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction, as_prediction
from ppl_diffusion.kernels._sparse import sparse_draw, sparse_log_prob
from ppl_diffusion.kernels.kappa_rules import kappa_room
from ppl_diffusion.kernels.step import StepDistribution, check_normalised, check_states
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import mixture_log_prob, mixture_sample, site_weights


class TokenStep(StepDistribution):
    """One step of a reverse chain, a product over positions of three-way mixtures.

    Event shape ``(L,)``, values are state ids. Exact and normalised; positions in ``fixed`` keep
    their token with probability one and contribute nothing to the density.

    :param tokens: current states, int64 ``(*batch, L)``.
    :param log_probs: cavity log-probabilities of the denoiser, ``(*batch, L, V)``: a tensor, or a
        :class:`~ppl_diffusion.denoisers.Prediction` that is evaluated where it is needed.
    :param alpha_t: signal level of the current state.
    :param alpha_s: signal level after the step, at least ``alpha_t``.
    :param kappa: Psi parameter, 1 is ancestral; a number, or one per site, broadcastable to
        ``(*batch, L)``.
    :param fixed: bool ``(*batch, L)`` or None.
    :raises ValueError: if shapes or levels do not fit, and while arguments are validated if a token
        is no state, ``kappa`` leaves no distribution, or ``log_probs`` is a table that is none.
    """

    def __init__(
        self,
        process: Process,
        tokens: Tensor,
        log_probs: Tensor | Prediction,
        alpha_t: float,
        alpha_s: float,
        kappa: float | Tensor = 1.0,
        *,
        fixed: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not 0 <= alpha_t <= alpha_s <= 1:
            raise ValueError(
                f"TokenStep: need 0 <= alpha_t <= alpha_s <= 1, got {alpha_t} and {alpha_s}."
            )
        batch = broadcast_shape(tokens.shape[:-1], log_probs.shape[:-2])
        length = tokens.shape[-1]
        if log_probs.shape[-2:] != (length, process.vocab_size):
            raise ValueError(
                f"TokenStep: log_probs must end in {(length, process.vocab_size)}, "
                f"got {tuple(log_probs.shape)}."
            )
        self.process, self.num_states = process, process.num_states
        self.tokens = tokens.expand(*batch, length)
        self.prediction = as_prediction(log_probs).expand(batch)
        self.alpha_t, self.alpha_s = alpha_t, alpha_s
        self.kappa = kappa.expand(*batch, length) if isinstance(kappa, Tensor) else kappa
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)
        if self._validate_args:
            self._check_kappa()
            check_states(self)
            check_normalised(self, self.prediction)

    def _check_kappa(self) -> None:
        lowest, highest = (f(self._kappa).item() for f in (torch.min, torch.max))
        room = kappa_room(self.process, np.array([self.alpha_t, self.alpha_s]))[0]
        if not (min(room, 0.0) - 1e-12 <= lowest and highest <= 1):
            raise ValueError(
                f"TokenStep: kappa must be at most 1 and here at least {min(room, 0.0):.4g}, got "
                f"{lowest:.4g} to {highest:.4g}."
            )

    @property
    def log_probs(self) -> Tensor:
        """The prediction as a table, ``(*batch, L, V)``."""
        return self.prediction.dense()

    @property
    def corrects(self) -> bool:
        """Whether some site may be noised again (``kappa < 1``)."""
        return bool(torch.any(self._kappa < 1))

    @property
    def detours(self) -> bool:
        """Whether the model may go where the bridge to a known clean sequence cannot follow.

        With ``kappa < 1`` and a prior with zeros a wrong token may be revealed and masked again
        later; with ``kappa < 0`` a known token may forbid staying where the model may stay.
        """
        holes = bool((self.process.prior == 0).any())
        return bool(torch.any(self._kappa < (1 if holes else 0)))

    def _site_log_probs(self, tokens: Tensor, value: Tensor) -> Tensor:
        if self._sparse:
            prediction = self.prediction.expand(value.shape[:-1])
            return sparse_log_prob(self.process, tokens, value, prediction, self._levels)
        log_c = self.log_probs.expand(*value.shape, -1)
        return mixture_log_prob(self.process, tokens, value, log_c, *self._levels)

    def draw(self, u_move: Tensor, u_token: Tensor) -> Tensor:  # type: ignore[override]
        """Turn uniforms into next states; the same uniforms give the same states."""
        tokens, (a, b, kappa) = self.tokens.expand_as(u_move), self._levels
        if self._sparse:
            prediction = self.prediction.expand(u_move.shape[:-1])
            moved = sparse_draw(self.process, tokens, prediction, (a, b, kappa), u_move, u_token)
        else:
            log_c = self.log_probs.expand(*u_move.shape, -1)
            moved = mixture_sample(self.process, tokens, log_c, a, b, u_move, u_token, kappa)
        return moved if self.fixed is None else torch.where(self.fixed, tokens, moved)

    @property
    def _kappa(self) -> Tensor:
        # A number stays on the host: asking about it must not wait for an accelerator.
        return torch.as_tensor(self.kappa, device=getattr(self.kappa, "device", "cpu"))

    @property
    def _levels(self) -> tuple[float, float, float | Tensor]:
        return self.alpha_t, self.alpha_s, self.kappa

    @property
    def _sparse(self) -> bool:
        # Below zero "stay" can be a negative weight, which only the table of a site can take.
        table = not self.process.absorbing and bool(torch.any(self._kappa < 0))
        # A prior over tokens and something else needs c of both; the table knows how.
        pure = self.process.absorbing or self.num_states == self.process.vocab_size
        return pure and not table

    def with_log_probs(self, log_probs: Tensor) -> TokenStep:
        """Return the same step with another prediction of the clean tokens.

        :param log_probs: cavity log-probabilities, ``(*batch, L, V)``.
        """
        fixed, levels = self.fixed, self._levels
        return TokenStep(
            self.process, self.tokens, log_probs, *levels, fixed=fixed, validate_args=False
        )

    def dense_log_probs(self) -> Tensor:
        """Return the law of every site as a table, float64 ``(*batch, L, S)``.

        Memory grows with the number of states; sampling and scoring never need it.
        """
        log_c, size = self.log_probs, self.num_states
        weights = site_weights(self.process, self.tokens, log_c, *self._levels)
        stay, den, prior = (w[..., None] for w in weights)
        here = self.tokens[..., None] == torch.arange(size, device=self.tokens.device)
        spare = size - self.process.vocab_size
        clean = torch.nn.functional.pad(log_c.to(torch.float64).exp(), (0, spare))
        table = stay * here + den * clean + prior * self.process.prior_array(stay)
        if self.fixed is not None:
            table = torch.where(self.fixed[..., None], here.to(table.dtype), table)
        possible = table > 0  # log 0 must not send NaN backwards
        return torch.where(possible, torch.where(possible, table, 1.0).log(), -torch.inf)
