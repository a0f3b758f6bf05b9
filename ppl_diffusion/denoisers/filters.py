"""Filters: denoisers whose predictions are sharpened or cut off, row by row.

A filter changes what a chain samples from, so it changes the *model*: a chain around a filtered
denoiser has the filtered law as its own, exactly scored, and says so in its ``changes``. It works
on single rows of log-probabilities, after the vocabulary head, so a denoiser that can evaluate its
head at a few positions still can. Filters compose; the innermost acts first. A filtered row is
always a distribution, so what the network returned is checked before, by the rules of the kernels.

Filtered and unfiltered denoisers have different supports: as the proposal of an unfiltered chain a
nucleus misses mass, and no weight brings it back (the target must carry the same filter). Such a
denoiser says so by ``excludes_tokens``, so that proposals can be checked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Denoiser, Wrapper
from ppl_diffusion.denoisers.checks import clean_log_probs
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.errors import CapabilityError


class Filter(Wrapper, ABC):
    """Base of the filters: the wrapped denoiser with :meth:`filter_rows` behind its head.

    ``hidden``, ``head``, ``hidden_size``, ``process`` and ``parameters`` exist where the wrapped
    denoiser has them.

    :param denoiser: what to filter; a ``"posterior"`` denoiser is filtered before kernels convert
        it.
    :raises CapabilityError: if the denoiser returns more than one distribution per position.

    :ivar excludes_tokens: whether tokens may be excluded that the network allows.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        size = getattr(denoiser, "output_size", denoiser.vocab_size)
        if size != denoiser.vocab_size:
            raise CapabilityError(
                f"{type(self).__name__}: {denoiser!r} returns several distributions per position; "
                "filter each of its parts instead."
            )
        self.denoiser = denoiser
        self.excludes_tokens: bool = getattr(denoiser, "excludes_tokens", False)
        self.adopt(denoiser, "process", "network_rows", "rows_per_call", "conditions")
        if has_head(denoiser):
            self.adopt(denoiser, "hidden", "hidden_size")
            vars(self)["head"] = self._filtered_head

    @property
    @abstractmethod
    def change(self) -> str | None:
        """What the filter does to the law, in one phrase; None where it does nothing."""

    @property
    def changes(self) -> tuple[str, ...]:
        """What this and all wrapped filters do to the law, innermost first."""
        own = () if self.change is None else (self.change,)
        return (*getattr(self.denoiser, "changes", ()), *own)

    @abstractmethod
    def filter_rows(self, log_probs: Tensor) -> Tensor:
        """Filter rows of log-probabilities.

        :param log_probs: normalised log-probabilities of clean tokens, float64 ``(..., V)``.
        :returns: normalised log-probabilities, float64, same shape.
        """

    def filter_output(self, log_probs: Tensor, shape: Sequence[int]) -> Tensor:
        """Check what a denoiser returned, and filter it.

        :param log_probs: ``(*shape, V)``, or ``(*shape, V + 1)`` with a last column for the mask.
        :param shape: shape of the states, ``(*batch, L)``, or of gathered rows, ``(n,)``.
        :returns: ``(*shape, V)``; the same tensor, unchecked, where the filter does nothing.
        :raises TypeError: if the output is no tensor.
        :raises ValueError: if it has the wrong shape, is NaN or is not normalised.
        """
        if self.change is None:
            return log_probs
        return self.filter_rows(clean_log_probs(log_probs, shape, self.vocab_size))

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return filtered log-probabilities, shape ``(*batch, L, V)``.

        :raises TypeError: if the wrapped denoiser returns no tensor.
        :raises ValueError: if it returns the wrong shape, NaN or unnormalised rows.
        """
        return self.filter_output(self.denoiser(tokens, t, **given), tokens.shape)

    def _filtered_head(self, hidden: Tensor) -> Tensor:
        rows = self.denoiser.head(hidden)  # type: ignore[attr-defined]
        return self.filter_output(rows, hidden.shape[:-1])


class Temperature(Filter):
    """Raise every prediction to the power ``1 / temperature`` and renormalise.

    :param temperature: positive; below 1 sharpens, above 1 flattens, 1 does nothing. Tokens of
        probability zero keep it, and ties stay ties.
    :raises ValueError: if the temperature is not a positive number.
    """

    def __init__(self, denoiser: Denoiser, temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"Temperature: temperature must be positive and finite, got {temperature}."
            )
        super().__init__(denoiser)
        self.temperature = float(temperature)

    @property
    def change(self) -> str | None:
        """The temperature, in words."""
        return None if self.temperature == 1 else f"temperature {self.temperature:g}"

    def filter_rows(self, log_probs: Tensor) -> Tensor:
        """Return ``log_softmax(log_probs / temperature)``."""
        # The top goes to zero first: dividing it by a tiny temperature would overflow.
        below = log_probs - log_probs.amax(-1, keepdim=True)
        return torch.log_softmax(below / self.temperature, -1)

    def __repr__(self) -> str:
        return f"Temperature({self.denoiser!r}, {self.temperature:g})"


class LettersOnly(Filter):
    """Give the last token probability zero and renormalise: it fills sequences up, and is no guess.

    For networks that were not built with ``num_padding``. It is part of what a prior over lengths
    is, and no departure from it.

    :param denoiser: what to filter.
    """

    num_padding = 1

    @property
    def change(self) -> str | None:
        """None: the law of lengths is the prior's own."""
        return None

    def filter_output(self, log_probs: Tensor, shape: Sequence[int]) -> Tensor:
        """Check what a denoiser returned, and filter it."""
        return self.filter_rows(clean_log_probs(log_probs, shape, self.vocab_size))

    def filter_rows(self, log_probs: Tensor) -> Tensor:
        """Return the rows with the last token at ``-inf``."""
        last = torch.arange(self.vocab_size, device=log_probs.device) == self.vocab_size - 1
        return torch.log_softmax(log_probs.masked_fill(last, -torch.inf), -1)

    def __repr__(self) -> str:
        return f"LettersOnly({self.denoiser!r})"


class Nucleus(Filter):
    """Keep the most probable tokens of total mass ``p`` and renormalise (top-p).

    Two conventions are in use (Holtzman et al. 2020, arXiv:1904.09751, keeps the token that crosses
    ``p``; the code of ReMDM and BD3-LM, arXiv:2503.00307 and 2503.09573, drops it). Equal
    probabilities are ranked by id, the lower first, so that the cut depends on nothing else.

    :param p: mass to keep, in ``(0, 1]``; 1 does nothing.
    :param keep_crossing: keep the token with which the mass reaches ``p``, hence at least ``p`` of
        it; otherwise drop it, hence at most ``p``, but never the most probable token.
    :raises ValueError: if ``p`` is outside ``(0, 1]``.
    """

    def __init__(self, denoiser: Denoiser, p: float, *, keep_crossing: bool = True) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"Nucleus: p must lie in (0, 1], got {p}.")
        super().__init__(denoiser)
        self.p, self.keep_crossing = float(p), keep_crossing
        self.excludes_tokens = self.excludes_tokens or self.p < 1

    @property
    def change(self) -> str | None:
        """The nucleus, in words."""
        return None if self.p == 1 else f"nucleus {self.p:g}"

    def filter_rows(self, log_probs: Tensor) -> Tensor:
        """Return the rows with everything outside the nucleus at ``-inf``."""
        ordered, order = log_probs.detach().sort(dim=-1, descending=True, stable=True)
        kept = self._kept(ordered.softmax(-1).cumsum(-1))
        inside = torch.zeros_like(kept).scatter(-1, order, kept)
        return torch.log_softmax(log_probs.masked_fill(~inside, -torch.inf), -1)

    def _kept(self, mass: Tensor) -> Tensor:
        """Return which ranks stay, given the mass up to and including each."""
        if self.keep_crossing:
            return F.pad(mass[..., :-1], (1, 0)) < self.p
        kept = mass <= self.p
        kept[..., 0] = True
        return kept

    def __repr__(self) -> str:
        crossing = "" if self.keep_crossing else ", keep_crossing=False"
        return f"Nucleus({self.denoiser!r}, {self.p:g}{crossing})"


def peel(denoiser: Denoiser) -> tuple[Denoiser, list[Filter]]:
    """Return the denoiser below all filters, and the filters in the order in which they act.

    :param denoiser: a denoiser, filtered or not.
    """
    filters: list[Filter] = []
    while isinstance(denoiser, Filter):
        filters.append(denoiser)
        denoiser = denoiser.denoiser
    return denoiser, filters[::-1]
