"""Classifier-based guidance of tokens by a potential of their embeddings.

Each site of a reverse step is tilted by how likely its next state makes the data, all others held
where they are (D-CBG, Schiff et al. 2024, arXiv:2412.10193), normalised over all states, the mask
included::

    q_i(v | z) ~ p(z'_i = v | z) P(y | z with site i := v)^g

There is no classifier of noisy images here: ``P(y | z)`` is the potential of the mean embedding,
``e_i = c_{z_i}`` where a token is known and ``sum_v d_i(v) c_v`` where the network predicts it, and
a neighbour puts ``c_v`` in place of ``e_i`` (:class:`PluginLikelihood`). *Exact*, every neighbour
is asked about; to *first order* one gradient prices all of them through the codebook,
``<d log G / d e_i, c_v - e_i>``, which is exact where ``log G`` is affine in the embeddings.

A step that moves several sites counts the evidence once for each of them. As published nothing
makes up for that; with weights the kernel is a proposal like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import tiltable, tilted
from ppl_diffusion.inference.embedded_guide import (
    GuidedSteps,
    codes_of,
    distinct_points,
    mean_embedding,
    score_at,
)
from ppl_diffusion.kernels import BlockStep
from ppl_diffusion.kernels.base import Carry
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.kernels.reveal_step import RevealStep
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.potentials.embedded import EmbeddedPotential
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import log_posterior_mean
from ppl_diffusion.programs.method import register
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import require_finite
from ppl_diffusion.smc.feynman_kac import Proposal

MAX_POINTS = 4096
"""Neighbours that are asked about at once."""

Mode = Literal["exact", "first-order"]


@register
@dataclass(frozen=True)
class ClassifierGuidance(GuidedSteps):
    """Tilt every site by how likely its next state makes the data.

    :param twist: how weighted particles look ahead; without weights nothing is looked at.
    :param guide: what the tilt follows; None takes the potential of a bare chain.
    :param weighted: pay for the tilt, and resample: exact. False is the published sampler: equal
        weights and no evidence.
    :param gamma: power of the likelihood; 1 is Bayes' rule for one site, 0 the chain itself.
    :param mode: ``"first-order"`` prices neighbours by one gradient, ``"exact"`` asks about each of
        them, up to ``L K`` points per state.
    :raises ValueError: if ``gamma`` is negative or not finite, or the mode is unknown.

    Example::

        likelihood = measurement.potential(codec)
        posterior = SMC(chain, likelihood, method="d-cbg", num_particles=16).run(seed=0)
    """

    gamma: float = 1.0
    mode: Mode = "first-order"

    name: ClassVar[str] = "d-cbg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(
                f"ClassifierGuidance: gamma must be finite and >= 0, got {self.gamma}."
            )
        if self.mode not in ("exact", "first-order"):
            raise ValueError(
                f"ClassifierGuidance: mode is {self.mode!r}; choose 'first-order' or 'exact'."
            )

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal: no, the mask competes at every step."""
        return False

    def steering(self, guide: EmbeddedPotential, site: ChainSite) -> Proposal:
        """Return the tilted steps."""
        return NeighbourTilt(guide, self.gamma, self.mode)


class NeighbourTilt:
    """Tilt a step by what each next state of each site makes of the data.

    Steps that reveal a given number of positions tilt the tokens; which positions stays theirs.

    :param guide: the log-likelihood of embeddings.
    :param gamma: its power.
    :param mode: how neighbours are priced.
    """

    def __init__(self, guide: EmbeddedPotential, gamma: float = 1.0, mode: Mode = "first-order"):
        self.guide, self.gamma, self.mode = guide, gamma, mode

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`).

        :raises CapabilityError: if the step shows no prediction.
        """
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        step = tiltable(step)
        mean = mean_embedding(self.guide, step)
        values = self.gamma * self.neighbours(mean)
        if isinstance(step, RevealStep):
            return tilted(step, values[..., :-1])
        if not hasattr(step, "dense_log_probs"):
            raise CapabilityError(
                f"ClassifierGuidance: a {type(step).__name__} is no product over sites; use a "
                "chain on a time grid."
            )
        table = step.dense_log_probs()
        size = self.guide.codebook.shape[0]
        tilt = values if table.shape[-1] == size + 1 else values[..., :size]
        return StateStep(table + tilt, tokens=step.tokens, fixed=step.fixed, validate_args=False)

    def neighbours(self, mean: Tensor) -> Tensor:
        """Return what each next state changes in ``log P(y | z)``, float64 ``(*batch, L, K + 1)``.

        The last entry is 0: a site that stays unknown changes nothing.

        :param mean: mean embedding of the state, ``(*batch, L, b)``.
        """
        change = self._slopes(mean) if self.mode == "first-order" else self._differences(mean)
        return F.pad(change, (0, 1))

    def _slopes(self, mean: Tensor) -> Tensor:
        score = score_at(self.guide, mean)
        codes = codes_of(self.guide, mean)
        here = (score * mean).sum(-1, keepdim=True)
        return (score @ codes.mT - here).to(torch.float64)

    def _differences(self, mean: Tensor) -> Tensor:
        rows, inverse = distinct_points(mean)
        codes = codes_of(self.guide, mean)
        place = torch.arange(rows[:, :, 0].numel() * len(codes), device=mean.device)
        values = torch.cat([self._value(rows, codes, part) for part in place.split(MAX_POINTS)])
        here = require_finite(self.guide.embedded(rows).to(torch.float64), self.guide.name)
        change = values.reshape(len(rows), -1, len(codes)) - here[:, None, None]
        return change[inverse].reshape(*mean.shape[:-1], len(codes))

    def _value(self, rows: Tensor, codes: Tensor, part: Tensor) -> Tensor:
        """Return ``log G`` of some of all neighbours, counted row by row and site by site."""
        which, token = part // len(codes), part % len(codes)
        points = rows[which // rows.shape[1]].clone()
        every = torch.arange(len(part), device=part.device)
        points[every, which % rows.shape[1]] = codes[token]
        return require_finite(self.guide.embedded(points).to(torch.float64), self.guide.name)


class PluginLikelihood:
    """``log P(y | z)`` of a noised state: the potential of its mean embedding.

    What :class:`~ppl_diffusion.kernels.ClassifierKernel` asks for; a chain of that kernel is a
    guided chain of its own, for which states are ids or, to first order, one-hot rows, whose
    gradient goes through the codebook and not through the network.

    :param guide: the log-likelihood of embeddings.
    :param process: the process of the chain.
    :param denoiser: what predicts the unknown tokens.
    """

    def __init__(self, guide: EmbeddedPotential, process: Process, denoiser: Denoiser) -> None:
        self.guide, self.process, self.denoiser = guide, process, denoiser

    def __call__(self, states: Tensor, t: float) -> Tensor:
        """Return ``log P(y | states)``, ``(rows,)``.

        :param states: ids ``(rows, L)``, or one-hot rows ``(rows, L, S)``.
        :param t: time of the states.
        """
        soft = states.is_floating_point()
        tokens = states.detach().argmax(-1) if soft else states
        codes = codes_of(self.guide, tokens)
        with torch.no_grad():
            mean = self._mean(tokens, t).to(codes.dtype) @ codes
        if not soft:
            return self.guide.embedded(mean)
        # The value is that of the mean, the slope that of a site which turns to another code.
        turn = (states - states.detach()).to(codes.dtype)
        turned = turn[..., : len(codes)] @ codes
        if states.shape[-1] > len(codes):
            turned = turned + turn[..., len(codes) :] * mean
        return self.guide.embedded(mean + turned)

    def _mean(self, tokens: Tensor, t: float) -> Tensor:
        log_c = clean_log_probs(self.denoiser(tokens, t), tokens.shape, self.process.vocab_size)
        if self.denoiser.kind == "posterior" and not self.process.absorbing:
            return log_c.exp()
        alpha = float(self.process.schedule.alpha(t))
        mean: Tensor = log_posterior_mean(self.process, tokens, log_c, alpha).exp()
        return mean
