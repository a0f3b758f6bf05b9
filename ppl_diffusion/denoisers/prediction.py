"""What a denoiser says about every site, computed only where somebody asks.

A step needs the probabilities of two tokens per site to be scored, and rows of the vocabulary only
at the sites that draw from the denoiser. With a large vocabulary the table of all rows is the
largest thing there is, so a denoiser that offers ``hidden`` and ``head`` is kept as hidden states,
and the head runs on gathered rows, in chunks. A table is kept as the network returned it. Either
way rows are normalised, and refused if they are no distributions, where they are asked for: a row
that nobody uses is never looked at.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.checks import (
    clean_log_probs,
    deviation,
    log_total,
    require_normalised,
    without_mask,
)
from ppl_diffusion.processes.noise import draw_categorical, draw_normalised, likeliest

CHUNK = 2**22
"""Log-probabilities held at once while rows are made of gathered sites (32 MB)."""


class Rows(NamedTuple):
    """The predictions of some sites.

    :ivar sites: their places among all sites, int64 ``(n,)``.
    :ivar log_probs: float64 ``(n, V)``.
    """

    sites: Tensor
    log_probs: Tensor


class Prediction(ABC):
    """Normalised cavity log-probabilities of every site, shape ``(*batch, L, V)``.

    :ivar shape: ``(*batch, L, V)``.
    """

    shape: torch.Size

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the whole table, ``(*batch, L, V)``."""

    @abstractmethod
    def probabilities(self, ids: Tensor, where: Tensor | None) -> Tensor:
        """Return the probabilities of some tokens at some sites.

        :param ids: clean token ids, int64 ``(*batch, L, m)``.
        :param where: bool ``(*batch, L)``, the sites that matter; None for all of them.
        :returns: float64 ``(*batch, L, m)``, zero elsewhere.
        """

    @abstractmethod
    def rows(self, where: Tensor | None) -> Iterator[Rows]:
        """Return the predictions of some sites, normalised, in chunks.

        :param where: bool ``(*batch, L)``, or indices into the flattened ``(*batch, L)``, int64
            ``(n,)``; None for all of them.
        """

    def draw_at(self, sites: Tensor, uniforms: Tensor) -> Tensor:
        """Return one token drawn at each of some sites, int64 ``(n,)``.

        :param sites: indices into the flattened ``(*batch, L)``, int64 ``(n,)``.
        :param uniforms: numbers in ``[0, 1)``, ``(n,)``.
        """
        drawn, begun = [sites.new_zeros(0)], 0
        for own, log_c in self.rows(sites):
            drawn.append(draw_categorical(log_c, uniforms[begun : begun + len(own)]))
            begun += len(own)
        return torch.cat(drawn)

    def draw(self, uniforms: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
        """Return tokens drawn at some sites, and what was there elsewhere.

        :param uniforms: numbers in ``[0, 1)``, ``(*batch, L)``, or ``(*batch, L, m)`` for as many
            draws from each row.
        :param where: the sites that draw, bool or indices as in :meth:`rows`.
        :param otherwise: int64, shaped like the uniforms.
        """
        lead = self.shape[:-1]
        many = uniforms.ndim > len(lead)
        noise = uniforms.reshape(lead.numel(), -1) if many else uniforms.reshape(-1)
        out = otherwise.clone(memory_format=torch.contiguous_format)
        flat = out.view(noise.shape)
        for sites, log_c in self.rows(where):
            own = log_c[:, None] if many else log_c
            flat.index_copy_(0, sites, draw_categorical(own, noise.index_select(0, sites)))
        return out

    def likeliest(self, where: Tensor, otherwise: Tensor) -> Tensor:
        """Return the likeliest token at some sites, and what was there elsewhere.

        :param where: the sites, bool or indices as in :meth:`rows`.
        :param otherwise: int64 ``(*batch, L)``.
        """
        out = otherwise.clone(memory_format=torch.contiguous_format)
        for sites, log_c in self.rows(where):
            out.view(-1).index_copy_(0, sites, log_c.argmax(-1))
        return out

    @abstractmethod
    def expand(self, batch_shape: Sequence[int]) -> Self:
        """Return the same prediction for a larger batch."""

    @abstractmethod
    def placed(self, rows: Tensor, batch_shape: Sequence[int]) -> Self:
        """Return a prediction for a batch of which this one has some rows; others are arbitrary.

        :param rows: their places among the rows of the batch, int64 ``(n,)``.
        """

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether a gradient flows into the prediction."""


class _Kept(Prediction):
    """A prediction whose rows are made of something that is kept per site.

    :param kept: ``(*batch, L, anything)``.
    :param vocab_size: clean tokens ``V``.
    :param raw: whether the rows are what a network returned: normalised and checked when asked for.
    """

    def __init__(self, kept: Tensor, vocab_size: int, raw: bool) -> None:
        self._kept, self._raw = kept, raw
        self.shape = torch.Size((*kept.shape[:-1], vocab_size))

    @abstractmethod
    def _output(self, kept: Tensor) -> Tensor:
        """Return the output of the network at some sites, ``(n, V)`` or with the mask behind."""

    def _log_probs(self, kept: Tensor) -> Tensor:
        output = self._output(kept)
        return self._cleaned(output, kept) if self._raw else output

    def _cleaned(self, output: Tensor, kept: Tensor) -> Tensor:
        return clean_log_probs(output, kept.shape[:-1], self.shape[-1])

    def _sites(self, where: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Return places, int64 ``(n,)``, and what is kept there, in chunks."""
        kept, lead = self._kept, self.shape[:-1]
        if where is None:
            sites = torch.arange(lead.numel(), device=kept.device)
        elif where.dtype != torch.bool:
            sites = where
        else:  # the one read of the device: how many sites there are
            sites = where.reshape(-1).nonzero()[:, 0]
        flat = kept.view(-1, kept.shape[-1]) if kept.is_contiguous() else None
        for part in sites.split(max(1, CHUNK // self.shape[-1])):
            # An expanded table is never copied as a whole.
            here = torch.unravel_index(part, lead) if flat is None else None
            yield part, kept[here] if flat is None else flat.index_select(0, part)

    def rows(self, where: Tensor | None) -> Iterator[Rows]:
        """Return the predictions of some sites, see :class:`Prediction`."""
        return (Rows(sites, self._log_probs(own)) for sites, own in self._sites(where))

    def dense(self) -> Tensor:
        """Return the whole table, ``(*batch, L, V)``."""
        return self._log_probs(self._kept.flatten(0, -2)).reshape(self.shape)

    def draw_at(self, sites: Tensor, uniforms: Tensor) -> Tensor:
        """Draw tokens, see :class:`Prediction`; rows are drawn from and checked as they come."""
        if not self._raw:
            return super().draw_at(sites, uniforms)
        drawn, begun = [sites.new_zeros(0)], 0
        for part, own in self._sites(sites):
            output = without_mask(self._output(own), part.shape, self.shape[-1])
            tokens, total = draw_normalised(output, uniforms[begun : begun + len(part)])
            if len(total):
                require_normalised((total - 1).abs().amax())
            drawn.append(tokens)
            begun += len(part)
        return torch.cat(drawn)

    def probabilities(self, ids: Tensor, where: Tensor | None) -> Tensor:
        """Return probabilities of tokens, see :class:`Prediction`."""
        flat = ids.reshape(-1, ids.shape[-1])
        found = [
            (sites, self._picked(own, flat.index_select(0, sites)))
            for sites, own in self._sites(where)
        ]
        out = torch.zeros(flat.shape, dtype=torch.float64, device=ids.device)
        if not found:
            return out.reshape(ids.shape)
        sites, parts = zip(*found, strict=True)
        return out.index_copy(0, torch.cat(sites), torch.cat(parts)).reshape(ids.shape)

    def _picked(self, kept: Tensor, ids: Tensor) -> Tensor:
        output = self._output(kept)
        if not self._raw:
            return output.gather(-1, ids).to(torch.float64).exp()
        output = without_mask(output, kept.shape[:-1], self.shape[-1])
        return (output.gather(-1, ids).to(torch.float64) - log_total(output)).exp()

    def likeliest(self, where: Tensor, otherwise: Tensor) -> Tensor:
        """Return the likeliest tokens, see :class:`Prediction`; rows are never made float64."""
        out = otherwise.clone(memory_format=torch.contiguous_format)
        for sites, own in self._sites(where):
            out.view(-1).index_copy_(0, sites, self._largest(own))
        return out

    def _largest(self, kept: Tensor) -> Tensor:
        output = self._output(kept)
        if self._raw:
            output = without_mask(output, kept.shape[:-1], self.shape[-1])
            if output.dtype == torch.float64:
                # Normalising rounds what is almost a tie to one, of which the first wins.
                output = self._cleaned(output, kept)
            else:
                own = output.to(torch.promote_types(output.dtype, torch.float32))
                require_normalised(deviation(own.detach().exp().sum(-1)))
        return likeliest(output)


class DensePrediction(_Kept):
    """A prediction that is a table.

    :param log_probs: ``(*batch, L, V)``.
    :param raw: whether this is what a network returned, perhaps with a last column for the mask:
        rows are then normalised in float64, and refused if they are no distributions, where they
        are asked for, and a row that nobody uses is not checked.
    :param vocab_size: clean tokens ``V``, where there may be a column for the mask.
    """

    def __init__(
        self, log_probs: Tensor, *, raw: bool = False, vocab_size: int | None = None
    ) -> None:
        super().__init__(log_probs, log_probs.shape[-1] if vocab_size is None else vocab_size, raw)

    def _output(self, kept: Tensor) -> Tensor:
        return kept

    @property
    def log_probs(self) -> Tensor:
        """The whole table, ``(*batch, L, V)``."""
        return self.dense()

    def dense(self) -> Tensor:
        """Return the whole table; what had to be normalised is from then on kept that way."""
        if self._raw:
            table = clean_log_probs(self._kept, self.shape[:-1], self.shape[-1])
            if self._kept.requires_grad and not torch.is_grad_enabled():
                return table
            self._kept, self._raw = table, False
        return self._kept

    def expand(self, batch_shape: Sequence[int]) -> DensePrediction:
        """Return the same prediction for a larger batch."""
        if torch.Size(batch_shape) == self.shape[:-2]:
            return self
        kept = self._kept.expand(*batch_shape, *self._kept.shape[-2:])
        return DensePrediction(kept, raw=self._raw, vocab_size=self.shape[-1])

    def placed(self, rows: Tensor, batch_shape: Sequence[int]) -> DensePrediction:
        """Return a prediction for a larger batch, see :class:`Prediction`; flat elsewhere."""
        flat = -math.log(self._kept.shape[-1])
        kept = _placed(self._kept, rows, batch_shape, flat)
        return DensePrediction(kept, raw=self._raw, vocab_size=self.shape[-1])

    @property
    def requires_grad(self) -> bool:
        """Whether the table requires a gradient."""
        return self._kept.requires_grad


class HeadPrediction(_Kept):
    """A prediction kept as hidden states; the head runs where it is needed.

    :param hidden: hidden states, ``(*batch, L, D)``.
    :param head: turns rows ``(n, D)`` into log-probabilities ``(n, V)``.
    :param raw: whether the head is that of a network, whose rows must be normalised and checked,
        see :class:`DensePrediction`; if not they are normalised float64.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        vocab_size: int,
        *,
        raw: bool = False,
    ) -> None:
        super().__init__(hidden, vocab_size, raw)
        self.hidden, self.head = hidden, head

    def _output(self, kept: Tensor) -> Tensor:
        return self.head(kept)

    def expand(self, batch_shape: Sequence[int]) -> HeadPrediction:
        """Return the same prediction for a larger batch."""
        if torch.Size(batch_shape) == self.shape[:-2]:
            return self
        hidden = self.hidden.expand(*batch_shape, *self.hidden.shape[-2:])
        return HeadPrediction(hidden, self.head, self.shape[-1], raw=self._raw)

    def placed(self, rows: Tensor, batch_shape: Sequence[int]) -> HeadPrediction:
        """Return a prediction for a larger batch, see :class:`Prediction`."""
        hidden = _placed(self.hidden, rows, batch_shape, 0.0)
        return HeadPrediction(hidden, self.head, self.shape[-1], raw=self._raw)

    @property
    def requires_grad(self) -> bool:
        """Whether the hidden states, or one row out of the head, require a gradient."""
        with torch.enable_grad():
            row = self.head(self.hidden.flatten(0, -2)[:1])
        return row.requires_grad


def _placed(kept: Tensor, rows: Tensor, batch_shape: Sequence[int], level: float) -> Tensor:
    whole = kept.new_full((math.prod(batch_shape), *kept.shape[1:]), level)
    return whole.index_copy_(0, rows, kept).reshape(*batch_shape, *kept.shape[1:])


def as_prediction(log_probs: Tensor | Prediction) -> Prediction:
    """Return a table as a prediction, and a prediction as itself.

    :param log_probs: ``(*batch, L, V)``.
    """
    return log_probs if isinstance(log_probs, Prediction) else DensePrediction(log_probs)


def has_head(denoiser: Denoiser) -> bool:
    """Return whether a denoiser can compute the vocabulary for chosen positions only."""
    return hasattr(denoiser, "hidden") and hasattr(denoiser, "head")


def prefers_head(denoiser: Denoiser) -> bool:
    """Return whether hidden states are smaller than the table of the vocabulary."""
    width = getattr(denoiser, "hidden_size", None)
    return has_head(denoiser) and width is not None and width < denoiser.vocab_size
