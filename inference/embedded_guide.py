"""What methods share that follow gradients between tokens.

The guide is an :class:`~ppl_diffusion.potentials.EmbeddedPotential`: the potential itself of a bare
chain, or one given beside a program, whose own density stays the target.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.handlers import ClampProposal, Step, mean_prediction
from ppl_diffusion.inference.biased import equal_weights, unpaid
from ppl_diffusion.inference.bootstrap import LookingAhead
from ppl_diffusion.inference.guides import guide_of
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.programs.ahead import Ahead
from ppl_diffusion.programs.bound import Bound, Mover, chain_mover
from ppl_diffusion.programs.method import Needs, can_hold
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.rows import distinct_rows
from ppl_diffusion.smc.feynman_kac import Proposal
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.posterior import ParticlePosterior
from ppl_diffusion.smc.resampling import Resampler


def codes_of(guide: EmbeddedPotential, like: Tensor) -> Tensor:
    """Return the codebook where the particles are, ``(K, b)``.

    :param like: a tensor of theirs.
    """
    return guide.codebook.to(like.device)


# Gradients at the mean of what the network predicts.


def score_at(guide: EmbeddedPotential, embedded: Tensor) -> Tensor:
    """Return ``d log G / d e`` at points of the embedding space, each distinct one asked once.

    :param guide: the guide.
    :param embedded: ``(*batch, L, b)``.
    :returns: shaped like ``embedded``.
    :raises PotentialError: if the guide has no finite gradient there.
    """
    rows, inverse = distinct_points(embedded)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = rows.clone().requires_grad_()
        value = guide.embedded(leaf)
        if not value.requires_grad:
            raise PotentialError(
                f"{guide.name}: log G has no gradient in the embeddings; make it differentiable, "
                "or use a method that asks for values alone, such as 'soft-value'."
            )
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    if not bool(torch.isfinite(gradient).all()):
        raise PotentialError(
            f"{guide.name}: the gradient of log G is not finite between the codes; let log G be "
            "smooth there."
        )
    return gradient[inverse].reshape(embedded.shape)


def distinct_points(embedded: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ones of points ``(*batch, L, b)``, and where each of them is there.

    Equal states have equal predictions, and after resampling most states are equal.
    """
    rows = embedded.detach().reshape(-1, *embedded.shape[-2:])
    bits = rows.flatten(1).to(torch.float64).contiguous().view(torch.int64)
    first, inverse = distinct_rows(bits)
    return rows[first], inverse


def mean_embedding(guide: EmbeddedPotential, step: Step) -> Tensor:
    """Return the mean embedding of the clean tokens that a step predicts, ``(*batch, L, b)``.

    :param guide: whose codebook is meant; tokens that are known are at their codes.
    :param step: the model's step.
    """
    codes = codes_of(guide, step.tokens)
    return mean_prediction(step).exp().to(codes.dtype) @ codes


class HeldFirst:
    """Move by a proposal that sees clamped tokens as predicted with certainty.

    :param clamp: the clamped tokens.
    :param proposal: how to move.
    """

    def __init__(self, clamp: ClampProposal, proposal: Proposal) -> None:
        self.clamp, self.proposal = clamp, proposal
        self.any_clock = getattr(proposal, "any_clock", False)

    def __call__(self, step: Any, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the move (a :class:`~ppl_diffusion.smc.Proposal`)."""
        held: Any = self.clamp(step, carry, k)
        return self.proposal(held, carry, k)


@dataclass(frozen=True)
class GuidedSteps(LookingAhead):
    """Particles that move by tilted steps, which as published nothing pays for.

    :param guide: what the tilt follows; None takes the potential of a bare chain.
    :param weighted: pay for the tilt, and resample: exact. False is the published sampler: equal
        weights and no evidence.
    """

    # Nothing to choose: the tilt is the proposal.
    proposal: None = field(default=None, init=False)
    guide: EmbeddedPotential | None = None
    weighted: bool = False

    exact: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(density=True, own_moves=True, guide=True)

    @abstractmethod
    def steering(self, guide: EmbeddedPotential, site: ChainSite) -> Proposal:
        """Return how a particle moves instead of by the model's own step.

        :param guide: what the tilt follows.
        :param site: the site that moves.
        """

    def require(self, source: Source) -> None:
        """Refuse sources without a guide."""
        guide_of(type(self).__name__, self.guide, source)
        super().require(source)

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the mover of the site by the tilted steps, with clamped tokens held."""
        guide = guide_of(type(self).__name__, self.guide, source)
        proposal = self.steering(guide, site)
        if can_hold(site):
            assert site.clamp is not None
            proposal = HeldFirst(site.clamp, proposal)
        events = self.on_events and source.is_free(site)
        return chain_mover(site, self.twist, proposal, max_rows=max_rows, on_events=events)

    def resampling(self, resampler: Resampler, ess_threshold: float) -> tuple[Resampler, float]:
        """Particles that nothing weighs are never resampled."""
        return resampler, ess_threshold if self.weighted else 0.0

    def move(self, run: Bound, state: State, group: int, generator: Rng) -> Moved:
        """Move by the tilted steps; without weights for nothing."""
        moved, log_ratio = super().move(run, state, group, generator)
        return moved, log_ratio if self.weighted else 0.0

    def look(self, run: Bound, state: State, group: int, generator: Rng) -> Tensor | None:
        """Return the look-ahead, where it counts."""
        counts = self.weighted and self.twist is not None
        return self.rate(run, state, generator) if counts else None

    def ahead(self, run: Bound, state: State, group: int) -> Ahead | None:
        """Return the look-ahead by completions, where it counts."""
        return super().ahead(run, state, group) if self.weighted else None

    def pay(self, run: Bound, state: State) -> Tensor:
        """Return the potential itself; without weights only what is forbidden."""
        return super().pay(run, state) if self.weighted else unpaid(run, state)

    def law(self, run: Bound) -> Law:
        """Return the tilted chain; without weights there is no law."""
        law = run.source.law
        if self.weighted:
            return law
        why = (
            f"no declared law: {run.num_steps} steps were tilted along the gradient of "
            f"{guide_of(type(self).__name__, self.guide, run.source).name} and nothing paid for "
            "it; equal weights"
        )
        return law.but(exact=False, why=why, has_evidence=False)

    def finish(self, posterior: ParticlePosterior) -> ParticlePosterior:
        """Without weights all particles count alike."""
        return posterior if self.weighted else equal_weights(posterior, posterior.law.why)
