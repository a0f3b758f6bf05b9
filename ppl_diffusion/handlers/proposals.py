"""Proposals that tilt what the denoiser predicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.block_step import BlockStep
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.kernels.event_step import EventStep
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.mixture import log_posterior_mean
from ppl_diffusion.rows import distinct_rows
from ppl_diffusion.smc.run_memory import remembers

Step = TokenStep | RevealStep | EventStep
LogitsFn = Callable[[Carry, Tensor, int], Tensor]


class LogitsProposal:
    """Move by the chain's own step, with the denoiser's prediction tilted: ``c exp(psi) / sum``.

    What is revealed, kept or noised again is left to the model, so that every state the model can
    reach can be proposed.

    :param logits: ``(carry, log_probs, k) -> psi``: tilts of the clean tokens, ``(*batch, L, V)``,
        given the states, the prediction ``(*batch, L, V)`` and the step index; learned, or
        computed from a potential. Free to be wrong; finite.
    """

    def __init__(self, logits: LogitsFn) -> None:
        if not callable(logits):
            raise TypeError(f"twist: logits must be a function, got {type(logits).__name__}.")
        self.logits = logits

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`)."""
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        step = tiltable(step)
        return tilted(step, self.logits(carry, step.log_probs, k))


@remembers("num_calls")
class GradientProposal:
    """Tilt the prediction by the gradient of a potential that accepts soft sequences.

    One backward pass prices every token at every site: to first order, ``log G`` changes by
    ``d log G / d x[l, v]`` when site ``l`` turns towards ``v``. The derivative is taken at the
    denoiser's own mean prediction, revealed tokens being certain (twisted diffusion: Wu et al.
    2023, arXiv:2306.17775, carried over to discrete sites).

    :param soft_potential: ``x (B, L, V) -> log G (B,)``, differentiable; ``x`` holds probabilities
        that sum to one over the last axis.
    :param scale: multiplies the gradient. 0 is the model; negative works, at the cost of variance.

    :ivar num_calls: sequences the potential was differentiated at.
    """

    def __init__(self, soft_potential: Callable[[Tensor], Tensor], *, scale: float = 1.0) -> None:
        self.soft_potential, self.scale = soft_potential, scale
        self.num_calls = 0

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`)."""
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        step = tiltable(step)
        soft = mean_prediction(step).exp()
        rows = soft.reshape(-1, *soft.shape[-2:])
        # Equal states have equal predictions, and after resampling most states are equal.
        first, inverse = distinct_rows(step.tokens.reshape(-1, step.tokens.shape[-1]))
        return tilted(step, self._gradient(rows[first])[inverse].reshape(soft.shape))

    def _gradient(self, soft: Tensor) -> Tensor:
        self.num_calls += len(soft)
        with torch.enable_grad():
            leaf = soft.detach().requires_grad_()
            value = self.soft_potential(leaf)
            if value.shape != soft.shape[:1] or not value.requires_grad:
                raise ValueError(
                    "twist: the soft potential must be a differentiable function of soft sequences "
                    f"with one number for each, shape {tuple(soft.shape[:1])}; got shape "
                    f"{tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'}."
                )
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return self.scale * gradient


def tiltable(step: TorchDistribution) -> Step:
    """Return a step whose prediction can be exchanged.

    :param step: the model's step.
    :raises CapabilityError: if it shows no prediction.
    """
    if isinstance(step, TokenStep | RevealStep | EventStep):
        return step
    raise CapabilityError(
        f"twist: it tilts what the denoiser predicts, which a {type(step).__name__} does not show; "
        "steer by a potential instead."
    )


def tilted(step: Step, psi: Tensor) -> Step:
    """Return a step with the prediction ``c exp(psi)``, normalised per site.

    :param step: the model's step.
    :param psi: finite, broadcastable to ``(*batch, L, V)``.
    :raises ValueError: if ``psi`` has another shape or is not finite.
    """
    log_c = step.log_probs
    if psi.shape[-2:] != log_c.shape[-2:] or not bool(torch.isfinite(psi).all()):
        raise ValueError(
            f"twist: logits must be finite and end in {tuple(log_c.shape[-2:])}, got shape "
            f"{tuple(psi.shape)}; a token the target may need must keep a positive probability."
        )
    return step.with_log_probs(torch.log_softmax(log_c.to(torch.float64) + psi, -1))


def mean_prediction(step: Step) -> Tensor:
    """Return ``log p(x0 | x_k)`` per site as the step's own prediction has it, ``(*batch, L, V)``.

    :param step: the model's step.
    """
    log_c = step.log_probs.to(torch.float64)
    if isinstance(step, TokenStep):
        return log_posterior_mean(step.process, step.tokens, log_c, step.alpha_t)
    known = step.tokens[..., None] == torch.arange(log_c.shape[-1], device=log_c.device)
    masked = (step.tokens == log_c.shape[-1])[..., None]
    return torch.where(masked, log_c, torch.where(known, 0.0, -torch.inf).to(log_c.dtype))
