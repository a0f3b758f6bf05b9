"""Whole paths of masked chains, drawn and scored on event times instead of step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.kernels.events import RevealPlan, decode, grid_bins, score
from ppl_diffusion.processes.schedules import Schedule


class MaskedPath(NamedTuple):
    """A path and what its reveals were worth.

    :param path: int64 ``(*batch, T + 1, L)``.
    :param log_c: summed log-probabilities of the revealed tokens, float64 ``(*batch,)``.
    :param hidden_gradient: whether the prediction depended on a tensor that wants a gradient.
    """

    path: Tensor
    log_c: Tensor
    hidden_gradient: bool


def draw_path(
    kernel: Kernel,
    start: Tensor,
    step_of: Tensor,
    time: Tensor,
    uniforms: Tensor,
    *,
    given: Mapping[str, Tensor] | None = None,
    probe: bool = False,
) -> MaskedPath:
    """Reveal every position at its step and return the path.

    :param start: the noisiest states, int64 ``(*batch, L)``.
    :param step_of: int64 ``(*batch, L)``, the step that reveals a position, -1 for the prompt.
    :param time: float64 ``(*batch, L)``, the time at which its prediction is made.
    :param uniforms: numbers in ``[0, 1)``, ``(*batch, L)``.
    :param given: conditions of the denoiser, broadcastable to the batch.
    :param probe: see :meth:`~ppl_diffusion.kernels.base.Kernel.sample_path`.
    """
    shape, size = start.shape, kernel.process.vocab_size
    rows = [x.reshape(-1, shape[-1]) for x in (start, step_of, time, uniforms)]
    plan = RevealPlan.of(rows[1], rows[2])
    flat = flat_given(kernel, given, shape[:-1])
    done = decode(kernel.denoiser, size, rows[0], plan, rows[3], given=flat, probe=probe)
    shown = torch.arange(kernel.num_steps + 1, device=start.device)[:, None] > rows[1][:, None]
    path = torch.where(shown, done.tokens[:, None], size)
    log_c = done.log_c.sum(-1).reshape(shape[:-1])
    return MaskedPath(path.reshape(*shape[:-1], *path.shape[1:]), log_c, done.hidden_gradient)


def ancestral_steps(kernel: Kernel, start: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step and the time at which ancestral sampling reveals each position.

    :param kernel: an absorbing kernel; its grid is used.
    :param start: noisiest states, int64 ``(*batch, L)``.
    :param levels: noise levels in ``[0, 1)``, shaped like them.
    :returns: int64, -1 where the start shows a token, and float64, shaped like ``start``.
    """
    step_of = grid_bins(levels, kernel.alphas)
    time = torch.as_tensor(kernel.times, device=levels.device)[step_of]
    return torch.where(start == kernel.process.vocab_size, step_of, -1), time


def log_step_probs(schedule: Schedule, times: np.ndarray) -> np.ndarray:
    """Return ``log(alpha(s) - alpha(t))`` of every step without cancellation, float64 ``(T,)``.

    Summed over positions it is the log-probability of the reveal steps of a path.

    :param times: time grid, ``(T + 1,)``.
    """
    noise = np.asarray(schedule.log1m_alpha(times), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # a repeated time reveals nothing
        gap = np.where(noise[1:] < noise[:-1], noise[1:] - noise[:-1], 0.0)
        return np.asarray(noise[:-1] + np.log(-np.expm1(gap)))


class Reveals(NamedTuple):
    """A masked path read as a table of reveals.

    :param valid: bool ``(B,)``: starts from masks and prompt, changes a position once, ends clean.
    :param step_of: int64 ``(B, L)``, -1 for the prompt.
    """

    valid: Tensor
    step_of: Tensor


def read_reveals(path: Tensor, mask_id: int, prompt: Tensor | None) -> Reveals:
    """Find out when each position of a path is revealed.

    :param path: int64 ``(B, T + 1, L)``.
    :param mask_id: id of the mask.
    :param prompt: int64 ``(B, L)`` or None.
    """
    masked, last = path == mask_id, path[:, -1]
    settled = torch.where(masked, True, path == last[:, None]).all(1)
    once = (masked[:, :-1] | ~masked[:, 1:]).all(1)
    clean = (last >= 0) & (last < mask_id)
    prompt = torch.full_like(last, -1) if prompt is None else prompt
    held = prompt >= 0
    begun = torch.where(held, path[:, 0] == prompt, masked[:, 0])
    # A path that ends in a mask is no path; its index must only stay in range.
    reveal = (masked.sum(1) - 1).clamp(0, path.shape[1] - 2)
    step_of = torch.where(held.expand_as(last), -1, reveal)
    return Reveals((settled & once & clean & begun).all(-1), step_of)


def flat_paths(path: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return paths as rows, with the prompt of each row.

    :param path: int64 ``(*batch, T + 1, L)``.
    :param prompt: int64, broadcastable to ``(*batch, L)``, or None.
    :returns: int64 ``(B, T + 1, L)`` and ``(B, L)``.
    """
    batch, size = path.shape[:-2], math.prod(path.shape[:-2])
    rows = path.reshape(size, *path.shape[-2:])
    if prompt is None:
        return rows, None
    return rows, prompt.expand(*batch, prompt.shape[-1]).reshape(size, -1)


def flat_given(
    kernel: Kernel, given: Mapping[str, Tensor] | None, batch_shape: Sequence[int]
) -> dict[str, Tensor]:
    """Return the conditions of each row of a batch, ``(B, *event)``.

    :param kernel: whose conditions they are.
    :param given: conditions, broadcastable to the batch, or None.
    """
    whole, size = kernel.expand_given(given, batch_shape), math.prod(batch_shape)
    return {n: x.reshape(size, *x.shape[len(batch_shape) :]) for n, x in whole.items()}


TimeOfStep = Callable[[Tensor, Tensor], Tensor]
"""The time of a step ``(M,)`` of a path with reveals ``(M, L)``."""


def reveal_log_prob(
    kernel: Kernel,
    path: Tensor,
    found: Reveals,
    time_of: TimeOfStep,
    given: Mapping[str, Tensor],
) -> Tensor:
    """Return the summed log-probabilities of a path's reveals, ``-inf`` where it is no path.

    The denoiser sees one row per non-empty step of each path, in calls of bounded size.

    :param path: int64 ``(B, T + 1, L)``.
    :param found: its reveals.
    :param time_of: when the kernel makes a prediction.
    :param given: conditions of each path, ``(B, *event)``.
    :returns: float64 ``(B,)``.
    """
    steps = torch.arange(kernel.num_steps, device=path.device)
    reveals = (found.step_of[:, None] == steps[:, None]) & found.valid[:, None, None]
    row, step = reveals.any(-1).nonzero(as_tuple=True)
    values = score(
        kernel.denoiser,
        kernel.process.vocab_size,
        path[row, step],
        time_of(found.step_of[row], step),
        reveals[row, step],
        path[row, -1],
        given={name: value[row] for name, value in given.items()},
    )
    log_p = values.new_zeros(len(path)).index_add(0, row, values)
    return torch.where(found.valid, log_p, -math.inf)
