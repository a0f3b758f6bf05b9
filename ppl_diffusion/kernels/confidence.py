"""Remasking the tokens the model was least sure of: ReMDM-conf as a kernel with a density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import Carry, Value, time_grid, tokens_of
from ppl_diffusion.kernels.interpolating import InterpolatingKernel
from ppl_diffusion.kernels.kappa_rules import rescaled
from ppl_diffusion.kernels.psi import PsiSchedule
from ppl_diffusion.processes.base import Process

CONFIDENCE = "confidence"
"""Key of the carry: the probability each token had when it was decoded, ``inf`` elsewhere."""


class ConfidenceKernel(InterpolatingKernel):
    """Masked chains that mask again what they were least confident of when they wrote it.

    A step of remasking probability ``sigma_k = (1 - kappa_k)(1 - b)`` spreads it over the decoded
    positions of a sequence, ``sigma^l = sigma_k softmax(-confidence)^l`` (Wang et al. 2025,
    arXiv:2503.00307, "ReMDM-conf"), so about ``sigma_k`` tokens per sequence and step are masked
    again, not that share of each. The confidence of a token is its probability when it was
    decoded. Prompts, and tokens that were there when the chain began, are never masked.

    Given the carry a step is factorised and its density exact, and a path determines all carries:
    the capability is ``FACTORISED``, but the kernel is not Markov in the tokens alone.

    :param process: an absorbing process.
    :param num_steps: number ``T`` of equal time steps.
    :param times: or the grid itself.
    :param kappa: sets ``sigma_k``; None remasks as much as a marginal allows,
        ``sigma_k = min(1, (1 - b) / a)``.
    :param psi: or a named schedule, which brings its own grid and ``kappa``.
    :raises CapabilityError: if the process is not absorbing.
    :raises ValueError: as :class:`InterpolatingKernel`.
    """

    markov = False

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        kappa: float | Sequence[float] | np.ndarray | None = None,
        psi: PsiSchedule | None = None,
    ) -> None:
        if not process.absorbing:
            raise CapabilityError(
                f"ConfidenceKernel masks tokens again, which {process!r} cannot; use an Absorbing "
                "process, or InterpolatingKernel with a Psi schedule."
            )
        if psi is None:
            times = time_grid(num_steps, times, type(self).__name__)
            kappa = _most(process, times) if kappa is None else kappa
            super().__init__(process, denoiser, times=times, kappa=kappa)
        else:
            given = 1.0 if kappa is None else kappa
            super().__init__(
                process, denoiser, num_steps=num_steps, times=times, kappa=given, psi=psi
            )

    @property
    def changes(self) -> tuple[str, ...]:
        """Remasking by confidence, besides what the denoiser changes."""
        return (*super().changes, "uncertain tokens masked again")

    def start_carry(
        self,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
    ) -> Carry:
        """Return the carry of a state of which nothing was decoded, so that nothing has a doubt."""
        carry = super().start_carry(tokens, generator, given=given)
        none = torch.full(tokens.shape, torch.inf, dtype=torch.float64, device=tokens.device)
        return {**carry, CONFIDENCE: none}

    def site_kappa(self, carry: Carry, k: int) -> Tensor:
        """Return the Psi parameter of every site, ``1 - sigma^l / (1 - b)``."""
        doubt = torch.exp(-carry[CONFIDENCE])
        total = doubt.sum(-1, keepdim=True)
        share = doubt / torch.where(total > 0, total, 1.0)
        return 1 - share * torch.as_tensor(1 - self.kappa[k], device=share.device)

    def advance(
        self, carry: Carry, value: Value, k: int, *, step: TorchDistribution | None = None
    ) -> Carry:
        """Return the carry after the move of step ``k``, with the confidences of new tokens."""
        tokens, mask = tokens_of(value), self.process.vocab_size
        decoded = (carry["tokens"] == mask) & (tokens != mask)
        kept = torch.where(tokens == mask, torch.inf, carry[CONFIDENCE])
        if k == self.num_steps - 1:
            return {**carry, "tokens": tokens, CONFIDENCE: kept}
        known = getattr(step, "prediction", None)
        asked = self.predict(carry, k) if known is None else known
        ids = tokens.clamp_max(mask - 1)[..., None]
        new = asked.expand(tokens.shape[:-1]).probabilities(ids, decoded)[..., 0]
        return {**carry, "tokens": tokens, CONFIDENCE: torch.where(decoded, new, kept)}


def _most(process: Process, times: np.ndarray) -> np.ndarray:
    alphas = np.asarray(process.schedule.alpha(times), dtype=np.float64)
    return rescaled(1.0)(alphas[:-1], alphas[1:], times[:-1])
