"""Condition reverse chains on some tokens of the clean sequence."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.distributions.reveal_step import RevealStep
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.distributions.token_step import TokenStep
from ppl_diffusion.handlers._site import ProposedChain, SiteMessenger
from ppl_diffusion.smc.feynman_kac import Carry


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

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TokenStep | RevealStep:
        """Return the clamped step (a :class:`~ppl_diffusion.smc.Proposal`).

        :raises CapabilityError: if the step shows no prediction, or where the bridge could not
            follow the model: with ``kappa < 1`` and states of prior probability zero, a wrong token
            may be revealed and masked again.
        :raises ValueError: if the chain's prompt holds another token at a clamped position.
        """
        if not isinstance(step, TokenStep | RevealStep):
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
        known = torch.nn.functional.one_hot(self.tokens, self.vocab_size).to(step.log_probs).log()
        log_probs = torch.where(self.mask[:, None], known, step.log_probs)
        return step.with_log_probs(log_probs)

    def _require_agreeing_prompt(self, step: TokenStep | RevealStep) -> None:
        if step.fixed is None:
            return
        clash = step.fixed & self.mask & (step.tokens != self.tokens)
        if bool(clash.any()):
            position = int(clash.reshape(-1, len(self.mask)).any(0).nonzero()[0])
            raise ValueError(
                f"clamp: the chain's prompt holds another token at position {position}, so no path "
                "meets the clamp; change one of them."
            )

    def merge(self, other: ClampProposal) -> ClampProposal:
        """Return both clamps at once.

        :param other: another clamp of the same chain.
        :raises ValueError: if they disagree at a position.
        """
        both = self.mask & other.mask
        if not torch.equal(self.tokens[both], other.tokens[both]):
            raise ValueError("clamp: two clamps want different tokens at the same position.")
        tokens = torch.where(self.mask, self.tokens, other.tokens)
        return ClampProposal(tokens, self.mask | other.mask, self.vocab_size)

    def holds(self, x0: Tensor) -> Tensor:
        """Return whether a clean sequence has the clamped tokens, bool ``(*batch,)``.

        :param x0: int64 ``(*batch, L)``.
        """
        return ((x0 == self.tokens) | ~self.mask).all(-1)


class ClampedChain(ProposedChain):
    """A chain site under a clamp: proposed with the tokens held, scored as the conditioned chain.

    :param chain: the chain.
    :param clamp: the clamp.
    :raises CapabilityError: if the chain's steps have no density.
    :raises ValueError: if their lengths differ.
    """

    def __init__(self, chain: ReverseChain, clamp: ClampProposal) -> None:
        if not chain.kernel.has_path_density:
            raise CapabilityError(
                f"clamp: forced tokens need a kernel with a density, {type(chain.kernel).__name__} "
                f"is {chain.kernel.claim}; condition by a potential that is -inf elsewhere."
            )
        if clamp.mask.shape[-1] != chain.length:
            raise ValueError(
                f"clamp: the chain has {chain.length} positions, the clamp {clamp.mask.shape[-1]}."
            )
        self.clamp = clamp
        super().__init__(chain)

    def with_clamp(self, clamp: ClampProposal) -> ClampedChain:
        """Return the same site with further tokens held.

        :param clamp: the clamp.
        """
        return ClampedChain(self.chain, self.clamp.merge(clamp))

    def _with_chain(self, chain: ReverseChain) -> Self:
        return type(self)(chain, self.clamp)

    def _model_log_prob(self, path: Tensor) -> Tensor:
        return torch.where(self.clamp.holds(self.x0(path)), self.chain.log_prob(path), -torch.inf)

    def _propose(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        chain, kernel = self.chain, self.chain.kernel
        with torch.no_grad():
            carry = chain.start(shape)
            log_p = kernel.prior_log_prob(carry["tokens"], chain.prompt)
            log_weight = torch.zeros_like(log_p)
            states = [carry["tokens"]]
            for k in range(kernel.num_steps):
                step = kernel.step(carry, k, fixed=chain.fixed)
                proposal = self.clamp(step, carry, k)
                tokens = proposal.sample()
                increment = step.log_prob(tokens)
                log_p = log_p + increment
                log_weight = log_weight + increment - proposal.log_prob(tokens)
                carry = kernel.advance(carry, tokens, k, step=step)
                states.append(tokens)
        return torch.stack(states, -2), log_p, log_weight


class ClampMessenger(SiteMessenger):
    """The handler behind :func:`clamp`.

    :param tokens: int64 ``(L,)``.
    :param mask: bool ``(L,)``.
    :param sites: names of the chain sites, or None for all.
    """

    handler = "clamp"

    def __init__(self, tokens: Tensor, mask: Tensor, sites: Collection[str] | None) -> None:
        super().__init__(sites)
        self.tokens, self.mask = tokens, mask

    def _exchanged(self, msg: Any) -> TorchDistribution | None:
        fn = msg["fn"]
        if isinstance(fn, ReverseChain):
            clamp = ClampProposal(self.tokens, self.mask, fn.kernel.process.vocab_size)
            return ClampedChain(fn, clamp)
        if hasattr(fn, "with_clamp"):  # a site that is clamped, steered or twisted already
            size = fn.chain.kernel.process.vocab_size
            clamped: TorchDistribution = fn.with_clamp(ClampProposal(self.tokens, self.mask, size))
            return clamped
        return None


def clamp(
    fn: Callable[..., Any] | None = None,
    *,
    tokens: Tensor,
    mask: Tensor,
    sites: Collection[str] | None = None,
) -> Any:
    """Observe some tokens of the clean sequences of a program's chains.

    Conditions the model: the target becomes ``p(path | x0[mask] = tokens[mask])`` times the rest
    of the program, and the evidence includes the probability of the tokens. Exact through weights
    (for the absorbing process: the probabilities of the forced tokens when they are revealed).
    Works under plain Pyro inference and inside :func:`~ppl_diffusion.handlers.steer` and
    :class:`ppl_diffusion.inference.SMC`.

    :param fn: a program to wrap; without it, use ``clamp`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param tokens: int64 ``(L,)``, read where ``mask`` is true.
    :param mask: bool ``(L,)``.
    :param sites: names of the chain sites to clamp (all by default).
    :raises ValueError: if tokens and chain do not fit, or no chain site is met.

    Example::

        with clamp(tokens=prior.encode(80 * "T"), mask=torch.arange(80) < 6):
            posterior = SMC(assay, num_particles=256).run(y)
    """
    messenger = ClampMessenger(tokens, mask, sites)
    return messenger if fn is None else messenger(fn)
