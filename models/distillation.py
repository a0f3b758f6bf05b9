"""Discrete consistency distillation: a prior that samples in few steps (Duo, section 4.2).

::

    ppl-diffusion train yeast-promoter-uniform --objective distillation --data DIR --out OUT

A network is trained to say at time ``t`` what its own earlier version, the teacher, says a little
later in the reverse chain, at ``t - delta``, on a less noisy state of the same Gaussian latent.
After each round the teacher becomes the student and ``delta`` doubles (Sahoo et al. 2025,
arXiv:2506.10892, algorithm 1).

The distilled network is a denoiser like any other. What one samples with few steps is the
:class:`~ppl_diffusion.distributions.ReverseChain` around it, ``load(OUT / "prior").chain(8)``: a
chain with its own law and exact ``log_prob``, hence a model or a proposal. It gains for few steps
and loses for many, because the student commits to the likelier of the teacher's answers; its
NELBO gets worse, so distilled weights are for sampling and not for bounds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.models.objectives import Objective, uniform_network
from ppl_diffusion.models.program import DiffusionProgram, stratified_times
from ppl_diffusion.processes.duality import coupled_states, log_diffusion_noise
from ppl_diffusion.processes.noise import uniforms

# Nodes of the table of T(mu), over mu = exp(-g / 2): linear interpolation is good to 2e-5.
_GAMMAS = (-6.0, 30.0, 4097)


class Distillation(Objective):
    """Consistency distillation in rounds of ever larger steps.

    Times are those of the program's own schedule, so that ``delta`` is a step of the chain one
    samples: after ``r`` rounds the network has learnt to look ahead by the sum of the first ``r``
    steps. The published code spaces times in the log-SNR of the latent, which for small
    vocabularies spends most of them where all is noise.

    :param program: the program to distil, of a uniform process around a trained
        :class:`~ppl_diffusion.denoisers.transformer.Transformer`; trained in place.
    :param steps: optimiser steps of the whole run, dealt out to the rounds in equal parts.
    :param first_delta: the step of the first round; doubled for each of the others.
    :raises ValueError: if the process is not uniform, the number of rounds is none, or the last
        step would exceed the time there is.
    """

    best_is_kept: ClassVar[bool] = False

    def __init__(
        self,
        program: DiffusionProgram,
        *,
        steps: int,
        rounds: int = 5,
        first_delta: float = 1.0 / 512.0,
    ) -> None:
        super().__init__(program, steps=steps)
        if not isinstance(rounds, int) or isinstance(rounds, bool):
            raise ValueError(f"distillation: rounds must be an integer from 1 up, got {rounds!r}.")
        if not (rounds >= 1 and first_delta > 0.0 and first_delta * 2.0 ** (rounds - 1) <= 1.0):
            raise ValueError(
                f"distillation: {rounds} rounds from delta {first_delta:.3g} end outside (0, 1]; "
                "give fewer rounds, or a smaller first_delta."
            )
        self.student = uniform_network(program, "distillation")
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.rounds, self.first_delta = rounds, first_delta

    def delta(self, step: int) -> float:
        """Return how far the teacher is ahead after so many optimiser steps."""
        return self.first_delta * 2.0 ** min(step // self._round_length, self.rounds - 1)

    def loss(self, rows: Tensor, step: int, labels: Tensor | None = None) -> Tensor:
        """Return ``KL(student(z_t, t) || teacher(z_s, s))``, summed over sites."""
        begins = step % self._round_length == 0 and step < self.rounds * self._round_length
        if begins:
            self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.to(rows.device)  # no part of what the trainer moves
        t = (stratified_times(rows) + self.delta(step)).clamp_max(1.0)
        s = (t - self.delta(step)).clamp_min(0.0)
        z_t, z_s = self.coupled(rows, t, s)
        with torch.no_grad():
            target = self.teacher(z_s, s)
        ahead = self.student(z_t, t)
        return (ahead.exp() * (ahead - target)).sum((-1, -2)).mean()

    def coupled(self, rows: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Draw noised rows at two times out of the same Gaussian latents."""
        size = self.program.denoiser.vocab_size
        noise = self.program.process.schedule.log1m_alpha(torch.stack([t, s])[..., None])
        drawn_from = uniforms((3, *rows.shape), device=rows.device)
        z_t, z_s = coupled_states(rows, latent_levels(noise, size), size, drawn_from)
        return z_t, z_s

    def state_dict(self) -> dict[str, Any]:
        return dict(self.teacher.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state)

    @property
    def _round_length(self) -> int:
        return max(1, self.steps // self.rounds)


def latent_levels(log_noise: Tensor, vocab_size: int) -> Tensor:
    """Return the ``mu`` of the Gaussian latents whose argmax has a given noise level."""
    gammas, noise = _noise_table(vocab_size, log_noise.device)
    right = torch.searchsorted(noise, log_noise).clamp(1, len(noise) - 1)
    left = right - 1
    share = ((log_noise - noise[left]) / (noise[right] - noise[left])).clamp(0.0, 1.0)
    mu = torch.exp(-0.5 * torch.lerp(gammas[left], gammas[right], share))
    return mu.where(log_noise > -torch.inf, torch.inf).where(log_noise < 0.0, 0.0)


@lru_cache(maxsize=8)
def _noise_table(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    gammas = torch.linspace(*_GAMMAS, dtype=torch.float64, device=device)
    return gammas, log_diffusion_noise(torch.exp(-0.5 * gammas), vocab_size)
