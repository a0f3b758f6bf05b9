"""The reverse kernel of an interpolating process on a time grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.kernels.base import TOKENS, Carry, Kernel, SampledPath, time_grid
from ppl_diffusion.kernels.event_kernel import EventKernel
from ppl_diffusion.kernels.kappa_rules import check_kappa
from ppl_diffusion.kernels.masked_paths import (
    ancestral_steps,
    draw_path,
    flat_given,
    flat_paths,
    log_step_probs,
    read_reveals,
    reveal_log_prob,
)
from ppl_diffusion.kernels.psi import PsiSchedule
from ppl_diffusion.kernels.token_step import TokenStep
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.noise import uniforms


class InterpolatingKernel(Kernel):
    """A reverse chain of an interpolating process, one factorised step at a time.

    :param denoiser: predictor of clean tokens; its ``kind`` decides whether its output is
        converted to the cavity distribution the kernel needs.
    :param num_steps: number ``T`` of equal time steps.
    :param times: or the grid itself, ``T + 1`` decreasing times from 1 to 0.
    :param kappa: Psi parameter, a number, one per step ``(T,)`` or one per step and site
        ``(T, L)``; 1 is ancestral sampling. Negative values are accepted while the kernel stays
        a distribution whatever the denoiser says.
    :param psi: or a named schedule, which brings its own grid and ``kappa``
        (:mod:`ppl_diffusion.kernels.psi`).
    :raises TypeError: if ``psi`` is something else.
    :raises ValueError: if the grid or ``kappa`` is not usable, or not exactly one of
        ``num_steps``, ``times`` and ``psi`` is given.
    :raises CapabilityError: if the denoiser and the process disagree on the vocabulary, or the
        denoiser says that it was built for another process.
    """

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        kappa: float | Sequence[float] | np.ndarray = 1.0,
        psi: PsiSchedule | None = None,
    ) -> None:
        if psi is not None:
            times, kappa = _unpack(psi, process, num_steps, times, kappa)
        super().__init__(process, denoiser, time_grid(num_steps, times, type(self).__name__))
        self.kappa = check_kappa(kappa, self.alphas, process)

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction."""
        return self is other or (
            type(self) is type(other)
            and isinstance(other, InterpolatingKernel)
            and self.process is other.process
            and self.denoiser is other.denoiser
            and np.array_equal(self.times, other.times)
            and np.array_equal(self.kappa, other.kappa)
        )

    @property
    def ancestral(self) -> bool:
        """Whether ``kappa`` is 1 throughout."""
        return bool(np.all(self.kappa == 1))

    @property
    def can_hold(self) -> bool:
        """Whether known tokens stay: not where they may be noised to something impossible."""
        return self.ancestral or bool((self.process.prior > 0).all() and self.kappa.min() >= 0)

    @property
    def changes(self) -> tuple[str, ...]:
        """Psi corrections, besides what the denoiser changes."""
        if self.ancestral:
            return super().changes
        own = f"Psi corrections{InterpolatingKernel._repr_options(self)}"
        return (*super().changes, own)

    @property
    def mixes(self) -> bool:
        """Whether every step is the three-way mixture of :meth:`cavity_log_probs`."""
        return True

    def site_kappa(self, carry: Carry, k: int) -> float | Tensor:
        """Return the Psi parameter of step ``k``, a number or one per site.

        :returns: a float, or float64 broadcastable to ``(*batch, L)``.
        """
        row = self.kappa[k]
        return float(row) if row.ndim == 0 else torch.as_tensor(row, device=carry[TOKENS].device)

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> TokenStep:
        """Return the distribution of the next state.

        A step without progress (a repeated time at ``kappa = 1``) makes no network call.
        """
        self.check_step(k)
        tokens = carry["tokens"]
        return TokenStep(
            self.process,
            tokens,
            self.predict(carry, k) if self._moves(k) else self._flat(tokens),
            float(self.alphas[k]),
            float(self.alphas[k + 1]),
            self.site_kappa(carry, k),
            fixed=fixed,
            validate_args=False,
        )

    def sample_path(
        self,
        batch_shape: Sequence[int],
        length: int,
        *,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Mapping[str, Tensor] | None = None,
        probe: bool = False,
    ) -> SampledPath | None:
        """Draw ancestral paths of the absorbing process on event times; None for other kernels.

        The law is that of the steps; steps that reveal nothing make no network call.
        """
        if not self._on_event_times:
            return None
        shape = (*batch_shape, length)
        levels, tokens = uniforms((2, *shape), generator=generator, device=self.device)
        start = self._noisiest(shape, prompt, generator)
        step_of, time = ancestral_steps(self, start, levels)
        drawn = draw_path(self, start, step_of, time, tokens, given=given, probe=probe)
        log_p = drawn.log_c + self._log_prob_of_steps(step_of) + self._log_length(start, prompt)
        return SampledPath(drawn.path, log_p, drawn.hidden_gradient)

    def path_log_prob(
        self,
        path: Tensor,
        *,
        prompt: Tensor | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Score ancestral paths of the absorbing process by their reveals; None for others."""
        if not self._on_event_times:
            return None
        rows, prompts = flat_paths(path, prompt)
        shown = self.process.shown(rows[:, 0], prompts)
        found = read_reveals(rows, self.process.vocab_size, shown)
        flat = flat_given(self, given, path.shape[:-2])
        log_p = reveal_log_prob(self, rows, found, self.time_of_step, flat)
        log_p = log_p + self._log_prob_of_steps(found.step_of)
        return (log_p + self._log_length(rows[:, 0], prompts)).reshape(path.shape[:-2])

    def time_of_step(self, step_of: Tensor, step: Tensor) -> Tensor:
        """Return the time of a step of a masked path whose reveals are known, float64 ``(M,)``."""
        return torch.as_tensor(self.times, device=step.device)[step]

    def check_length(self, length: int) -> None:
        """Refuse a length for which there is another number of ``kappa`` per step."""
        if self.kappa.ndim == 2 and self.kappa.shape[1] not in (1, length):
            raise ValueError(
                f"{type(self).__name__}: kappa is for {self.kappa.shape[1]} sites, but the chain "
                f"has {length}; give one per site, one per step, or one number."
            )

    @property
    def _on_event_times(self) -> bool:
        # A subclass may have changed the step, so that only its own steps are right.
        return type(self) is InterpolatingKernel and self.process.absorbing and self.ancestral

    def on_events(self, free: int) -> Kernel | None:
        """Return the rounds of an ancestral chain of the absorbing process; None for others."""
        return EventKernel(self, free) if self._on_event_times else None

    def _log_prob_of_steps(self, step_of: Tensor) -> Tensor:
        table = log_step_probs(self.process.schedule, self.times)
        log_p = torch.as_tensor(table, device=step_of.device)[step_of.clamp_min(0)]
        return torch.where(step_of < 0, 0.0, log_p).sum(-1)

    def asks_denoiser(self, carry: Carry, k: int) -> bool:
        """Return whether step ``k`` from this carry costs a network call."""
        return self._moves(k) and super().asks_denoiser(carry, k)

    def _moves(self, k: int) -> bool:
        """Return whether step ``k`` can change anything; at ``kappa = 1`` it needs signal to."""
        return bool(np.any(self.kappa[k] != 1) or self.alphas[k] != self.alphas[k + 1])

    def _repr_options(self) -> str:
        low, high = self.kappa.min(), self.kappa.max()
        return "" if self.ancestral else f", kappa in [{low:.3g}, {high:.3g}]"


def _unpack(
    psi: PsiSchedule, process: Process, num_steps: Any, times: Any, kappa: Any
) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(psi, PsiSchedule):
        raise TypeError(
            f"InterpolatingKernel: psi must be a PsiSchedule, got {psi!r}; parse_psi reads text."
        )
    if num_steps is not None or times is not None or not np.array_equal(kappa, 1.0):
        raise ValueError(
            "InterpolatingKernel: psi brings its own grid and kappa; leave out num_steps, times "
            "and kappa."
        )
    alphas = np.asarray(process.schedule.alpha(psi.times), dtype=np.float64)
    if not np.allclose(alphas, psi.alphas, rtol=0, atol=1e-12):
        raise ValueError(
            f"InterpolatingKernel: the Psi schedule {psi.name!r} was built for another signal "
            "schedule; build it from process.schedule."
        )
    return psi.times, psi.kappa
