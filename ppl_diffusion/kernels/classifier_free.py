"""Classifier-free guidance: the geometric mixture of a conditional and an unconditional model.

With weight ``w`` the two laws ``p_y`` and ``p_0`` become ``p_w ~ p_y**w p_0**(1 - w)``, site by
site; 0 is unconditional, 1 conditional, above 1 overshoots (Ho and Salimans 2022,
arXiv:2207.12598). For a discrete chain there are two places to do so:

* ``"denoiser"``: guide the prediction of the clean token and put it through the bridge as ever (as
  Schiff et al. 2024, arXiv:2412.10193, do for masks). The step stays a three-way mixture: the
  *when* of a masked chain is untouched, and only the tokens that are drawn are guided.
* ``"kernel"``: guide the law of the next state (the same paper's D-CFG, and Sahoo et al. 2025,
  arXiv:2506.10892). A table of all states per site. For masks it also changes when a token is
  revealed: the probability ``u`` becomes ``u S / (u S + 1 - u)``, ``S = sum_v c_y**w c_0**(1-w)``.

They agree in steps that end at the data (``alpha(s) = 1``), and in no other: there the bridge is
the prediction times the evidence ``q(z_t | x)`` of the site, a factor that is in both laws and
whose exponents sum to one. Neither level is ``p(x | y)`` for ``w != 1``; both have an exact
density, so that they can be a model (which says so in ``changes``) or the proposal of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import check_denoiser, clean_log_probs, require_tensor
from ppl_diffusion.denoisers.conditional import Guided, Paired, require_common_support
from ppl_diffusion.denoisers.guidance import guided_log_probs
from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.kernels.completions import Completions
from ppl_diffusion.kernels.interpolating import InterpolatingKernel
from ppl_diffusion.kernels.psi import PsiSchedule
from ppl_diffusion.kernels.state_step import StateStep
from ppl_diffusion.kernels.step import StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import posterior_to_cavity

Level = Literal["denoiser", "kernel"]


class ClassifierFreeKernel(InterpolatingKernel):
    """A reverse chain under classifier-free guidance.

    ``denoiser`` is one object that asks both networks:
    :class:`~ppl_diffusion.denoisers.conditional.Guided` at the denoiser level (filters may be put
    around it: ``kernel.with_denoiser(Nucleus(kernel.denoiser, 0.9))``),
    :class:`~ppl_diffusion.denoisers.conditional.Paired` at the kernel level (filter each part). At
    weights 0 and 1 it is the one denoiser that is left, and the chain is that denoiser's own.

    At the kernel level and ``kappa < 1`` the bridge at ``s`` and the bridge at 0 are guided
    separately, and the second is noised again::

        kappa G[q(z_s | z_t)] + (1 - kappa) (b G[q(z_0 | z_t)] + (1 - b) pi)

    :param conditional: denoiser of ``p(x0 | x_t, y)``, such as ``Labelled(network, y)``.
    :param unconditional: denoiser of ``p(x0 | x_t)``, such as ``Labelled(network, None)``.
    :param weight: ``w``; 0 is unconditional, 1 conditional, above 1 overshoots.
    :param level: what is guided, the prediction (``"denoiser"``) or the step (``"kernel"``).
    :param num_steps: as in :class:`InterpolatingKernel`, like ``times``, ``kappa`` and ``psi``;
        negative ``kappa`` is refused at the kernel level.
    :raises ValueError: if the weight, the level, the grid or ``kappa`` is not usable.
    :raises CapabilityError: if the denoisers do not fit together or not to the process.
    """

    def __init__(
        self,
        process: Process,
        conditional: Denoiser,
        unconditional: Denoiser,
        *,
        weight: float,
        level: Level = "denoiser",
        num_steps: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        kappa: float | Sequence[float] | np.ndarray = 1.0,
        psi: PsiSchedule | None = None,
    ) -> None:
        self.weight, self.level = _check_options(weight, level)
        both = self._combine(process, conditional, unconditional)
        super().__init__(process, both, num_steps=num_steps, times=times, kappa=kappa, psi=psi)
        if self._tabulates and self.kappa.min() < 0:
            raise ValueError(
                "ClassifierFreeKernel: at level='kernel' guidance changes how much moves, so that "
                "kappa < 0 can make a probability negative; use level='denoiser' or kappa >= 0."
            )

    @property
    def changes(self) -> tuple[str, ...]:
        """The filters of the denoisers, and the guidance unless the weight is 0 or 1."""
        own = f"classifier-free guidance {self.weight:g} of every step"
        return (*super().changes, own) if self._tabulates else super().changes

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return (
            isinstance(other, ClassifierFreeKernel)
            and super().same_as(other)
            and (self.weight, self.level) == (other.weight, other.level)
        )

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> StepDistribution:
        """Return the distribution of the next state.

        :raises ValueError: if ``k`` is no step of the grid, a denoiser misbehaves, or the two
            predictions have nothing in common.
        """
        if not self._tabulates:
            return super().step(carry, k, fixed=fixed)
        self.check_step(k)
        tokens = carry["tokens"]
        cavities = self._cavities(carry, k) if self._moves(k) else (self._flat(tokens),) * 2
        table = self._guided_bridge(tokens, cavities, k, float(self.alphas[k + 1]), fixed)
        if np.any(self.kappa[k] != 1):
            renoised = self._guided_bridge(tokens, cavities, k, 1.0, fixed)
            table = self._psi_table(table, renoised, carry, k)
        return StateStep(table, tokens=tokens, fixed=fixed)

    def cavity_log_probs(self, carry: Carry, k: int) -> Tensor:
        """Return the guided prediction of the clean tokens, ``c_w``, at either level."""
        if not self._tabulates:
            return super().cavity_log_probs(carry, k)
        return self._guide(*self._cavities(carry, k), self._settled(carry["tokens"]))

    def posterior_mean(self, carry: Carry, k: int) -> Tensor:
        """Return the law of a single jump to clean tokens, what a look-ahead fills states with."""
        if not self._tabulates:
            return super().posterior_mean(carry, k)
        table = self._guided_bridge(carry["tokens"], self._cavities(carry, k), k, 1.0, None)
        return table[..., : self.process.vocab_size]

    def predict(self, carry: Carry, k: int) -> Prediction:
        """Return the guided prediction of the clean tokens."""
        return super().predict(carry, k) if self._tabulates else self._predict(carry, k)

    def completions(self, carry: Carry, k: int) -> Completions:
        """Return what a look-ahead fills states with: draws from :meth:`posterior_mean`."""
        return super().completions(carry, k) if self._tabulates else self._completions(carry, k)

    @property
    def mixes(self) -> bool:
        """Whether every step is a three-way mixture: not where whole steps are guided."""
        return not self._tabulates

    @property
    def _tabulates(self) -> bool:
        return self.level == "kernel" and self.weight not in (0, 1)

    def _combine(
        self, process: Process, conditional: Denoiser, unconditional: Denoiser
    ) -> Denoiser:
        for part in (conditional, unconditional):
            check_denoiser(process, part)
        if self._tabulates:
            return Paired(conditional, unconditional)
        guided = Guided(conditional, unconditional, self.weight, mask_id=process.mask_id)
        alone = {0.0: unconditional, 1.0: conditional}
        return alone.get(self.weight, guided)

    def _cavities(self, carry: Carry, k: int) -> tuple[Tensor, Tensor]:
        """Return both cavity predictions, without a network call where none is needed."""
        tokens = carry["tokens"]
        if self._revealed(tokens):
            return self._flat(tokens), self._flat(tokens)
        size = self.process.vocab_size
        both = self.denoiser(tokens, self.prediction_time(carry, k), **carry.get(GIVEN, {}))
        _require_pair(both, (*tokens.shape, 2 * size))
        first, second = (self._cavity(c, tokens, k) for c in both.split(size, -1))
        return first, second

    def _cavity(self, log_c: Tensor, tokens: Tensor, k: int) -> Tensor:
        log_c = clean_log_probs(log_c, tokens.shape, self.process.vocab_size)
        if self.denoiser.kind == "posterior":
            log_c = posterior_to_cavity(self.process, tokens, log_c, float(self.alphas[k]))
        return log_c

    def _guided_bridge(
        self,
        tokens: Tensor,
        cavities: tuple[Tensor, Tensor],
        k: int,
        b: float,
        fixed: Tensor | None,
    ) -> Tensor:
        """Return ``log G[q(. | z_t)]`` at signal level ``b``, ``(*batch, L, S)``."""
        a = float(self.alphas[k])
        first, second = (
            TokenStep(self.process, tokens, c, a, b, fixed=fixed, validate_args=False)
            for c in cavities
        )
        return self._guide(first.dense_log_probs(), second.dense_log_probs(), None)

    def _guide(self, log_y: Tensor, log_0: Tensor, unread: Tensor | None) -> Tensor:
        return require_common_support(guided_log_probs(log_y, log_0, self.weight), unread)

    def _psi_table(self, bridge: Tensor, clean: Tensor, carry: Carry, k: int) -> Tensor:
        b = float(self.alphas[k + 1])
        kappa = torch.as_tensor(
            self.site_kappa(carry, k), dtype=torch.float64, device=clean.device
        )[..., None]
        renoised = b * clean.exp() + (1 - b) * self.process.prior_array(clean)
        probs = kappa * bridge.exp() + (1 - kappa) * renoised
        possible = probs > 0
        return torch.where(possible, torch.where(possible, probs, 1.0).log(), -torch.inf)

    def _settled(self, tokens: Tensor) -> Tensor | None:
        return tokens != self.process.vocab_size if self.process.absorbing else None

    def _repr_options(self) -> str:
        return f"{super()._repr_options()}, weight={self.weight:g}, level={self.level}"


def _require_pair(both: Tensor, expected: tuple[int, ...]) -> None:
    require_tensor(both, expected)
    if tuple(both.shape) != expected:
        raise ValueError(
            f"ClassifierFreeKernel: the denoiser returned shape {tuple(both.shape)}, expected "
            f"{expected}; at level='kernel' it must be a Paired denoiser, or a wrapper of one."
        )


def _check_options(weight: float, level: Level) -> tuple[float, Level]:
    if not math.isfinite(weight):
        raise ValueError(f"ClassifierFreeKernel: weight must be a finite number, got {weight}.")
    if level not in get_args(Level):
        raise ValueError(
            f"ClassifierFreeKernel: level is {level!r}; choose 'denoiser' or 'kernel'."
        )
    return float(weight), level
