"""Relaxed posterior sampling: tilt the prediction by the slope of the loss at its mean embedding.

The loss ``l = -log G`` is read where the network believes the sequence to be, at the mean
embedding ``e_i = sum_v d_i(v) c_v`` of the codes ``c_v``, and every token of every site is priced
by the slope there (diffusion posterior sampling, Chung et al. 2022, arXiv:2209.14687, carried over
to tokens)::

    c_i(v) ~ d_i(v) exp(zeta s_iv),     s_iv = -<dl/de_i, c_v>

*Cheap*, as above, no gradient passes through the network; ``zeta = 1`` is the linearised rule of
Bayes, and one step of exponentiated gradient descent on the table from ``d``. *Full*, ``s`` is the
derivative in the one-hot states themselves, the network included. With a measurement of Gaussian
noise, ``A`` linear, the term that the slope leaves out is known::

    s_iv = -<dl/de_i, c_v> - ||A_i (c_v - e_i)||^2 / (2 sigma^2)

which is the first sweep of mean-field coordinate ascent, all sites at once. As published particles
count alike, and the outcome has no declared law; as a proposal the tilt is paid for and costs
variance only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import tiltable, tilted
from ppl_diffusion.inference.embedded_guide import (
    GuidedSteps,
    codes_of,
    mean_embedding,
    score_at,
)
from ppl_diffusion.inference.guides import guide_of
from ppl_diffusion.inference.mean_field import jacobian_of
from ppl_diffusion.kernels import BlockStep
from ppl_diffusion.kernels.base import GIVEN, Carry, Kernel
from ppl_diffusion.kernels.blocks import TOKENS
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.programs.bound import Mover
from ppl_diffusion.programs.method import register
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Source
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac, Proposal

Form = Literal["cheap", "full"]


@register
@dataclass(frozen=True)
class RelaxedDPS(GuidedSteps):
    """Tilt predictions by the slope of the loss at the mean embedding.

    :param twist: how weighted particles look ahead; without weights nothing is looked at.
    :param guide: what the tilt follows; None takes the potential of a bare chain.
    :param weighted: pay for the tilt, and resample: exact. False is the sampler as such: equal
        weights and no evidence.
    :param zeta: strength of the tilt; 1 is the linearised rule of Bayes, 0 the chain itself.
    :param rescale: divide it by ``||y - A(e)|| / sigma``, as diffusion posterior sampling does: the
        slope of the norm, not of its square (measurements only).
    :param second_order: add the term that makes the tilt a mean-field sweep (linear measurements).
    :param form: ``"cheap"`` takes the slope at the mean embedding, ``"full"`` in the one-hot
        states, through the network.
    :raises ValueError: if ``zeta`` is not finite, or a combination makes no sense.

    Example::

        method = RelaxedDPS(second_order=True, weighted=True)
        likelihood = measurement.potential(codec)
        posterior = SMC(chain, likelihood, method=method, num_particles=32).run(seed=0)
    """

    zeta: float = 1.0
    rescale: bool = False
    second_order: bool = False
    form: Form = "cheap"

    name: ClassVar[str] = "relaxed-dps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(self.zeta) < float("inf"):
            raise ValueError(f"RelaxedDPS: zeta must be finite, got {self.zeta}.")
        if self.form not in ("cheap", "full"):
            raise ValueError(f"RelaxedDPS: form is {self.form!r}; choose 'cheap' or 'full'.")
        if self.form == "full" and self.second_order:
            raise ValueError(
                "RelaxedDPS: the second-order term belongs to the mean embedding; use form='cheap'."
            )

    @property
    def on_events(self) -> bool:
        """Whether particles may go from reveal to reveal: the network is asked again otherwise."""
        return self.form == "cheap"

    def require(self, source: Source) -> None:
        """Refuse guides and networks that lack what the options need."""
        super().require(source)
        guide = guide_of("RelaxedDPS", self.guide, source)
        if self.rescale and not isinstance(guide, GaussianMeasurement):
            raise CapabilityError(
                f"RelaxedDPS: rescale=True divides by a residual, and {guide.name} is no "
                "GaussianMeasurement; choose zeta instead."
            )
        if self.second_order and not (isinstance(guide, GaussianMeasurement) and guide.linear):
            raise CapabilityError(
                f"RelaxedDPS: second_order=True needs a linear GaussianMeasurement, which "
                f"{guide.name} is not; leave it out."
            )
        if self.form == "full":
            require_soft(source.chains[0].chain.kernel)

    def steering(self, guide: EmbeddedPotential, site: ChainSite) -> Proposal:
        """Return the tilted steps."""
        if self.form == "full":
            return ThroughNetwork(guide, site.chain.kernel, self.zeta, rescale=self.rescale)
        return AtMean(guide, self.zeta, rescale=self.rescale, second_order=self.second_order)

    def mover(self, site: ChainSite, source: Source, max_rows: int | None) -> Mover:
        """Return the mover by the tilted steps, which counts the rows that slopes cost."""
        mover = super().mover(site, source, max_rows)
        if self.form == "full":
            assert isinstance(mover, BoundFeynmanKac)
            steering: Any = mover.model.proposal
            getattr(steering, "proposal", steering).counted = mover.denoiser
        return mover


class AtMean:
    """Tilt the prediction by the slope at the mean embedding.

    :param guide: what the tilt follows.
    :param zeta: strength of the tilt.
    :param rescale: divide it by the residual in units of the noise.
    :param second_order: add the second-order term.
    """

    any_clock: Literal[True] = True

    def __init__(
        self,
        guide: EmbeddedPotential,
        zeta: float = 1.0,
        *,
        rescale: bool = False,
        second_order: bool = False,
    ) -> None:
        self.guide, self.zeta, self.rescale = guide, zeta, rescale
        self.second_order = second_order
        self._gram: Tensor | None = None

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`)."""
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        step = tiltable(step)
        return tilted(step, self.tilt(mean_embedding(self.guide, step)))

    def tilt(self, mean: Tensor) -> Tensor:
        """Return ``zeta s``, float64 ``(*batch, L, K)``.

        :param mean: the mean embedding, ``(*batch, L, b)``.
        """
        codes = codes_of(self.guide, mean)
        score = (score_at(self.guide, mean) @ codes.mT).to(torch.float64)
        if self.second_order:
            score = score - self._curvature(mean, codes)
        return score * strength(self.guide, mean, self.zeta, self.rescale)

    def _curvature(self, mean: Tensor, codes: Tensor) -> Tensor:
        """Return ``||A_i (c_v - e_i)||^2 / (2 sigma^2)`` up to a constant of each site."""
        gram = self._gram_of(mean)  # (L, b, b)
        own = torch.einsum("va,lab,vb->lv", codes, gram, codes)
        cross = torch.einsum("va,lab,...lb->...lv", codes, gram, mean)
        return (own / 2 - cross).to(torch.float64)

    def _gram_of(self, mean: Tensor) -> Tensor:
        """Return ``A_i^T A_i / sigma^2``, ``(L, b, b)``: of a linear operator, so computed once."""
        if self._gram is None:
            guide = self.guide
            assert isinstance(guide, GaussianMeasurement)
            rows, _ = jacobian_of(guide, torch.zeros_like(mean.reshape(-1, *mean.shape[-2:])[:1]))
            self._gram = torch.einsum("mla,mlb->lab", rows[0], rows[0]) / guide.sigma**2
        return self._gram


class ThroughNetwork:
    """Tilt the prediction by the slope in the one-hot states, through the network.

    A masked site is where the prediction puts it, a known one at its code, and both may turn
    towards any token::

        e_i(z) = sum_v z_iv c_v + z_i,mask sum_v d_i(v | z) c_v

    :param guide: what the tilt follows.
    :param kernel: the kernel whose network is differentiated.
    :param zeta: strength of the tilt.
    :param rescale: divide it by the residual in units of the noise.

    :ivar counted: the counter of network rows that its own rows are added to, or None.
    """

    def __init__(
        self, guide: EmbeddedPotential, kernel: Kernel, zeta: float = 1.0, *, rescale: bool = False
    ) -> None:
        require_soft(kernel)
        self.guide, self.kernel, self.zeta, self.rescale = guide, kernel, zeta, rescale
        self.counted: Any = None

    def __call__(self, step: TorchDistribution, carry: Carry, k: int, /) -> TorchDistribution:
        """Return the tilted step (a :class:`~ppl_diffusion.smc.Proposal`)."""
        if isinstance(step, BlockStep):
            return step.with_block(TOKENS, self(step.blocks[TOKENS], carry, k))
        step = tiltable(step)
        score = self._score(carry, k)
        mean = mean_embedding(self.guide, step)
        return tilted(step, score * strength(self.guide, mean, self.zeta, self.rescale))

    def _score(self, carry: Carry, k: int) -> Tensor:
        """Return ``d log G / d z`` in the clean states, float64 ``(*batch, L, K)``."""
        tokens, size = carry["tokens"], self.kernel.process.vocab_size
        codes = codes_of(self.guide, tokens)
        denoiser: Any = self.kernel.denoiser
        time, given = self.kernel.prediction_time(carry, k), carry.get(GIVEN, {})
        if self.counted is not None:
            self.counted.rows_evaluated += tokens[..., 0].numel()
        with torch.inference_mode(False), torch.enable_grad():
            states = F.one_hot(tokens, size + 1).to(codes.dtype).requires_grad_()
            log_d = denoiser.head(denoiser.hidden_mixture(None, states, time, **given))
            mean = log_d.exp().to(codes.dtype) @ codes
            embedded = states[..., :size] @ codes + states[..., size:] * mean
            (score,) = torch.autograd.grad(self.guide.embedded(embedded).sum(), states)
        return score[..., :size].to(torch.float64)


def strength(guide: EmbeddedPotential, mean: Tensor, zeta: float, rescale: bool) -> float | Tensor:
    """Return the strength of a tilt, a number or one per state, ``(*batch, 1, 1)``."""
    if not rescale:
        return zeta
    assert isinstance(guide, GaussianMeasurement)
    size = torch.linalg.vector_norm(guide.residual(mean), dim=-1) / guide.sigma
    return (zeta / size.to(torch.float64).clamp_min(1e-12))[..., None, None]


def require_soft(kernel: Kernel) -> None:
    """Refuse networks that read no mixtures of states.

    :raises CapabilityError: if the kernel has none, or its process is not absorbing.
    """
    soft = all(hasattr(kernel.denoiser, name) for name in ("hidden_mixture", "head"))
    if not (soft and kernel.process.absorbing):
        raise CapabilityError(
            f"RelaxedDPS: form='full' differentiates a masked prior through its network, and "
            f"{type(kernel.denoiser).__name__} of {kernel.process!r} reads no mixtures of states; "
            "use form='cheap'."
        )
