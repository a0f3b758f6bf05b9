"""What a denoiser of tokens and of a latent beside them is (LADD, arXiv 2510.18114)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser

LATENT = "latent"
"""Condition of a denoiser, block of a kernel and key of its carry that holds the latent."""

LATENT_TIME = "latent_time"
"""Condition of a denoiser: how noisy the latent is, the level of a path, 0 (clean) to 1."""


class LatentSpec(NamedTuple):
    """What a latent is: ``num_slots`` codes, or as many vectors.

    :param num_slots: number ``N`` of slots.
    :param num_codes: number ``K`` of codes of a slot, whose hole has the id ``K``; None where the
        latent is continuous.
    :param dim: number ``d`` of coordinates of a slot; None where the latent is discrete.
    """

    num_slots: int
    num_codes: int | None = None
    dim: int | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a latent, ``(N,)`` of codes or ``(N, d)``."""
        return (self.num_slots,) if self.dim is None else (self.num_slots, self.dim)


@runtime_checkable
class LatentDenoiser(Denoiser, Protocol):
    """A predictor of clean tokens *and* of the clean latent, from both in their noisy states.

    It is a :class:`~ppl_diffusion.denoisers.Denoiser` of the tokens with two conditions,
    ``{"latent": 1 or 2, "latent_time": 0}``, called as ``denoiser(tokens, t, latent=...,
    latent_time=...)``. What it predicts for the latent comes out of the same network call, as
    :meth:`joint` rows that two heads read. ``time_free`` speaks of ``t``, the level of the tokens.

    :ivar latent: what the latent is.
    """

    latent: LatentSpec

    def joint(self, tokens: Tensor, t: float | Tensor, /, **given: Any) -> Tensor:
        """Return one row per token and one per slot, ``(*batch, L + N, width)``.

        :param tokens: states, int64 ``(*batch, L)``; the mask has id ``V``.
        :param t: level of the tokens, a number or one per row.
        :param given: ``latent``, int64 ``(*batch, N)`` with holes ``K``, or float
            ``(*batch, N, d)``; ``latent_time``, a number or ``(*batch,)``; and other conditions.
        """
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of clean tokens, ``(..., V)``.

        :param rows: of :meth:`joint`, those of tokens, ``(..., width)``.
        """
        ...

    def latent_head(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of codes ``(..., K)``, or the clean latent ``(..., d)``.

        :param rows: of :meth:`joint`, those of slots, ``(..., width)``.
        """
        ...
