"""Masking of sequences of every length: letters are hidden, what fills a sequence up never is.

A sequence of ``n`` letters stands in the first of ``L`` positions; the last token of the vocabulary
fills the others. The forward process leaves these alone, so that its noisiest state shows the
length, of which there is a law ``p(n)`` of its own::

    p(x) = p(n(x)) p(x | n(x)),        noisiest state: n masks, then L - n fillings

A reverse chain draws the length with its noisiest state and cannot leave it: the law of lengths is
exact, whatever the network says, and so are evidence and novelty across lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, int64_of
from ppl_diffusion.processes.base import Absorbing
from ppl_diffusion.processes.schedules import Schedule


class Padded(Absorbing):
    """Masking of the letters of sequences whose lengths have a law.

    :param vocab_size: number ``V`` of clean tokens; the last of them, ``V - 1``, fills up.
    :param lengths: probabilities of the lengths 0 to ``L``.
    :param schedule: signal schedule (linear by default).
    :raises ValueError: if they are no distribution, or there is no letter beside the filling.
    """

    def __init__(
        self, vocab_size: int, lengths: Sequence[float] | Array, schedule: Schedule | None = None
    ) -> None:
        super().__init__(vocab_size, schedule)
        law = np.asarray(lengths, dtype=np.float64)
        usable = law.ndim == 1 and law.size > 1 and bool(np.all(np.isfinite(law)))
        if not usable or law.min() < 0 or abs(law.sum() - 1) > 1e-6:
            raise ValueError(
                "Padded: lengths must hold the probabilities of the lengths 0 to L, finite, not "
                f"negative and with the sum one, got {law.size} numbers with the sum "
                f"{float(law.sum()):g}."
            )
        if self.vocab_size < 2:
            raise ValueError(
                "Padded: the last token fills sequences up, so that there must be another one; "
                f"got vocab_size = {self.vocab_size}."
            )
        self.lengths = law / law.sum()

    @property
    def padding(self) -> int:
        """Id of the token that fills sequences up."""
        return self.vocab_size - 1

    @property
    def start_is_random(self) -> bool:
        """True: the noisiest state has a random length."""
        return True

    def between(self, low: int, high: int | None = None) -> Self:
        """Return the process of the sequences whose lengths lie in a range: ``p(n | low..high)``.

        :param low: the shortest length.
        :param high: the longest one, ``L`` if it is not given.
        :raises ValueError: if no length of the law lies there.
        """
        sizes = np.arange(self.lengths.size)
        last = self.lengths.size - 1 if high is None else high
        kept = np.where((sizes >= low) & (sizes <= last), self.lengths, 0.0)
        if kept.sum() == 0:
            known = np.flatnonzero(self.lengths)
            raise ValueError(
                f"Padded: no sequence has {low} to {last} letters, the law of lengths runs from "
                f"{known[0]} to {known[-1]}; choose lengths among those."
            )
        new = copy.copy(self)
        new.lengths = kept / kept.sum()
        return new

    def count(self, x: Array) -> Array:
        """Return how many positions hold no filling, int64 ``(*batch,)``.

        :param x: tokens or states, ``(*batch, L)``.
        """
        xp = array_namespace(x)
        return xp.sum(xp.astype(x != self.padding, int64_of(xp)), axis=-1)

    def log_length(self, x: Array) -> Array:
        """Return ``log p(n)`` of sequences, float64 ``(*batch,)``.

        :param x: tokens or states, ``(*batch, L)``.
        :returns: ``-inf`` where a filling stands before a letter, too.
        """
        return self._log_length(x, None)

    def _log_length(self, x: Array, prompt: Array | None) -> Array:
        xp, count = array_namespace(x), self.count(x)
        law = xp.asarray(self.lengths, dtype=float64_of(xp), device=device_of(x))
        law = self._given(law, prompt)
        size = law.shape[-1]
        inside = count < size
        index = xp.where(inside, count, xp.zeros_like(count))
        at = xp.arange(size, device=device_of(x)) == index[..., None]
        p = xp.sum(xp.where(at, law, xp.zeros_like(law)), axis=-1)
        place = xp.arange(x.shape[-1], device=device_of(x))
        whole = xp.all((x != self.padding) == (place < count[..., None]), axis=-1)
        possible = whole & inside & (p > 0)
        log_p = xp.log(xp.where(possible, p, xp.ones_like(p)))
        return xp.where(possible, log_p, xp.full_like(log_p, -xp.inf))

    def _given(self, law: Array, prompt: Array | None) -> Array:
        """Return the law of the lengths that agree with a prompt, ``(*batch, L + 1)``."""
        if prompt is None:
            return law
        xp = array_namespace(law)
        place = xp.arange(prompt.shape[-1], device=device_of(prompt))
        letter = (prompt >= 0) & (prompt != self.padding)
        zero = xp.zeros_like(prompt)
        low = xp.max(xp.where(letter, place + 1, zero), axis=-1)
        high = xp.min(xp.where(prompt == self.padding, place, zero + prompt.shape[-1]), axis=-1)
        sizes = xp.arange(law.shape[-1], device=device_of(prompt))
        agrees = (sizes >= low[..., None]) & (sizes <= high[..., None])
        kept = xp.where(agrees, law, xp.zeros_like(law))
        # A prompt that no length agrees with has no state at all: probability zero throughout.
        total = xp.sum(kept, axis=-1)[..., None]
        return kept / xp.where(total > 0, total, xp.ones_like(total))

    def draw_start(self, noise: Array, prompt: Array | None = None) -> Array:
        """Draw noisiest states: as many masks as a length has, then fillings.

        :param noise: uniforms in ``[0, 1)``, ``(*batch, L)``; the first of each row is used.
        :param prompt: tokens that are there from the start, -1 elsewhere; lengths agree with them.
        """
        xp = array_namespace(noise)
        law = xp.asarray(self.lengths, dtype=float64_of(xp), device=device_of(noise))
        cdf = xp.cumulative_sum(self._given(law, prompt), axis=-1)
        # Of the total, which round-off may leave below one: a length of mass 0 is never reached.
        level = xp.astype(noise[..., :1], cdf.dtype) * cdf[..., -1:]
        count = xp.sum(xp.astype(cdf <= level, int64_of(xp)), axis=-1)
        place = xp.arange(noise.shape[-1], device=device_of(noise))
        masks = self.draw_prior(noise)
        tokens = xp.where(place < count[..., None], masks, xp.full_like(masks, self.padding))
        return tokens if prompt is None else xp.where(prompt >= 0, prompt, tokens)

    def log_start(self, z: Array, prompt: Array | None = None) -> Array:
        """Return the log-probability of noisiest states: that of their lengths.

        :param z: states, ``(*batch, L)``.
        :param prompt: as in :meth:`draw_start`.
        :returns: float64 ``(*batch,)``.
        """
        xp = array_namespace(z)
        masked = (z == self.vocab_size) | (z == self.padding)
        if prompt is not None:
            held = prompt >= 0
            masked = xp.where(held, z == prompt, masked)
        log_p = self._log_length(z, prompt)
        return xp.where(xp.all(masked, axis=-1), log_p, xp.full_like(log_p, -xp.inf))

    def start_of(self, x0: Array) -> Array:
        """Return the noisiest states of clean sequences: their letters hidden."""
        xp = array_namespace(x0)
        return xp.where(x0 == self.padding, x0, xp.full_like(x0, self.vocab_size))

    def shown(self, start: Array, prompt: Array | None = None) -> Array | None:
        """Return the tokens that noisiest states show, -1 elsewhere."""
        xp = array_namespace(start)
        free = xp.full_like(start, -1) if prompt is None else prompt
        return xp.where(start == self.padding, start, free)

    def corrupt(self, x0: Array, alpha: Array, u_keep: Array, u_prior: Array) -> Array:
        """Draw states as :class:`Absorbing` does, with every filling left where it is."""
        xp = array_namespace(x0)
        return xp.where(x0 == self.padding, x0, super().corrupt(x0, alpha, u_keep, u_prior))

    def __repr__(self) -> str:
        known = np.flatnonzero(self.lengths)
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, lengths {known[0]} to "
            f"{known[-1]}, schedule={self.schedule})"
        )
