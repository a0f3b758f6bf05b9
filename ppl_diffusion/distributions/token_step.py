"""The distribution of one reverse step: every position moves independently given the state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import constraints

from ppl_diffusion.distributions._shapes import check_expand, check_value, enumerated
from ppl_diffusion.kernels.mixture import mixture_log_prob, mixture_sample
from ppl_diffusion.kernels.processes import Process

MAX_ENUMERATE = 2**16
"""Largest support that ``enumerate_support`` will build."""


class TokenStep(TorchDistribution):
    """One step of a reverse chain, a product over positions of three-way mixtures.

    Event shape ``(L,)``, values are state ids. Exact and normalised; positions in ``fixed`` keep
    their token with probability one and contribute nothing to the density.

    :param process: forward process.
    :param tokens: current states, int64 ``(*batch, L)``.
    :param log_probs: cavity log-probabilities of the denoiser, ``(*batch, L, V)``.
    :param alpha_t: signal level of the current state.
    :param alpha_s: signal level after the step, at least ``alpha_t``.
    :param kappa: Psi parameter, 1 is ancestral.
    :param fixed: bool ``(*batch, L)`` or None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's class protocol)
    has_enumerate_support = True

    def __init__(
        self,
        process: Process,
        tokens: Tensor,
        log_probs: Tensor,
        alpha_t: float,
        alpha_s: float,
        kappa: float = 1.0,
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
        self.process = process
        self.tokens = tokens.expand(*batch, length)
        self.log_probs = log_probs.expand(*batch, length, process.vocab_size)
        self.alpha_t, self.alpha_s, self.kappa = alpha_t, alpha_s, kappa
        self.fixed = None if fixed is None else fixed.expand(*batch, length)
        super().__init__(torch.Size(batch), torch.Size((length,)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Sequences of states."""
        last = self.process.num_states - 1
        return constraints.independent(constraints.integer_interval(0, last), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log-probability of a next state.

        :param value: states, int64 ``(*sample, *batch, L)``.
        :returns: float64, the broadcast batch shape; ``-inf`` for impossible moves.
        """
        if self._validate_args:
            self._validate_sample(value)
        value = check_value(self, value)
        tokens, value = torch.broadcast_tensors(self.tokens, value)
        site = mixture_log_prob(
            self.process,
            tokens,
            value,
            self.log_probs.expand(*value.shape, -1),
            self.alpha_t,
            self.alpha_s,
            self.kappa,
        )
        if self.fixed is not None:
            kept = torch.where(value == tokens, 0.0, -torch.inf).to(site.dtype)
            site = torch.where(self.fixed, kept, site)
        return site.sum(-1)

    def sample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw next states.

        :param sample_shape: leading dimensions.
        :param generator: source of randomness (the global one by default).
        :returns: int64 ``(*sample_shape, *batch, L)``.
        """
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        device = self.log_probs.device
        uniforms = torch.rand((2, *shape), dtype=torch.float64, generator=generator, device=device)
        with torch.no_grad():
            return self.draw(uniforms[0], uniforms[1])

    def draw(self, u_move: Tensor, u_token: Tensor) -> Tensor:
        """Turn uniforms into next states; the same uniforms give the same states.

        :param u_move: numbers in ``[0, 1)``, ``(*sample, *batch, L)``: which of the three moves.
        :param u_token: likewise: which token.
        """
        tokens = self.tokens.expand_as(u_move)
        moved = mixture_sample(
            self.process,
            tokens,
            self.log_probs.expand(*u_move.shape, -1),
            self.alpha_t,
            self.alpha_s,
            u_move,
            u_token,
            self.kappa,
        )
        return moved if self.fixed is None else torch.where(self.fixed, tokens, moved)

    def with_log_probs(self, log_probs: Tensor) -> TokenStep:
        """Return the same step with another prediction of the clean tokens.

        :param log_probs: cavity log-probabilities, ``(*batch, L, V)``.
        """
        levels = (self.alpha_t, self.alpha_s, self.kappa)
        return TokenStep(
            self.process, self.tokens, log_probs, *levels, fixed=self.fixed, validate_args=False
        )

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all sequences of states, ``(S ** L, *batch, L)``.

        :param expand: whether to expand the batch dimensions (size one otherwise).
        :raises NotImplementedError: if there are more than ``MAX_ENUMERATE``.
        """
        return enumerated(self, self.process.num_states, expand, MAX_ENUMERATE)

    def expand(self, batch_shape: Sequence[int], _instance: TokenStep | None = None) -> TokenStep:
        """Return the same distribution with larger batch dimensions.

        :param batch_shape: the new batch shape.
        """
        new = self._get_checked_instance(TokenStep, _instance)
        shape = check_expand(self.batch_shape, batch_shape)
        new.process, new.kappa = self.process, self.kappa
        new.alpha_t, new.alpha_s = self.alpha_t, self.alpha_s
        new.tokens = self.tokens.expand(*shape, -1)
        new.log_probs = self.log_probs.expand(*shape, -1, -1)
        new.fixed = None if self.fixed is None else self.fixed.expand(*shape, -1)
        super(TokenStep, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @classmethod
    def infer_shapes(
        cls,
        process: object = (),
        tokens: Sequence[int] = (),
        log_probs: Sequence[int] = (),
        alpha_t: object = (),
        alpha_s: object = (),
        kappa: object = (),
        fixed: object = (),
    ) -> tuple[torch.Size, torch.Size]:
        """Return ``(batch_shape, event_shape)`` from the shapes of the arguments.

        :param tokens: shape of ``tokens``.
        :param log_probs: shape of ``log_probs``.
        """
        batch = broadcast_shape(tuple(tokens)[:-1], tuple(log_probs)[:-2])
        return torch.Size(batch), torch.Size(tuple(tokens)[-1:])
