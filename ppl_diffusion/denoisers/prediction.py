"""What a denoiser says about every site, computed only where somebody asks.

A step needs the probabilities of two tokens per site to be scored, and rows of the vocabulary only
at the sites that draw from the denoiser. With a large vocabulary the table of all rows is the
largest thing there is, so a denoiser that offers ``hidden`` and ``head`` is kept as hidden states,
and the head runs on gathered rows, in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.processes.noise import draw_categorical

CHUNK = 2**22
"""Log-probabilities held at once while the head runs on gathered rows (32 MB)."""


class Prediction(ABC):
    """Normalised cavity log-probabilities of every site, shape ``(*batch, L, V)``.

    :ivar shape: ``(*batch, L, V)``.
    """

    shape: torch.Size

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the whole table, ``(*batch, L, V)``."""

    @abstractmethod
    def probabilities(self, ids: Tensor, where: Tensor) -> Tensor:
        """Return the probabilities of some tokens at some sites.

        :param ids: clean token ids, int64 ``(*batch, L, m)``.
        :param where: bool ``(*batch, L)``, the sites that matter.
        :returns: float64 ``(*batch, L, m)``, zero elsewhere.
        """

    @abstractmethod
    def draw(self, uniforms: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
        """Return tokens drawn at some sites, and what was there elsewhere.

        :param uniforms: numbers in ``[0, 1)``, ``(*batch, L)``.
        :param where: bool ``(*batch, L)``, the sites that draw.
        :param otherwise: int64 ``(*batch, L)``.
        """

    @abstractmethod
    def expand(self, batch_shape: Sequence[int]) -> Prediction:
        """Return the same prediction for a larger batch."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether a gradient flows into the prediction."""


class DensePrediction(Prediction):
    """A prediction that is a table.

    :param log_probs: ``(*batch, L, V)``.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        self.shape = log_probs.shape

    def dense(self) -> Tensor:
        """Return the table itself."""
        return self.log_probs

    def probabilities(self, ids: Tensor, where: Tensor) -> Tensor:
        """Return probabilities of tokens, see :class:`Prediction`."""
        picked = self.log_probs.gather(-1, ids).to(torch.float64).exp()
        return torch.where(where[..., None], picked, 0.0)

    def draw(self, uniforms: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
        """Draw tokens at some sites, see :class:`Prediction`."""
        drawn = draw_categorical(self.log_probs[where], uniforms[where])
        return otherwise.masked_scatter(where, drawn)

    def expand(self, batch_shape: Sequence[int]) -> DensePrediction:
        """Return the same prediction for a larger batch."""
        return DensePrediction(self.log_probs.expand(*batch_shape, *self.shape[-2:]))

    @property
    def requires_grad(self) -> bool:
        """Whether the table requires a gradient."""
        return self.log_probs.requires_grad


class HeadPrediction(Prediction):
    """A prediction kept as hidden states; the head runs where it is needed.

    :param hidden: hidden states, ``(*batch, L, D)``.
    :param head: turns rows ``(n, D)`` into checked, normalised float64 log-probabilities
        ``(n, V)``.
    """

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        self.hidden, self.head = hidden, head
        self.shape = torch.Size((*hidden.shape[:-1], vocab_size))

    def dense(self) -> Tensor:
        """Return the whole table; this is what the class exists to avoid."""
        return self.head(self.hidden.flatten(0, -2)).reshape(self.shape)

    def probabilities(self, ids: Tensor, where: Tensor) -> Tensor:
        """Return probabilities of tokens, see :class:`Prediction`."""
        chosen = self.hidden[where].split(self._rows), ids[where].split(self._rows)
        parts = [self.head(h).gather(-1, i).exp() for h, i in zip(*chosen, strict=True)]
        out = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        return out.index_put((where,), torch.cat(parts)) if parts else out

    def draw(self, uniforms: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
        """Draw tokens at some sites, see :class:`Prediction`."""
        chosen = self.hidden[where].split(self._rows), uniforms[where].split(self._rows)
        parts = [draw_categorical(self.head(h), u) for h, u in zip(*chosen, strict=True)]
        return otherwise.masked_scatter(where, torch.cat(parts)) if parts else otherwise

    def expand(self, batch_shape: Sequence[int]) -> HeadPrediction:
        """Return the same prediction for a larger batch."""
        hidden = self.hidden.expand(*batch_shape, *self.hidden.shape[-2:])
        return HeadPrediction(hidden, self.head, self.shape[-1])

    @property
    def requires_grad(self) -> bool:
        """Whether the hidden states, or one row out of the head, require a gradient."""
        with torch.enable_grad():
            row = self.head(self.hidden.flatten(0, -2)[:1])
        return row.requires_grad

    @property
    def _rows(self) -> int:
        return max(1, CHUNK // self.shape[-1])


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
