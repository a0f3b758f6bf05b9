"""The reverse kernel of an interpolating process in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ppl_diffusion.arrays import Array, int64_of
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import time_grid
from ppl_diffusion.kernels.kappa_rules import check_kappa
from ppl_diffusion.numpyro.denoisers import Denoiser
from ppl_diffusion.numpyro.token_step import TokenStep
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import log_posterior_mean, posterior_to_cavity
from ppl_diffusion.processes.noise import draw_categorical


class InterpolatingKernel(eqx.Module):
    """A reverse chain of an interpolating process, one factorised step at a time; a pytree.

    The twin of :class:`ppl_diffusion.kernels.InterpolatingKernel`. The arrays of the denoiser are
    its leaves; process, times and ``kappa`` are static.

    :param process: the forward process.
    :param denoiser: predictor of clean tokens; its ``kind`` decides whether its output is
        converted to the cavity distribution the kernel needs.
    :param num_steps: number ``T`` of equal time steps.
    :param times: or the grid itself, ``T + 1`` decreasing times from 1 to 0.
    :param kappa: Psi parameter, a number, one per step ``(T,)`` or one per step and site
        ``(T, L)``; 1 is ancestral sampling.
    :raises ValueError: if the grid or ``kappa`` is not usable, or not exactly one of ``num_steps``
        and ``times`` is given.
    :raises CapabilityError: if the denoiser and the process disagree on the vocabulary.
    """

    denoiser: Denoiser
    process: Process = eqx.field(static=True)
    times: tuple[float, ...] = eqx.field(static=True)
    kappa: tuple[Any, ...] | float = eqx.field(static=True)

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        kappa: float | Sequence[float] | np.ndarray = 1.0,
    ) -> None:
        if denoiser.vocab_size != process.vocab_size:
            raise CapabilityError(
                f"the denoiser predicts {denoiser.vocab_size} tokens and the process has "
                f"{process.vocab_size}; they must agree."
            )
        grid = time_grid(num_steps, times, type(self).__name__)
        checked = check_kappa(kappa, np.asarray(process.schedule.alpha(grid)), process)
        self.denoiser, self.process = denoiser, process
        self.times = tuple(grid.tolist())
        # One number for all steps stays one: the mixture then needs no sum over the vocabulary.
        same = bool((checked == checked.flat[0]).all())
        self.kappa = float(checked.flat[0]) if same else _nested(checked)

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return len(self.times) - 1

    @property
    def alphas(self) -> np.ndarray:
        """Signal levels of the grid, float64 ``(T + 1,)``."""
        return np.asarray(self.process.schedule.alpha(np.asarray(self.times)))

    def start(self, noise: Array, prompt: Array) -> Array:
        """Return noisiest states from uniforms of their shape, ``(*batch, L)``.

        :param prompt: tokens that are there from the start, -1 elsewhere.
        """
        return self.process.draw_start(noise, prompt).astype(int64_of(jnp))

    def prior_log_prob(self, tokens: Array, prompt: Array) -> Array:
        """Return the log-probability of noisiest states, ``(*batch,)``."""
        return self.process.log_start(tokens, prompt)

    def predict(self, tokens: Array, k: Array) -> Array:
        """Return cavity log-probabilities of the clean tokens, ``(*batch, L, V)``.

        :param tokens: states after ``k`` steps, ``(*batch, L)``.
        :param k: number of steps taken, also a traced one.
        """
        log_g = self.denoiser(tokens, _at(self.times, k))
        if self.denoiser.kind == "cavity":
            return log_g
        return posterior_to_cavity(self.process, tokens, log_g, _at(self.alphas, k))

    def step(
        self, tokens: Array, k: Array, *, fixed: Array | None = None, log_c: Array | None = None
    ) -> TokenStep:
        """Return the distribution of the next state, event shape ``(L,)``.

        :param tokens: states after ``k`` steps, ``(*batch, L)``.
        :param k: step index, 0 (noisiest) to ``T - 1``, also a traced one.
        :param fixed: bool ``(*batch, L)``, positions that stay with probability one (a prompt).
        :param log_c: the prediction, where it was made before.
        """
        log_c = self.predict(tokens, k) if log_c is None else log_c
        levels = _at(self.alphas, k), _at(self.alphas, k + 1)
        kappa = self.kappa if isinstance(self.kappa, float) else _at(self.kappa, k)
        return TokenStep(
            self.process, tokens, log_c, *levels, kappa, fixed=fixed, validate_args=False
        )

    def log_completions(self, tokens: Array, k: Array, log_c: Array) -> Array:
        """Return ``log p(x0 | x_k)`` per site, ``(*batch, L, V)``: what a look-ahead fills in.

        :param log_c: the prediction at these states.
        """
        return log_posterior_mean(self.process, tokens, log_c, _at(self.alphas, k))

    def complete(self, log_x0: Array, noise: Array | None = None) -> Array:
        """Return completions, the likeliest, or drawn by uniforms of the shape ``(*batch, L)``."""
        filled = log_x0.argmax(-1) if noise is None else draw_categorical(log_x0, noise)
        return filled.astype(int64_of(jnp))


def _at(values: Any, k: Array) -> Array:
    """Return an entry of a static sequence, as a number where ``k`` is one."""
    if isinstance(k, int):
        entry = np.asarray(values)[k]
        return float(entry) if entry.ndim == 0 else jnp.asarray(entry)
    return jnp.asarray(np.asarray(values))[k]


def _nested(values: np.ndarray) -> tuple[Any, ...]:
    return tuple(_nested(row) if row.ndim else float(row) for row in values)
