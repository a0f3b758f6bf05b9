"""Which levels of tokens and latent a training batch is drawn at, and what each row trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.models.program import stratified_times


class Phases(NamedTuple):
    """Levels of the rows of a batch.

    :param tokens: levels of the tokens, float64 ``(n,)``.
    :param latent: levels of the latent, float64 ``(n,)``.
    :param for_tokens: bool ``(n,)``, rows whose hidden tokens are predicted.
    :param for_latent: bool ``(n,)``, rows whose noisy latent is predicted.
    :param withheld: bool ``(n,)``, rows that read a latent of noise.
    """

    tokens: Tensor
    latent: Tensor
    for_tokens: Tensor
    for_latent: Tensor
    withheld: Tensor


class _Phase(NamedTuple):
    tokens: float | None  # a level, or None for one drawn
    latent: float | None
    for_tokens: bool
    for_latent: bool


# The two phases of a sequential path; any other path needs all pairs of levels. A latent at level 1
# says nothing: those rows train the masked denoiser that is left without one.
_PHASES = {
    "finished": _Phase(None, 0.0, True, False),
    "mixed": _Phase(None, None, True, True),
    "withheld": _Phase(None, 1.0, True, False),
    "latent": _Phase(1.0, None, False, True),
}


def draw_phases(rows: Tensor, shares: dict[str, float]) -> Phases:
    """Draw the levels of a batch, stratified within every phase.

    :param rows: the batch, ``(n, ...)``.
    :param shares: share of every phase, out of ``finished`` (tokens given the finished latent),
        ``mixed`` (both noisy, levels independent), ``withheld`` (tokens given noise), ``latent``
        (the latent before any token); they sum to one.
    """
    counts = _counts(len(rows), list(shares.values()))
    parts = []
    for name, count in zip(shares, counts, strict=True):
        phase, part = _PHASES[name], rows[:count]
        levels = [_level(part, level) for level in (phase.tokens, phase.latent)]
        flags = [phase.for_tokens, phase.for_latent, name == "withheld"]
        told = [torch.full((count,), flag, device=rows.device) for flag in flags]
        parts.append((*levels, *told))
    return Phases(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _level(rows: Tensor, level: float | None) -> Tensor:
    if level is None:
        return stratified_times(rows)
    return torch.full((len(rows),), level, dtype=torch.float64, device=rows.device)


def _counts(total: int, shares: Sequence[float]) -> list[int]:
    """Round shares to counts that add up, the same at every step."""
    ends = [round(total * sum(shares[: i + 1])) for i in range(len(shares))]
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
