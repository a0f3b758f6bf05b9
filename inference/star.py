"""G2D2: fit a factorised law of the clean tokens at every step, draw from it, and noise again.

At a state ``z`` the posterior of the clean tokens is approximated by a table ``r``, one categorical
for each site, whose logits ``Phi`` start where the network and the last step left them and follow
the gradient of (Murata et al. 2024, arXiv:2410.14710)::

    Phi <- f log d(.|z) + (1 - f) Phi
    L(Phi) = ||y - A(softmax((Phi + gumbel) / tau) C)|| + lambda_k sum_i KL(r_i || d_i)

with the norm *not* squared, under rectified Adam. Then ``x0 ~ r``, and either every site is noised
anew from ``x0`` alone (*star*: any token may still be revised), or along the bridge from ``z`` to
``x0`` (*Markov*). In the star form a masked prior keeps a fixed number of masks, uniformly placed
among the sites that are neither prompted nor clamped; tokens that are visible are certain there
until they are masked again.

With the true *joint* law of ``x0`` given ``z`` and the data the star chain returns the posterior in
any number of steps, as every ``z`` is a noised draw of it. All of the error is in the product of
sites and in its fit, and nothing pays for it: equal weights, no evidence, no declared law.

Published settings: 100 steps, ``lambda_k = 3e-4 * 10**linspace(1, -1)`` and learning rates ``lr *
10**linspace(w / 2, -w / 2)``. The configurations say *star*, the code overrides them with *Markov*
for all presets; star is the default here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.inference.biased import Unpaid
from ppl_diffusion.inference.embedded_guide import codes_of
from ppl_diffusion.inference.guides import guide_of
from ppl_diffusion.inference.quantisers import FLOOR
from ppl_diffusion.inference.renoising import (
    held_law,
    is_free,
    is_open,
    masked_again,
    masks_after,
    nucleus,
    require_levels,
)
from ppl_diffusion.kernels import OrderedKernel, RevealStep, TokenStep
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.potentials.embedded import EmbeddedPotential, GaussianMeasurement
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.bound import Bound
from ppl_diffusion.programs.method import Needs, register
from ppl_diffusion.programs.schedule import Item
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import Moved, Rng, Source, State
from ppl_diffusion.smc.feynman_kac import draw_step

LOGITS = "g2d2/logits"

PRESETS = {"super-resolution": (10.0, 2.0), "deblurring": (15.0, 1.0)}
"""Learning rates, and decades they fall by from the first step to the last."""

Transition = Literal["star", "markov"]
Preset = Literal["super-resolution", "deblurring"]


@register
@dataclass(frozen=True)
class G2D2(Unpaid):
    """Fit a table of the clean tokens at every step, draw from it, and noise again.

    :param guide: what the table is fitted to; None takes the potential of a bare chain. A
        :class:`~ppl_diffusion.potentials.GaussianMeasurement` is fitted by the norm of its
        residual, any other potential by ``-log G``.
    :param transition: ``"star"`` noises draws from scratch, ``"markov"`` along the bridge.
    :param num_iterations: gradient steps ``J`` at each step of the chain.
    :param preset: published learning rates: ``"super-resolution"`` (10, falling by two decades) or
        ``"deblurring"`` (15, by one).
    :param learning_rate: mean learning rate on the scale of decades, in place of the preset's.
    :param decades: decades that it falls by along the chain, in place of the preset's.
    :param kl_weight: ``lambda`` half way along the chain; it falls by two decades.
    :param forget: share ``f`` of the network in the first logits of a step; 1 starts anew.
    :param top_p: likeliest tokens that clean tokens are drawn from, by their mass; 1 for all.
    :param temperature: of the Gumbel-softmax relaxation.
    :raises ValueError: if a number or a name is not usable.

    Example::

        likelihood = measurement.potential(codec)
        posterior = SMC(chain, likelihood, method="g2d2", num_particles=16).run(seed=0)
    """

    guide: EmbeddedPotential | None = None
    transition: Transition = "star"
    num_iterations: int = 30
    preset: Preset = "super-resolution"
    learning_rate: float | None = None
    decades: float | None = None
    kl_weight: float = 3e-4
    forget: float = 0.3
    top_p: float = 0.95
    temperature: float = 1.0

    name: ClassVar[str] = "g2d2"
    needs: ClassVar[Needs] = Needs(own_moves=True, guide=True)

    def __post_init__(self) -> None:
        if self.transition not in ("star", "markov"):
            raise ValueError(f"G2D2: transition is {self.transition!r}; choose 'star' or 'markov'.")
        if self.preset not in PRESETS:
            raise ValueError(
                f"G2D2: unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}."
            )
        if self.num_iterations < 0:
            raise ValueError(f"G2D2: num_iterations must be >= 0, got {self.num_iterations}.")
        for what in ("forget", "top_p"):
            if not 0 < getattr(self, what) <= 1:
                raise ValueError(
                    f"G2D2: {what} must lie above 0 and not above 1, got {getattr(self, what)}."
                )
        for what in ("learning_rate", "kl_weight", "temperature"):
            value = getattr(self, what)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"G2D2: {what} must be finite and >= 0, got {value}.")
        if self.temperature == 0:
            raise ValueError("G2D2: temperature must be positive; small ones are nearly one-hot.")

    def require(self, source: Source) -> None:
        """Refuse sources without a guide, and chains without a level of noise for each step."""
        guide_of("G2D2", self.guide, source)
        super().require(source)
        require_levels(source.chains[0].chain.kernel)

    def rates(self, k: int, num_steps: int) -> tuple[float, float]:
        """Return the learning rate and ``lambda`` of a step.

        :param k: the step, 0 the noisiest.
        :param num_steps: steps of the chain.
        """
        rate, decades = PRESETS[self.preset]
        rate = rate if self.learning_rate is None else self.learning_rate
        decades = decades if self.decades is None else self.decades
        place = 0.5 - k / (num_steps - 1) if num_steps > 1 else 0.0  # from 1/2 down to -1/2
        return rate * 10 ** (decades * place), self.kl_weight * 10 ** (2 * place)

    def start(self, run: Bound, state: State, generator: Rng) -> State:
        """No table has been fitted yet."""
        return {**state, LOGITS: None}

    def step(self, run: Bound, state: State, item: Item, generator: Rng) -> Moved:
        """Fit a table, draw clean tokens from it, and noise them to the level after the step."""
        site, kernel = run.sites[item.site], run.movers[item.site].kernel
        guide = guide_of("G2D2", self.guide, run.source)
        carry = state["sites"][item.site]
        log_d = held_law(site, kernel.posterior_mean(carry, item.k))
        rates = self.rates(item.k, kernel.num_steps)
        logits = self._fitted(guide, log_d, state[LOGITS], rates, generator)
        x0 = self._drawn(logits, log_d, generator)
        tokens = self._noised(site, kernel, carry, x0, item.k, generator)
        moved = run.moved(state, item, kernel.advance(carry, tokens, item.k))
        return {**moved, LOGITS: logits}, 0.0

    # Fitting.

    def _fitted(
        self,
        guide: EmbeddedPotential,
        log_d: Tensor,
        previous: Tensor | None,
        rates: tuple[float, float],
        generator: Rng,
    ) -> Tensor:
        """Return the logits of the fitted table, normalised, ``(*batch, L, K)``."""
        codes = codes_of(guide, log_d)
        prior = log_d.clamp_min(FLOOR).to(codes.dtype).log_softmax(-1)
        first = prior
        if previous is not None:
            first = (self.forget * prior + (1 - self.forget) * previous).log_softmax(-1)
        rate, weight = rates
        with torch.inference_mode(False), torch.enable_grad():
            # Each particle has an image of its own: losses are summed, and the optimiser's state is
            # elementwise, so that a batch is what its rows are one by one.
            logits = first.detach().clone().requires_grad_()
            optimiser = torch.optim.RAdam([logits], lr=rate)
            for _ in range(self.num_iterations if bool(is_open(log_d).any()) else 0):
                loss = self._loss(guide, logits, log_d, prior, weight, generator)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    logits.copy_(logits.log_softmax(-1))
        return logits.detach()

    def _loss(
        self,
        guide: EmbeddedPotential,
        logits: Tensor,
        log_d: Tensor,
        prior: Tensor,
        weight: float,
        generator: Rng,
    ) -> Tensor:
        """Return the sum of the losses of all particles."""
        codes, free = codes_of(guide, logits), is_open(log_d)
        noise = uniforms(tuple(logits.shape), generator=generator, device=logits.device)
        gumbel = -(-noise.clamp_min(1e-30).log()).log().to(logits.dtype)
        relaxed = torch.softmax((logits + gumbel) / self.temperature, -1)
        # Known tokens are certain, whatever the optimiser makes of their logits.
        table = torch.where(free[..., None], relaxed, log_d.exp().to(logits.dtype))
        embedded = (table @ codes).flatten(0, -3)
        if isinstance(guide, GaussianMeasurement):
            misfit = torch.linalg.vector_norm(guide.residual(embedded), dim=-1).sum()
        else:
            misfit = -guide.embedded(embedded).sum()
        log_r = logits.log_softmax(-1)
        divergence = (log_r.exp() * (log_r - prior)).sum(-1)
        loss: Tensor = misfit + weight * torch.where(free, divergence, 0.0).sum()
        return loss

    # Moving.

    def _drawn(self, logits: Tensor, log_d: Tensor, generator: Rng) -> Tensor:
        """Return clean tokens ``x0 ~ r``, int64 ``(*batch, L)``."""
        table = torch.where(is_open(log_d)[..., None], logits.to(log_d.dtype), log_d)
        noise = uniforms(tuple(table.shape[:-1]), generator=generator, device=table.device)
        drawn: Tensor = draw_categorical(nucleus(table, self.top_p), noise)
        return drawn

    def _noised(
        self, site: ChainSite, kernel: Kernel, carry: Carry, x0: Tensor, k: int, generator: Rng
    ) -> Tensor:
        """Return the state after step ``k``, int64 ``(*batch, L)``."""
        process, fixed = kernel.process, site.chain.fixed
        if self.transition == "star" and process.absorbing:
            free = is_free(site, x0)
            masks = masks_after(kernel, k, free.sum(-1))
            return masked_again(x0, masks, process.vocab_size, free, generator)
        known = F.one_hot(x0, process.vocab_size).to(torch.float64).log()
        step: TokenStep | RevealStep
        if isinstance(kernel, OrderedKernel):
            step = kernel.step(carry, k, fixed=fixed).with_log_probs(known)
        else:
            kappa = 0.0 if self.transition == "star" else 1.0
            before, after = (float(alpha) for alpha in kernel.alphas[k : k + 2])
            levels = (before, after, kappa)
            step = TokenStep(
                process, carry["tokens"], known, *levels, fixed=fixed, validate_args=False
            )
        value: Tensor = draw_step(step, generator)  # type: ignore[assignment]
        return value

    def why(self, run: Bound) -> str:
        """Return why the particles have no declared law."""
        how = "noised again from scratch" if self.transition == "star" else "moved by bridges"
        return (
            f"no declared law: at each of {run.num_steps} steps tokens were drawn from a product "
            f"of sites fitted by {self.num_iterations} gradient steps and {how}, which nothing "
            "paid for; equal weights"
        )
