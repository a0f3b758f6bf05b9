"""What anchored guidance says about a state: a tilted table, anchors, and what to make of them.

A :class:`Guidance` runs the inner loop of anchored posterior sampling (a *quantised expectation*)
from the denoiser's table ``d``, and turns its answer ``(r, h)`` into a law of tokens that can be
paid for, as it never falls below a share of the model's own::

    c_i = (1 - eps) [ (1 - lam) r_i^(1/t) / norm + lam 1{v = h_i} ] + eps d_i

Rows that are equal are asked about once: after resampling, and early on, most are.
:class:`AnchoredProposal` is the whole as a proposal for steps of masked chains, for
:func:`ppl_diffusion.handlers.twist` and for guides of plain Pyro.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference.anchored_remasking import Score, confidence
from ppl_diffusion.inference.anchored_steps import IndependentStep, PolicyStep
from ppl_diffusion.inference.quantised_expectation import QuantisedExpectation
from ppl_diffusion.kernels import RevealStep
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.programs.sources import bits
from ppl_diffusion.rows import distinct_rows

MOST_SHIFT = 1.0
"""Nats by which confidence may move the odds that a site stays masked."""


class Guided(NamedTuple):
    """What guidance says about some states.

    :param log_d: the table of the denoiser, ``(*batch, L, V)``.
    :param log_c: the law that tokens are drawn from, float64, same shape.
    :param scores: how sure it is of each site, ``(*batch, L)``.
    :param logits: where the inner loop ended, ``(*batch, L, V)``.
    """

    log_d: Tensor
    log_c: Tensor
    scores: Tensor
    logits: Tensor


@dataclass(frozen=True)
class TiltedTokens:
    """The law of a token: the tilted table, more of it on the anchor, over a floor.

    :param lam: share of the anchor.
    :param eps: share of the denoiser's own table, positive: it bounds what a weight can lose.
    :param temperature: ``t`` of the tilted table; above one is flatter.
    :raises ValueError: if a share is none, or the temperature not positive.
    """

    lam: float = 0.3
    eps: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.lam <= 1 and 0 < self.eps <= 1):
            raise ValueError(
                f"TiltedTokens: lam lies in [0, 1] and eps in (0, 1], got {self.lam} and "
                f"{self.eps}; without a floor no weight makes up for what is never drawn."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"TiltedTokens: the temperature is positive and finite, got {self.temperature}."
            )

    def __call__(self, log_d: Tensor, log_r: Tensor, anchors: Tensor) -> Tensor:
        """Return ``log c``, float64 ``(*batch, L, V)``: zero wherever ``d`` is.

        :param log_d: the denoiser's table, ``(*batch, L, V)``.
        :param log_r: the tilted table, same shape.
        :param anchors: int64 ``(*batch, L)``.
        """
        d = log_d.to(torch.float64).exp()
        r = torch.softmax(log_r.to(torch.float64) / self.temperature, -1)
        at = torch.nn.functional.one_hot(anchors, d.shape[-1]).to(torch.float64)
        c = (1 - self.eps) * ((1 - self.lam) * r + self.lam * at) + self.eps * d
        c = torch.where(d > 0, c, 0.0)  # what the model excludes, clamped sites too, is dead anyway
        return torch.where(c > 0, c / c.sum(-1, keepdim=True), 0.0).log()


@dataclass(frozen=True)
class Guidance:
    """The inner loop at the states of particles, and the laws that are made of its answer.

    :param guide: the potential whose gradient is followed; it need not be that of the target.
    :param expectation: the inner loop.
    :param tokens: the law of tokens.
    :param score: how sure it is of a site: of its likeliest token (``"max"``), of the anchor, or by
        the entropy of the tilted table.
    :raises ValueError: if there is no such score.
    """

    guide: EmbeddedPotential
    expectation: QuantisedExpectation = field(default_factory=QuantisedExpectation)
    tokens: TiltedTokens = field(default_factory=TiltedTokens)
    score: Score = "max"

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            known = ", ".join(get_args(Score))
            raise ValueError(f"Guidance: unknown score {self.score!r}; choose one of {known}.")

    @property
    def deterministic(self) -> bool:
        """Whether equal states get equal answers."""
        return self.expectation.quantiser != "gumbel" and self.expectation.warm_start == 1

    def __call__(
        self,
        tokens: Tensor,
        log_d: Tensor,
        given: Mapping[str, Tensor] | None = None,
        *,
        previous: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Guided:
        """Return what it says about states.

        :param tokens: int64 ``(*batch, L)``, the mask has id ``V``.
        :param log_d: the denoiser's table at each of them, ``(*batch, L, V)``.
        :param given: what else that table depends on, each ``(*batch, *event)``.
        :param previous: logits of the states that these came from, for a warm start.
        """
        batch, (length, size) = tokens.shape[:-1], log_d.shape[-2:]
        rows, table = tokens.reshape(-1, length), log_d.reshape(-1, length, size)
        before = None if previous is None else previous.reshape(-1, length, size)
        if self.deterministic:
            first, inverse = distinct_states(tokens, given)
        else:
            first = inverse = torch.arange(len(rows), device=rows.device)
        with torch.enable_grad():  # samplers run without gradients, and this one needs some
            found = self.expectation(
                self.guide,
                rows[first],
                table[first].detach(),
                generator=generator,
                previous=None if before is None else before[first],
            )
        log_r, anchors = found.log_r.detach(), found.anchors
        log_c = self.tokens(table[first], log_r, anchors)
        scores = confidence(log_r, anchors, self.score)
        log_c, scores, logits = (x[inverse] for x in (log_c, scores, found.logits.detach()))
        shape = (*batch, length, size)
        return Guided(
            log_d, log_c.reshape(shape), scores.reshape(tokens.shape), logits.reshape(shape)
        )


@dataclass(frozen=True)
class AnchoredProposal:
    """Move by anchored guidance: a :class:`~ppl_diffusion.smc.Proposal` with a density.

    Chains on a time grid open each site by itself, the surer ones rather; chains that reveal a
    number of sites choose them by a Plackett-Luce policy. The model is left alone, so that both are
    weighed against its own uniformly random order.

    :param guidance: what it follows.
    :param tau: temperature of the selection; infinity leaves it to the model's odds.

    Example::

        guided = twist(program, proposal=AnchoredProposal(Guidance(measurement)))
        posterior = pyro.infer.Importance(guided, num_samples=100).run()
    """

    guidance: Guidance
    tau: float = 1.0

    def __call__(self, step: Any, carry: Carry, k: int, /) -> IndependentStep | PolicyStep:
        """Return the guided step.

        :raises CapabilityError: if the step is not that of a masked chain.
        """
        require_maskable(step)
        guided = self.guidance(step.tokens, step.log_probs, carry.get(GIVEN))
        return guided_step(step, guided, self.tau)


def guided_step(step: Any, guided: Guided, tau: float) -> IndependentStep | PolicyStep:
    """Return a step of a masked chain with selection and tokens as guidance has them."""
    if isinstance(step, RevealStep):
        scores = guided.scores / tau
        return PolicyStep(
            step.tokens, guided.log_c, step.eligible, scores, step.count, validate_args=False
        )
    return IndependentStep(
        step.tokens,
        guided.log_c,
        stay_probability(step, guided.scores, tau),
        fixed=step.fixed,
        validate_args=False,
    )


def stay_probability(step: TokenStep, scores: Tensor, tau: float) -> Tensor:
    """Return how probably each masked site stays masked, in (0, 1), or 0 or 1 as in the model.

    The odds of the model, ``s / (1 - s)``, are moved by how much surer or less sure a site is than
    the masked sites are on average.

    :param scores: how sure guidance is of each site, ``(*batch, L)``.
    :param tau: temperature; infinity leaves the odds alone.
    """
    stay = (1 - step.alpha_s) / (1 - step.alpha_t) if step.alpha_t < 1 else 1.0
    level = torch.full_like(scores, stay)
    if stay in (0.0, 1.0):
        return level
    masked = step.tokens == step.num_states - 1
    total = torch.where(masked, scores, 0.0).sum(-1, keepdim=True)
    mean = total / masked.sum(-1, keepdim=True).clamp_min(1)
    shift = ((scores - mean) / tau).clamp(-MOST_SHIFT, MOST_SHIFT)
    return torch.sigmoid(level.logit() - shift)


def distinct_states(
    tokens: Tensor, given: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return one of each kind of states, and the kind of each: see :func:`distinct_rows`.

    :param tokens: int64 ``(*batch, L)``.
    :param given: what else tells them apart, each ``(*batch, *event)``.
    """
    size = tokens.shape[:-1].numel()
    beside = [bits(x.reshape(size, *x.shape[tokens.ndim - 1 :])) for x in (given or {}).values()]
    return distinct_rows(torch.cat([tokens.reshape(size, -1), *beside], -1))


def require_maskable(step: Any) -> None:
    """Refuse steps that do not reveal masked sites once and for all.

    :raises CapabilityError: if the step is no such step.
    """
    if isinstance(step, RevealStep) and step.order is None:
        return
    if isinstance(step, TokenStep) and step.process.absorbing and not step.corrects:
        return
    raise CapabilityError(
        f"anchored guidance: it reveals masked sites, at kappa=1, in an order that it may choose, "
        f"which a {type(step).__name__} of this chain does not; take an absorbing process with "
        "InterpolatingKernel or OrderedKernel."
    )
