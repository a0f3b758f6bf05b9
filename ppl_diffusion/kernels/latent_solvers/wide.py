"""Steps wide enough for a latent that the prediction leaves open (Ho et al. 2020, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.ancestral import Ancestral
from ppl_diffusion.kernels.latent_solvers.base import History, Level
from ppl_diffusion.processes.gaussian import EVENT_DIMS, Gaussian, over_event


class Wide(Ancestral):
    """The step whose variance is right for clean latents of unit variance, not for a known one.

    :class:`~ppl_diffusion.kernels.latent_solvers.ancestral.Ancestral` takes the prediction for the
    clean latent. That costs nothing over many steps; over few, latents come out near their mean. A
    standard normal latent has, given a noisy one at level ``u``, the variance ``b(u)^2`` around its
    prediction, which is added here: one step from noise then draws such a latent exactly.
    """

    name = "wide"

    def law(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> Normal:
        """Return the law of the latent after the step, event shape ``(N, d)``."""
        mean, _ = process.bridge(latent, prediction, u, s)
        scale = over_event(_deviation(process, u, s), latent)
        scale = torch.as_tensor(scale, dtype=mean.dtype, device=mean.device)
        return Normal(mean, scale.expand_as(mean)).to_event(EVENT_DIMS)

    def step_kl(
        self,
        process: Gaussian,
        latent: Tensor,
        clean: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> Tensor:
        """Return KL(bridge of the clean latent || law), ``(*b,)``."""
        step = process.step(u, s)
        wide, std, pull = (
            torch.as_tensor(over_event(x, clean), dtype=clean.dtype, device=clean.device)
            for x in (_deviation(process, u, s), step.std, step.pull)
        )
        error = (pull * (clean - prediction)).square()
        each = (wide / std).log() + 0.5 * ((std**2 + error) / wide**2 - 1.0)
        return each.sum((-2, -1))


def _deviation(process: Gaussian, u: Level, s: Level) -> Any:
    step = process.step(u, s)
    return (step.std**2 + (step.pull * process.noise(u)) ** 2) ** 0.5
