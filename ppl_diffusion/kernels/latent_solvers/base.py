"""One step of a continuous latent: what every solver is.

The network predicts the clean latent, and a step from level ``u`` to ``s`` is::

    y_s = keep y_u + pull K + std eps

with the factors of :meth:`~ppl_diffusion.processes.Gaussian.step`, which ``eta`` chooses, and an
*estimate* ``K`` of the clean latent: the prediction itself, or a combination of it with those of
earlier steps. So solvers differ in two things, ``eta`` and ``K``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor

from ppl_diffusion.processes.gaussian import EVENT_DIMS, Gaussian

Level = float | Tensor
"""Level of a path, a number or one per row ``(*b,)``."""

History = Mapping[str, Tensor]
"""What a multistep solver remembers, batch first: part of the particle, resampled with it."""


class LatentSolver(ABC):
    """A rule that takes a latent one step down, given a prediction of the clean one.

    Solvers are values: equal settings are equal laws. Latents are float ``(*b, N, d)``; an ``eta``
    above 0 gives steps with a density, 0 a deterministic step (:attr:`stochastic`).

    :ivar name: what to call it in tables.
    :ivar order: steps back to which it looks, and one; what its error shrinks with.
    :ivar eta: noise of a step, from 0 (none) to 1 (that of the forward process).
    """

    name: ClassVar[str]
    order: int
    eta: float

    @property
    def stochastic(self) -> bool:
        """Whether a step has a density.

        Without one the solver itself *is* the law of the latent: nothing may weight it, and the
        number that a point mass calls its ``log_prob`` is no density.
        """
        return self.eta > 0.0

    def label(self, u: Level) -> Level:
        """Return the level that the network is to be told for a latent at level ``u``."""
        return u

    def start(self, latent: Tensor) -> History:
        """Return what is remembered before the first step: nothing, unless a solver overrides it.

        :param latent: the noisiest latent, ``(*b, N, d)``.
        """
        return {}

    def remember(
        self,
        history: History,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        restart: bool | Tensor = False,
    ) -> History:
        """Return the history after the step from level ``u``.

        :param latent: latent *before* the step, ``(*b, N, d)``.
        :param prediction: what was predicted from it, same shape.
        :param restart: whether the next prediction jumps for another reason than the step, because
            tokens changed or guidance was switched; or which rows, bool ``(*b,)``. Differences of
            predictions across such a jump mean nothing, so the next step has order 1.
        """
        return history

    @abstractmethod
    def estimate(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> Tensor:
        """Return the estimate ``K`` of the clean latent that the step from ``u`` to ``s`` uses."""

    def law(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> TorchDistribution:
        """Return the law of the latent after the step, event shape ``(N, d)``.

        :param latent: latent at level ``u``, float ``(*b, N, d)``.
        :param prediction: clean latent that was predicted from it, same shape.
        :param u: level before the step, a number or ``(*b,)``.
        :param s: lower level after it.
        :param history: of :meth:`remember`.
        :returns: a normal distribution, or a point mass if the solver is not :attr:`stochastic`.
        """
        estimate = self.estimate(process, latent, prediction, u, s, history)
        mean, std = process.bridge(latent, estimate, u, s, self.eta)
        if not self.stochastic:
            return Delta(mean, event_dim=EVENT_DIMS)
        scale = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
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
        """Return the term of a step in the bound: KL(bridge of the clean latent || law), ``(*b,)``.

        The sum over the steps is a strict bound if latents and history are drawn with the bridges
        of the same ``eta``.

        :param clean: clean latent, ``(*b, N, d)``; the others are those of :meth:`law`.
        :raises ValueError: if the solver has no density.
        """
        if not self.stochastic:
            raise ValueError(
                f"{self.name}: a deterministic step has no density, hence no bound; take a solver "
                "with noise, such as Ancestral(), to report one."
            )
        estimate = self.estimate(process, latent, prediction, u, s, history)
        return process.step_kl(clean, estimate, u, s, self.eta)
