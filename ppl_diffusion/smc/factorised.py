"""Likelihoods of single positions: ``G(x0) = prod_i l_i(x0_i)``, which need no guessing.

The prediction of a masked state is a product over positions, so that the mean of ``G`` under it is
a product of sums, from the same network call as the next step. That mean is the look-ahead here,
and tokens are drawn from the product of prediction and likelihood. At the last step the two add up:
the weight is the exact sum over all sequences, and tokens come from the tilted product, which adds
no noise (LADD, arXiv 2510.18114, has the same product at its last step).

A chain of learned noise has no such prediction but at its last step. There the same is done; before
it, the look-ahead that stands beside the chain takes the place of the prediction, and states are
drawn as the chain draws them, as they are no tokens yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.kernels.block_step import BlockStep
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.kernels.direct import DirectKernel
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc.feynman_kac import FeynmanKac, per_particle
from ppl_diffusion.smc.twists import CallableTwist

_HOPELESS = -700.0  # a twist must be finite, also where the network allows nothing that is wanted


def factorised(chain: ReverseChain, log_likelihoods: Tensor) -> FeynmanKac:
    """Return the Feynman-Kac model of a masked chain under likelihoods of single positions.

    Run it by :func:`~ppl_diffusion.smc.run_smc`.

    :param chain: a chain whose tokens are masked and, once revealed, stay; latents may be drawn
        beside them. Or one of learned noise, a
        :class:`~ppl_diffusion.kernels.DirectKernel`.
    :param log_likelihoods: ``log l``, float ``(L, V)``; ``-inf`` excludes a token.
    :raises CapabilityError: if the steps of the chain are others.
    :raises ValueError: if the shape is another, a value is NaN or ``+inf``, or a position excludes
        all tokens.
    """
    kernel = chain.kernel
    direct = isinstance(kernel, DirectKernel)
    if getattr(kernel, "order", None) is not None:
        raise CapabilityError(
            "factorised: tokens in a learned order are drawn from tables of states, which do not "
            "show what they predict; use FeynmanKac with a potential, or the path without order."
        )
    if not (direct or (kernel.process.absorbing and kernel.can_hold)):
        raise CapabilityError(
            f"factorised: tokens must be masked and stay once they are revealed, which those of "
            f"{kernel!r} do not; use FeynmanKac with a potential."
        )
    shape, values = (chain.length, kernel.process.vocab_size), torch.as_tensor(log_likelihoods)
    if tuple(values.shape) != shape:
        raise ValueError(
            f"factorised: log_likelihoods must have shape {shape}, one number per position and "
            f"token, got {tuple(values.shape)}."
        )
    potential = PositionPotential(values)
    own = potential.log_likelihoods
    proposal = LastProposal(own, kernel.num_steps) if direct else PositionProposal(own)
    return FeynmanKac(chain, potential, _MeanTwist.of(kernel, own), proposal)


class PositionPotential(AbstractPotential):
    """``log G(x0) = sum_i log l_i(x0_i)``.

    :param log_likelihoods: ``log l``, float ``(L, V)``; ``-inf`` excludes a token.
    :raises ValueError: if a value is NaN or ``+inf``, or a position excludes all tokens.
    """

    name = "likelihoods of positions"

    def __init__(self, log_likelihoods: Tensor) -> None:
        values = torch.as_tensor(log_likelihoods).to(torch.float64)
        if values.ndim != 2 or bool((torch.isnan(values) | (values == math.inf)).any()):
            raise ValueError(
                "PositionPotential: log_likelihoods must be a table (L, V) of numbers below "
                f"+inf, got shape {tuple(values.shape)}."
            )
        empty = (values == -math.inf).all(-1)
        if bool(empty.any()):
            raise ValueError(
                f"PositionPotential: position {int(empty.nonzero()[0])} excludes all tokens, so no "
                "sequence is left; allow one."
            )
        self.log_likelihoods = values

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return the sum over positions, float64 ``(*batch,)``."""
        table = self.log_likelihoods.to(x0.device).expand(*x0.shape, -1)
        return table.gather(-1, x0[..., None])[..., 0].sum(-1)


@dataclass(frozen=True)
class PositionProposal:
    """Move by the chain's own step, its prediction times the likelihoods.

    :param log_likelihoods: ``log l``, float64 ``(L, V)``.
    """

    log_likelihoods: Tensor

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`).

        :raises CapabilityError: if the step shows no prediction.
        """
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        if not hasattr(step, "with_log_probs"):
            raise CapabilityError(
                f"factorised: a {type(step).__name__} does not show what it predicts; use "
                "FeynmanKac with a potential."
            )
        assert isinstance(step, TokenStep)
        log_c = step.log_probs.to(torch.float64)
        both = log_c + self.log_likelihoods.to(log_c.device)
        total = torch.logsumexp(both, -1, keepdim=True)
        # Where the network allows no token that is wanted, the particle is dead however it moves.
        tilted = torch.where(total == -math.inf, log_c, both - total)
        return step.with_log_probs(tilted)


@dataclass(frozen=True)
class LastProposal:
    """Move as the chain does, and at the last step by its law times the likelihoods.

    :param log_likelihoods: ``log l``, float64 ``(L, V)``.
    :param num_steps: of the chain.
    """

    log_likelihoods: Tensor
    num_steps: int

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the step, tilted if it is the last (a :class:`~ppl_diffusion.smc.Proposal`)."""
        if k < self.num_steps - 1:
            return step
        assert isinstance(step, StateStep)
        both = _tilted(step.log_probs, self.log_likelihoods)
        dead = (both == -math.inf).all(-1, keepdim=True)
        law = torch.where(dead, step.log_probs, both)
        return StateStep(law, tokens=step.tokens, validate_args=False)


def _tilted(log_v: Tensor, log_likelihoods: Tensor) -> Tensor:
    """Return a law of states times likelihoods, not normalised; a mask is no token."""
    log_l = log_likelihoods.to(log_v.device)
    rest = log_v.shape[-1] - log_l.shape[-1]
    return log_v + torch.nn.functional.pad(log_l, (0, rest), value=-math.inf)


@dataclass(frozen=True)
class _MeanTwist(CallableTwist):
    """The mean of the likelihoods under the prediction of the state, position by position."""

    log_likelihoods: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    name: str = "mean"

    @classmethod
    def of(cls, kernel: Kernel, log_likelihoods: Tensor) -> _MeanTwist:
        if isinstance(kernel, DirectKernel):
            return cls(_direct_mean(kernel, log_likelihoods), log_likelihoods=log_likelihoods)

        def log_mean(carry: Carry, k: int) -> Tensor:
            tokens, log_l = carry[TOKENS], log_likelihoods.to(carry[TOKENS].device)
            predicted = kernel.predict(carry, k).dense().to(torch.float64) + log_l
            masked = tokens == kernel.process.vocab_size
            known = log_l.expand(*tokens.shape, -1).gather(
                -1, torch.where(masked, 0, tokens)[..., None]
            )
            each = torch.where(masked, torch.logsumexp(predicted, -1), known[..., 0])
            total = per_particle(each.sum(-1))
            return total.clamp_min(_HOPELESS)

        return cls(log_mean, log_likelihoods=log_likelihoods)

    def at(self, kernel: Kernel) -> CallableTwist:
        """Return the same twist of a kernel around a counted network."""
        return _MeanTwist.of(kernel, self.log_likelihoods)


def _direct_mean(kernel: DirectKernel, log_likelihoods: Tensor) -> Callable[[Carry, int], Tensor]:
    def log_mean(carry: Carry, k: int) -> Tensor:
        if k == kernel.num_steps - 1:  # exact: what is drawn next is the sequence
            both = _tilted(kernel.step(carry, k).log_probs, log_likelihoods)
        elif k == kernel.num_steps:
            one = torch.nn.functional.one_hot(carry[TOKENS], kernel.process.num_states)
            both = _tilted(one.to(torch.float64).log(), log_likelihoods)
        else:
            both = _tilted(kernel.posterior_mean(carry, k), log_likelihoods)
        return per_particle(torch.logsumexp(both, -1).sum(-1)).clamp_min(_HOPELESS)

    return log_mean
