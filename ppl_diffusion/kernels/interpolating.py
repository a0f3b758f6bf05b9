"""The reverse kernel of an interpolating process on a time grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.kernels.mixture import log_posterior_mean, posterior_to_cavity
from ppl_diffusion.kernels.processes import Process, whole_number

if TYPE_CHECKING:
    from ppl_diffusion.denoisers.base import Denoiser
    from ppl_diffusion.distributions.token_step import TokenStep

FACTORISED = "FACTORISED"
"""Capability of a kernel whose step has an exact density, a product over positions."""

Carry = dict[str, Any]


@dataclass(frozen=True, init=False, eq=False)
class InterpolatingKernel:
    """A reverse chain of an interpolating process, one factorised step at a time.

    Step ``k`` goes from ``times[k]`` to ``times[k + 1]``; ``times`` runs from 1 (noise) to 0.
    The carry is a dict of arrays, batch dimensions first; ``carry["tokens"]`` holds the states,
    int64 ``(*batch, L)``.

    :param process: forward process.
    :param denoiser: predictor of clean tokens; its ``kind`` decides whether its output is
        converted to the cavity distribution the kernel needs.
    :param num_steps: number ``T`` of equal time steps.
    :param times: or the grid itself, ``T + 1`` decreasing times from 1 to 0.
    :param kappa: Psi parameter, a number or one per step; 1 is ancestral sampling. Negative
        values are accepted while the kernel stays a distribution.
    :raises ValueError: if the grid or ``kappa`` is not usable, or neither or both of
        ``num_steps`` and ``times`` are given.
    :raises CapabilityError: if the denoiser and the process disagree on the vocabulary, or the
        denoiser says that it was built for another process.
    """

    process: Process
    denoiser: Denoiser
    times: np.ndarray
    kappa: np.ndarray
    alphas: np.ndarray

    capability = FACTORISED

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        num_steps: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
        kappa: float | Sequence[float] | np.ndarray = 1.0,
    ) -> None:
        grid = _time_grid(num_steps, times)
        alphas = np.asarray(process.schedule.alpha(grid), dtype=np.float64)
        _check_denoiser(process, denoiser)
        object.__setattr__(self, "process", process)
        object.__setattr__(self, "denoiser", denoiser)
        object.__setattr__(self, "times", grid)
        object.__setattr__(self, "alphas", alphas)
        object.__setattr__(self, "kappa", _check_kappa(kappa, alphas, process))

    @property
    def num_steps(self) -> int:
        """Number ``T`` of reverse steps."""
        return len(self.times) - 1

    def with_denoiser(self, denoiser: Denoiser) -> InterpolatingKernel:
        """Return the same kernel around another denoiser (for instance a caching wrapper).

        :param denoiser: the replacement.
        """
        return InterpolatingKernel(self.process, denoiser, times=self.times, kappa=self.kappa)

    def same_as(self, other: object) -> bool:
        """Return whether both kernels define the same path law by construction.

        :param other: anything.
        """
        return self is other or (
            isinstance(other, InterpolatingKernel)
            and self.process is other.process
            and self.denoiser is other.denoiser
            and np.array_equal(self.times, other.times)
            and np.array_equal(self.kappa, other.kappa)
        )

    def init_carry(
        self,
        batch_shape: Sequence[int],
        length: int,
        *,
        prompt: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Carry:
        """Draw the noisiest state from the prior of the process.

        :param batch_shape: leading dimensions.
        :param length: number ``L`` of positions.
        :param prompt: int64 ``(L,)``: tokens that are present from the start, -1 elsewhere.
        :param generator: source of randomness.
        :returns: ``{"tokens": int64 (*batch_shape, L)}``.
        """
        shape = (*batch_shape, length)
        if self.process.absorbing:
            tokens = torch.full(shape, self.process.vocab_size, dtype=torch.int64)
        else:
            uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
            tokens = self.process.draw_prior(uniforms)
        if prompt is not None:
            tokens = torch.where(prompt >= 0, prompt, tokens)
        return {"tokens": tokens}

    def prior_step(
        self, batch_shape: Sequence[int], length: int, *, prompt: Tensor | None = None
    ) -> TokenStep:
        """Return the law of the noisiest state as a step distribution.

        :param batch_shape: leading dimensions.
        :param length: number ``L`` of positions.
        :param prompt: as in :meth:`init_carry`.
        """
        from ppl_diffusion.distributions.token_step import TokenStep  # as in step()

        size = self.process.vocab_size
        start = torch.zeros(length, dtype=torch.int64) if prompt is None else prompt.clamp_min(0)
        flat = torch.full((*batch_shape, length, size), -float(np.log(size)))
        fixed = None if prompt is None else prompt >= 0
        # At alpha = 0 and kappa = 0 the only move of the mixture is a draw from the prior.
        return TokenStep(self.process, start, flat, 0.0, 0.0, 0.0, fixed=fixed, validate_args=False)

    def prior_log_prob(self, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Return the log-probability of a noisiest state.

        :param tokens: int64 ``(*batch, L)``.
        :param prompt: as in :meth:`init_carry`; prompt positions are certain.
        :returns: float64 ``(*batch,)``.
        """
        log_p = torch.log(self.process.prior_prob(tokens))
        if prompt is not None:
            certain = torch.where(tokens == prompt, 0.0, -torch.inf).to(log_p.dtype)
            log_p = torch.where(prompt >= 0, certain, log_p)
        return log_p.sum(-1)

    def step(self, carry: Carry, k: int, *, fixed: Tensor | None = None) -> TokenStep:
        """Return the distribution of the next state.

        A step without progress (a repeated time at ``kappa = 1``) makes no network call.

        :param carry: the current carry.
        :param k: step index, 0 (noisiest) to ``num_steps - 1``.
        :param fixed: bool ``(*batch, L)``, positions that stay with probability one and do not
            enter the density (a prompt).
        :raises ValueError: if ``k`` is no step of the grid, or the denoiser misbehaves.
        """
        # The one upward import: a step *is* a distribution of the backend in use.
        from ppl_diffusion.distributions.token_step import TokenStep

        if not 0 <= k < self.num_steps:
            raise ValueError(f"step index k must lie in 0..{self.num_steps - 1}, got {k}.")
        tokens = carry["tokens"]
        return TokenStep(
            self.process,
            tokens,
            self.cavity_log_probs(tokens, k) if self._moves(k) else self._flat(tokens),
            float(self.alphas[k]),
            float(self.alphas[k + 1]),
            float(self.kappa[k]),
            fixed=fixed,
            validate_args=False,
        )

    def advance(self, carry: Carry, tokens: Tensor, k: int) -> Carry:
        """Return the carry after the move of step ``k``; the given carry is left alone.

        :param carry: the current carry.
        :param tokens: the sampled states, int64 ``(*batch, L)``.
        :param k: step index.
        """
        return {**carry, "tokens": tokens}

    def cavity_log_probs(self, tokens: Tensor, k: int) -> Tensor:
        """Return the denoiser's cavity log-probabilities at grid point ``k``.

        No network call is made where nothing can depend on it: a fully revealed masked state.

        :param tokens: int64 ``(*batch, L)``.
        :param k: index into ``times``.
        :returns: float64 ``(*batch, L, V)``, normalised to round-off.
        :raises TypeError: if the output is no tensor.
        :raises ValueError: if the output has the wrong shape, is NaN or is not normalised.
        """
        if self._revealed(tokens):
            return self._flat(tokens)
        log_c = self.denoiser(tokens, float(self.times[k]))
        log_c = _clean_log_probs(log_c, tokens, self.process.vocab_size)
        if self.denoiser.kind == "posterior":
            log_c = posterior_to_cavity(self.process, tokens, log_c, float(self.alphas[k]))
        return log_c

    def posterior_mean(self, tokens: Tensor, k: int) -> Tensor:
        """Return ``log p(x0 | x_k)`` per site, what a look-ahead fills unfinished states with.

        :param tokens: int64 ``(*batch, L)``.
        :param k: index into ``times``.
        :returns: float64 ``(*batch, L, V)``.
        """
        log_c = self.cavity_log_probs(tokens, k)
        return log_posterior_mean(self.process, tokens, log_c, float(self.alphas[k]))

    def asks_denoiser(self, tokens: Tensor, k: int) -> bool:
        """Return whether step ``k`` from these states costs a network call.

        :param tokens: int64 ``(*batch, L)``.
        :param k: step index.
        """
        return self._moves(k) and not self._revealed(tokens)

    def _moves(self, k: int) -> bool:
        """Return whether step ``k`` can change anything; at ``kappa = 1`` it needs signal to."""
        return bool(self.kappa[k] != 1 or self.alphas[k] != self.alphas[k + 1])

    def _revealed(self, tokens: Tensor) -> bool:
        return self.process.absorbing and not bool(torch.any(tokens == self.process.vocab_size))

    def _flat(self, tokens: Tensor) -> Tensor:
        size = self.process.vocab_size
        return torch.full((*tokens.shape, size), -np.log(size), dtype=torch.float64)

    def __repr__(self) -> str:
        kappa = (
            ""
            if np.all(self.kappa == 1)
            else f", kappa in [{self.kappa.min():.3g}, {self.kappa.max():.3g}]"
        )
        shape = f"num_steps={self.num_steps}{kappa}, {self.capability}"
        return f"{type(self).__name__}({self.process!r}, {shape})"


def _time_grid(num_steps: int | None, times: Any) -> np.ndarray:
    if (num_steps is None) == (times is None):
        raise ValueError("InterpolatingKernel: give exactly one of num_steps and times.")
    if times is None:
        count = whole_number(num_steps, "InterpolatingKernel: num_steps")
        return np.linspace(1.0, 0.0, count + 1)
    grid = np.asarray(times, dtype=np.float64).copy()  # np.array of a tensor warns
    if grid.ndim != 1 or grid.size < 2 or not np.all(np.isfinite(grid)):
        raise ValueError(
            "InterpolatingKernel: times must be a vector of at least two finite times."
        )
    if grid[0] != 1.0 or grid[-1] != 0.0 or np.any(np.diff(grid) > 0):
        raise ValueError("InterpolatingKernel: times must decrease from exactly 1 (noise) to 0.")
    return grid


def _check_kappa(kappa: Any, alphas: np.ndarray, process: Process) -> np.ndarray:
    given = np.asarray(kappa, dtype=np.float64)
    if given.shape not in ((), (len(alphas) - 1,)):
        raise ValueError(
            "InterpolatingKernel: kappa must be one number or one per step, "
            f"{len(alphas) - 1} of them, got shape {given.shape}."
        )
    values = np.broadcast_to(given, (len(alphas) - 1,)).copy()
    a, b = alphas[:-1], alphas[1:]
    if not np.all(np.isfinite(values)) or values.max() > 1:
        raise ValueError("InterpolatingKernel: kappa must be finite and at most 1.")
    # Below zero only the absorbing kernel is known to have room: sigma = (1-kappa)(1-b) is the
    # probability that a revealed token is masked again, and b - (1-sigma) a must not be negative.
    sigma = (1 - values) * (1 - b)
    room = process.absorbing & (sigma <= 1) & (sigma * a <= 1 - b)
    bad = np.flatnonzero((values < 0) & ~room)
    if bad.size:
        raise ValueError(
            f"InterpolatingKernel: kappa = {values[bad[0]]} at step {bad[0]} makes a probability "
            "negative; raise it."
        )
    return values


def _check_denoiser(process: Process, denoiser: Denoiser) -> None:
    kind = getattr(denoiser, "kind", None)
    if kind not in ("cavity", "posterior"):
        raise CapabilityError(
            f"denoiser.kind must be 'cavity' or 'posterior', got {kind!r}; set it on the denoiser."
        )
    size = getattr(denoiser, "vocab_size", process.vocab_size)
    if size != process.vocab_size:
        raise CapabilityError(
            f"the denoiser has {size} clean tokens but the process has {process.vocab_size}; "
            "build both with one vocabulary."
        )
    other = getattr(denoiser, "process", None)
    if isinstance(other, Process) and not _same_noise(process, other, denoiser.time_free):
        raise CapabilityError(
            f"the denoiser was built for {other!r} but the kernel runs {process!r}; "
            "build both with one process."
        )


def _same_noise(process: Process, other: Process, time_free: bool) -> bool:
    """Return whether an exact denoiser of one process is right for the other."""
    same_prior = np.array_equal(process.prior, other.prior)
    return same_prior and (time_free or process.schedule == other.schedule)


def _clean_log_probs(log_c: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Drop mass on the mask (SUBS), insist on finite rows, and normalise them in float64."""
    expected = (*tokens.shape, vocab_size)
    require_tensor(log_c, expected)
    if tuple(log_c.shape) == (*tokens.shape, vocab_size + 1):
        log_c = torch.log_softmax(log_c[..., :vocab_size], -1)
    if tuple(log_c.shape) != expected:
        raise ValueError(f"the denoiser returned shape {tuple(log_c.shape)}, expected {expected}.")
    log_c = log_c.to(torch.float64)
    total = log_c.exp().sum(-1, keepdim=True)
    if not bool(((total.detach() - 1).abs() < 1e-3).all()):
        raise ValueError(
            "the denoiser returned NaN or unnormalised log-probabilities; "
            "apply log_softmax over the clean vocabulary."
        )
    # float32 rows sum to one only almost: a path of many sites would lose that mass.
    return log_c - total.log()


def require_tensor(log_probs: object, expected: tuple[int, ...]) -> None:
    """Refuse what is no tensor, before an operation fails on it with an obscure message.

    :param log_probs: what a denoiser returned.
    :param expected: the shape to name in the message.
    :raises TypeError: if it is not a torch tensor.
    """
    if not isinstance(log_probs, Tensor):
        raise TypeError(
            f"the denoiser returned {type(log_probs).__name__}, expected a torch tensor of "
            f"log-probabilities of shape {expected}."
        )
