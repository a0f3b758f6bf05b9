"""What a training step minimises: the bound itself, or Duo's curriculum before it.

Sahoo et al. 2025 (Duo, arXiv:2506.10892) and 2026 (arXiv:2602.21185); distillation is in
:mod:`ppl_diffusion.models.distillation`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.denoisers.topk import dense_latents, top_k_latents
from ppl_diffusion.denoisers.transformer import Transformer
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_from_hidden
from ppl_diffusion.kernels import Uniform
from ppl_diffusion.models.program import DiffusionProgram, stratified_times
from ppl_diffusion.processes.duality import DuoSchedule
from ppl_diffusion.processes.noise import uniforms

_WIDE_GAMMAS = (-6.0, 30.0)  # at which T is one and zero for any vocabulary


class Objective(ABC):
    """A loss of a program, as a function of clean rows and the step.

    Everything random comes from torch's global generator, which the caller seeds, so that a step
    can be repeated.


    :cvar best_is_kept: whether the weights with the best validation bound are kept, not the last.
    """

    best_is_kept: ClassVar[bool] = True

    def __init__(self, program: DiffusionProgram, *, steps: int) -> None:
        self.program = program
        self.steps = steps

    @abstractmethod
    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return the loss in nats per sequence, a differentiable scalar.

        :param rows: clean tokens, int64 ``(n, L)``.
        :param step: optimiser steps taken so far.
        :param labels: classes of the rows, int64 ``(n,)``; only :class:`Nelbo` learns them.
        """

    def notes(self) -> dict[str, float]:
        """Return what else the log should say of the last step, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know besides the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                "The checkpoint was written under another objective than "
                f"{type(self).__name__.lower()}: resume with the one the run began with."
            )


class Nelbo(Objective):
    """The bound itself; its loss does not depend on the step.

    :param label_dropout: share of the labels that are withheld, where there are any: what the
        network learns without them is the unconditional prior.
    """

    def __init__(
        self, program: DiffusionProgram, *, steps: int, label_dropout: float = 0.1
    ) -> None:
        super().__init__(program, steps=steps)
        self.label_dropout = label_dropout

    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return the bound, given the labels that are not withheld."""
        return self.program.loss(rows, labels=labels, label_dropout=self.label_dropout)


class Curriculum(Objective):
    """Soft inputs first, then the NELBO (Duo, arXiv:2506.10892, section 4.1).

    In the first part of a run the network reads ``softmax(w / tau)``, a mixture of tokens, where
    ``w`` is the Gaussian latent whose argmax is the noised token: the input still tells a little of
    the clean token, and the gradient is less noisy. That loss is biased for ``tau > 0`` and no
    bound; the second part, without soft inputs, trains the bound itself.

    :param program: the program, of a uniform process around a :class:`Transformer`.
    :param share: share of the steps that read soft inputs.
    :param top_k: how many entries of the latent are drawn beside the clean token's; None for all
        ``V``, which is also what happens where ``V`` is at most ``top_k + 1``.
    :param alphas: lowest and highest signal level at which soft inputs are drawn.
    :raises ValueError: if the process is not uniform, the share is not one, or ``tau`` or ``top_k``
        is not positive.
    """

    def __init__(
        self,
        program: DiffusionProgram,
        *,
        steps: int,
        share: float = 0.5,
        tau: float = 1e-3,
        top_k: int | None = 8,
        alphas: tuple[float, float] = (0.05, 0.95),
    ) -> None:
        super().__init__(program, steps=steps)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"curriculum: share must lie in [0, 1], got {share}.")
        if not 0.0 < tau < math.inf:
            raise ValueError(f"curriculum: tau must be a positive number, got {tau}.")
        if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
            raise ValueError(f"curriculum: top_k must be an integer from 1 up, or None: {top_k!r}.")
        self.network = uniform_network(program, "curriculum")
        self.share, self.tau = share, tau
        few = top_k is not None and top_k + 1 < program.denoiser.vocab_size
        self.top_k = top_k if few else None
        self.schedule = duo_schedule(program.denoiser.vocab_size, alphas)

    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return the soft loss in the first part, the NELBO in the second."""
        soft = step < self.share * self.steps
        return self.soft_loss(rows) if soft else self.program.loss(rows)

    def soft_loss(self, rows: Tensor) -> Tensor:
        """Return the loss under soft inputs, one stratified time per row, in nats per sequence."""
        duo, t = self.schedule, stratified_times(rows)[:, None]
        # The network knows the time of its own schedule: that at which as much noise is left.
        own = self.program.process.schedule.time_from_log1m(duo.log1m_alpha(t))[:, 0]
        ids, weights, z = self._latents(rows, duo.mu(t))
        hidden = self.network.hidden_mixture(ids, weights, own)
        alpha, slope = duo.alpha(t), duo.alpha_prime(t)
        head = self.network.vocabulary  # the bound normalises what it gets
        terms = uniform_nelbo_from_hidden(hidden, head, rows, z, alpha, slope)
        return terms.sum(-1).mean()

    def _latents(self, rows: Tensor, mu: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        size = self.program.denoiser.vocab_size
        if self.top_k is None:
            noise = torch.randn((*rows.shape, size), device=rows.device)
            return None, *dense_latents(rows, mu, size, noise, tau=self.tau)
        drawn_from = uniforms((2 * self.top_k + 1, *rows.shape), device=rows.device)
        drawn = top_k_latents(rows, mu, size, drawn_from, k=self.top_k, tau=self.tau)
        return drawn.ids, drawn.weights, drawn.tokens


def duo_schedule(vocab_size: int, alphas: tuple[float, float]) -> DuoSchedule:
    """Return the schedule of Gaussian latents with given signal levels at its two ends."""
    low, high = alphas
    if not 0.0 < low < high < 1.0:
        raise ValueError(f"curriculum: alphas must satisfy 0 < low < high < 1, got {alphas}.")
    noise = torch.log1p(-torch.tensor([high, low], dtype=torch.float64, device="cpu"))
    start, width = _WIDE_GAMMAS[0], _WIDE_GAMMAS[1] - _WIDE_GAMMAS[0]
    first, last = start + width * DuoSchedule(vocab_size, *_WIDE_GAMMAS).time_from_log1m(noise)
    return DuoSchedule(vocab_size, float(first), float(last))


def uniform_network(program: DiffusionProgram, objective: str) -> Transformer:
    """Return the network of a uniform program; ``objective`` says who asks."""
    if not isinstance(program.process, Uniform):
        raise ValueError(
            f"{objective}: only the uniform process is the argmax of a Gaussian one, but "
            f"{program.name} is {program.family}; train it with the objective nelbo."
        )
    if not isinstance(program.denoiser, Transformer):
        raise TypeError(f"{objective}: the program must be built around a Transformer.")
    return program.denoiser
