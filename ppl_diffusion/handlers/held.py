"""Hold tokens of the clean sequence while the other positions move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers.proposals import Step
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.block_step import BlockStep
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.kernels.event_step import EventStep
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.padded import Padded
from ppl_diffusion.smc import Proposal


class ClampProposal:
    """Move observed positions by the bridge to their token, the others by the model.

    At an observed position the denoiser's prediction is replaced by the known answer. For the
    absorbing process this forces the token when its position is revealed, and the weight is the
    probability the denoiser gave it; for any other process the weight is the ratio of the two
    bridges. Either way the weighted paths are exactly those of the chain given the tokens. Refused
    where the bridge cannot follow the model (``kappa < 1`` over a prior with zeros).

    :param tokens: int64 ``(L,)``; read where ``mask`` is true.
    :param mask: bool ``(L,)``.
    :param vocab_size: number of clean tokens ``V``.
    :raises ValueError: if shapes differ or a clamped token is not clean.
    """

    any_clock: Literal[True] = True

    def __init__(self, tokens: Tensor, mask: Tensor, vocab_size: int) -> None:
        tokens, mask = torch.as_tensor(tokens), torch.as_tensor(mask)
        if tokens.ndim != 1 or tokens.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                "clamp: tokens and mask must both have shape (L,), mask of dtype bool; got "
                f"{tuple(tokens.shape)} and {tuple(mask.shape)} ({mask.dtype})."
            )
        held = tokens[mask]
        if held.numel() and not 0 <= int(held.min()) <= int(held.max()) < vocab_size:
            raise ValueError(f"clamp: clamped tokens must be clean ids, 0..{vocab_size - 1}.")
        self.mask = mask
        self.tokens = torch.where(mask, tokens, 0).to(torch.int64)
        self.vocab_size = vocab_size

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> Step | BlockStep:
        """Return the clamped step (a :class:`~ppl_diffusion.smc.Proposal`).

        :raises CapabilityError: if the step shows no prediction, or where the bridge could not
            follow the model: with ``kappa < 1`` and states of prior probability zero, a wrong token
            may be revealed and masked again.
        :raises ValueError: if the chain's prompt holds another token at a clamped position.
        """
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        if not isinstance(step, TokenStep | RevealStep | EventStep):
            raise CapabilityError(
                f"clamp: it holds tokens by changing what the denoiser predicts, which a "
                f"{type(step).__name__} does not show; condition by a potential that is -inf "
                "elsewhere."
            )
        if isinstance(step, TokenStep) and step.detours:
            raise CapabilityError(
                "clamp: a kernel with kappa < 1 over a prior with zeros (such as masks), or with "
                "kappa < 0, can reach the tokens by detours that the clamp cannot propose; use "
                "kappa = 1, or condition by a potential that is -inf elsewhere."
            )
        self._require_agreeing_prompt(step)
        tokens, mask = self.beside(step.tokens)
        known = torch.nn.functional.one_hot(tokens, self.vocab_size).to(step.log_probs).log()
        return step.with_log_probs(torch.where(mask[:, None], known, step.log_probs))

    def check_chain(self, process: Process) -> None:
        """Refuse to hold letters where sequences may have ended: nothing is proposed there.

        :raises ValueError: if a shorter length has probability.
        """
        if not isinstance(process, Padded):
            return
        letters = self.mask & (self.tokens != process.padding)
        needed = int(letters.nonzero().max()) + 1 if bool(letters.any()) else 0
        shortest = int(process.lengths.nonzero()[0][0])
        if shortest < needed:
            raise ValueError(
                f"clamp: a letter is held at position {needed - 1}, but sequences of {shortest} "
                f"letters have probability; restrict the lengths first, prior.between({needed})."
            )

    def beside(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and mask where states live."""
        # The user need not know where the network lives; where all is on one device this is free.
        return self.tokens.to(states.device), self.mask.to(states.device)

    def _require_agreeing_prompt(self, step: Step) -> None:
        if step.fixed is None:
            return
        tokens, mask = self.beside(step.tokens)
        clash = step.fixed & mask & (step.tokens != tokens)
        if bool(clash.any()):
            position = int(clash.reshape(-1, len(mask)).any(0).nonzero()[0])
            raise ValueError(
                f"clamp: the chain's prompt holds another token at position {position}, so no path "
                "meets the clamp; change one of them."
            )

    def merge(self, other: ClampProposal) -> ClampProposal:
        """Return both clamps at once.

        :param other: another clamp of the same chain.
        :raises ValueError: if they disagree at a position.
        """
        tokens, mask = other.beside(self.tokens)
        both = self.mask & mask
        if not torch.equal(self.tokens[both], tokens[both]):
            raise ValueError("clamp: two clamps want different tokens at the same position.")
        merged = torch.where(self.mask, self.tokens, tokens)
        return ClampProposal(merged, self.mask | mask, self.vocab_size)

    def holds(self, x0: Tensor) -> Tensor:
        """Return whether a clean sequence has the clamped tokens, bool ``(*batch,)``.

        :param x0: int64 ``(*batch, L)``.
        """
        tokens, mask = self.beside(x0)
        return ((x0 == tokens) | ~mask).all(-1)


@dataclass(frozen=True)
class _Both:
    """A twisted step with some tokens held."""

    twist: Proposal
    clamp: ClampProposal

    def check_chain(self, process: Process) -> None:
        self.clamp.check_chain(process)

    def __call__(self, step: Any, carry: Carry, k: int, /) -> TorchDistribution:
        # The clamp comes last: it overwrites the prediction, a twist only tilts it.
        return self.clamp(self.twist(step, carry, k), carry, k)


def joined(twist: Proposal | None, clamp: ClampProposal | None) -> Proposal | None:
    """Return a twist with some tokens held, either of them alone, or None.

    :param twist: how to move.
    :param clamp: tokens to hold.
    """
    if twist is None or clamp is None:
        return clamp if twist is None else twist
    return _Both(twist, clamp)
