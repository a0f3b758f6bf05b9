"""Propose reverse chains by tilted predictions, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion._rows import distinct_rows
from ppl_diffusion.distributions.reveal_step import RevealStep
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.distributions.token_step import TokenStep
from ppl_diffusion.handlers._site import ProposedChain, SiteMessenger
from ppl_diffusion.handlers.clamp import ClampedChain, ClampProposal
from ppl_diffusion.handlers.steer import SteeredChain, Steering
from ppl_diffusion.kernels.mixture import log_posterior_mean
from ppl_diffusion.smc.engine import SMCTrace, smc_loop
from ppl_diffusion.smc.feynman_kac import Carry, FeynmanKac, Proposal
from ppl_diffusion.smc.resampling import as_resampler

Step = TokenStep | RevealStep
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
        step = tiltable(step)
        return tilted(step, self.logits(carry, step.log_probs, k))


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
    if isinstance(step, TokenStep | RevealStep):
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
    known = step.tokens[..., None] == torch.arange(log_c.shape[-1])
    masked = (step.tokens == log_c.shape[-1])[..., None]
    return torch.where(masked, log_c, torch.where(known, 0.0, -torch.inf).to(log_c.dtype))


class _Both:
    """A twisted step with some tokens held."""

    def __init__(self, twist: Proposal, clamp: ClampProposal) -> None:
        self.twist, self.clamp = twist, clamp

    def __call__(self, step: Any, carry: Carry, k: int, /) -> TorchDistribution:
        proposed: Any = self.twist(step, carry, k)
        return self.clamp(proposed, carry, k)


def joined(twist: Proposal | None, clamp: ClampProposal | None) -> Proposal | None:
    """Return a twist with some tokens held, either of them alone, or None.

    :param twist: how to move.
    :param clamp: tokens to hold.
    """
    if twist is None or clamp is None:
        return clamp if twist is None else twist
    return _Both(twist, clamp)


class TwistedChain(ProposedChain):
    """A chain site moved by a proposal with a density; its weight is ``prod p / q``.

    :param chain: the chain.
    :param twist: the proposal.
    :param clamp: tokens to hold, or None.
    :raises CapabilityError: if the chain's steps have no density.
    """

    def __init__(
        self, chain: ReverseChain, twist: Proposal, clamp: ClampProposal | None = None
    ) -> None:
        if not chain.kernel.has_path_density:
            raise CapabilityError(
                f"twist: a proposal needs a kernel with a density, {type(chain.kernel).__name__} "
                f"is {chain.kernel.claim}; use steer, which needs samples alone."
            )
        self.twist, self.clamp = twist, clamp
        super().__init__(chain)

    def with_clamp(self, clamp: ClampProposal) -> TwistedChain:
        """Return the same site with (further) tokens held.

        :param clamp: the clamp.
        """
        merged = clamp if self.clamp is None else self.clamp.merge(clamp)
        return TwistedChain(self.chain, self.twist, merged)

    def with_steering(self, steering: Steering) -> TwistedSteeredChain:
        """Return the same site steered: the particles of every run move by the twist.

        :param steering: how it is steered.
        """
        return TwistedSteeredChain(self.chain, steering, self.clamp, self.twist)

    def _with_chain(self, chain: ReverseChain) -> Self:
        return type(self)(chain, self.twist, self.clamp)

    def _model_log_prob(self, path: Tensor) -> Tensor:
        log_p = self.chain.log_prob(path)
        if self.clamp is None:
            return log_p
        return torch.where(self.clamp.holds(self.x0(path)), log_p, -torch.inf)

    def _propose(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        chain, kernel, twist = self.chain, self.chain.kernel, joined(self.twist, self.clamp)
        assert twist is not None
        with torch.no_grad():
            carry = chain.start(shape)
            log_p = kernel.prior_log_prob(carry["tokens"], chain.prompt)
            log_weight = torch.zeros_like(log_p)
            states = [carry["tokens"]]
            for k in range(kernel.num_steps):
                step: Any = kernel.step(carry, k, fixed=chain.fixed)
                proposal = twist(step, carry, k)
                tokens = proposal.sample()
                increment = step.log_prob(tokens)
                log_p = log_p + increment
                log_weight = log_weight + increment - proposal.log_prob(tokens)
                carry = kernel.advance(carry, tokens, k, step=step)
                states.append(tokens)
        return torch.stack(states, -2), log_p, log_weight


class TwistedSteeredChain(SteeredChain):
    """A steered chain site whose particles move by the twist.

    :param chain: the chain.
    :param steering: how it is steered.
    :param clamp: tokens to hold, or None.
    :param twist: how particles move.
    """

    def __init__(
        self,
        chain: ReverseChain,
        steering: Steering,
        clamp: ClampProposal | None,
        twist: Proposal,
    ) -> None:
        self.twist = twist
        super().__init__(chain, steering, clamp)

    def with_clamp(self, clamp: ClampProposal) -> TwistedSteeredChain:
        """Return the same site with (further) tokens held.

        :param clamp: the clamp.
        """
        merged = super().with_clamp(clamp).clamp
        return TwistedSteeredChain(self.chain, self.steering, merged, self.twist)

    def _with_chain(self, chain: ReverseChain) -> Self:
        return type(self)(chain, self.steering, self.clamp, self.twist)

    def _run(self, runs: int) -> SMCTrace:
        how, chain = self.steering, self.chain
        alone = ReverseChain(chain.kernel, chain.length, prompt=chain.prompt, given=chain.given)
        proposal = joined(self.twist, self.clamp)
        fk = FeynmanKac(alone, how.potential, twist=how.twist, proposal=proposal)
        with torch.no_grad():
            return smc_loop(
                fk.bind(track_log_prob=True),
                fk.num_steps,
                how.num_particles,
                runs,
                as_resampler(how.resampler),
                how.ess_threshold,
                None,
                record="tokens",
            )


class TwistMessenger(SiteMessenger):
    """The handler behind :func:`twist`.

    :param proposal: how to move.
    :param sites: names of the chain sites, or None for all.
    """

    handler = "twist"

    def __init__(self, proposal: Proposal, sites: Collection[str] | None) -> None:
        super().__init__(sites)
        self.proposal = proposal

    def _exchanged(self, msg: Any) -> TorchDistribution | None:
        fn, twist = msg["fn"], self.proposal
        if isinstance(fn, TwistedChain | TwistedSteeredChain):
            raise CapabilityError(
                f"twist: the site {msg['name']!r} is twisted already, and a particle moves one "
                "way only; join both into one proposal."
            )
        if isinstance(fn, ReverseChain):
            return TwistedChain(fn, twist)
        if isinstance(fn, ClampedChain):
            return TwistedChain(fn.chain, twist, fn.clamp)
        if isinstance(fn, SteeredChain):
            return TwistedSteeredChain(fn.chain, fn.steering, fn.clamp, twist)
        return None


def twist(
    fn: Callable[..., Any] | None = None,
    *,
    logits: LogitsFn | None = None,
    proposal: Proposal | None = None,
    sites: Collection[str] | None = None,
) -> Any:
    """Propose each reverse-chain site by twisted steps.

    The joint density of the program is unchanged: a site is drawn step by step from
    ``q ∝ p exp(psi)`` and carries the weight ``prod p / q``. Any finite ``psi`` is valid and a bad
    one only adds variance. With a :func:`~ppl_diffusion.handlers.steer` around it or inside of it
    the particles of every run move by the twist. So do those of
    :class:`ppl_diffusion.inference.SMC`, and of the programs with a ``proposal`` where the program
    has no other chain and no other latent; programs that move their own way refuse a twist.

    :param fn: a program to wrap; without it, use ``twist`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param logits: ``(carry, log_probs, k) -> psi (*batch, L, V)``, see :class:`LogitsProposal`.
    :param proposal: or a proposal, such as :class:`GradientProposal`.
    :param sites: names of the chain sites (all by default).
    :raises TypeError: if not exactly one of ``logits`` and ``proposal`` is given.
    :raises CapabilityError: if the steps of a chain have no density or show no prediction, or a
        site is twisted already.
    :raises ValueError: if no chain site is met.

    Example::

        guided = twist(assay, proposal=GradientProposal(soft_strength))
        posterior = pyro.infer.Importance(guided, num_samples=100).run(y)
    """
    if (logits is None) == (proposal is None):
        raise TypeError("twist: give exactly one of logits and proposal.")
    moves = LogitsProposal(logits) if logits is not None else proposal
    assert moves is not None
    messenger = TwistMessenger(moves, sites)
    return messenger if fn is None else messenger(fn)
