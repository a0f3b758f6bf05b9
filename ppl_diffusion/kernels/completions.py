"""Completions of unfinished states: what a look-ahead asks the potential about.

Positions are completed independently, by the posterior mean ``p(x0 | x_k)``. Of an absorbing
process that is the prediction at the masked sites and the token itself at the others, so that only
the former are asked for; in general every site is, in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ppl_diffusion.denoisers.prediction import Prediction
from ppl_diffusion.processes.base import Process
from ppl_diffusion.processes.mixture import log_posterior_mean
from ppl_diffusion.processes.noise import draw_categorical


class Completions(ABC):
    """The clean sequences that states ``(*batch, L)`` may become."""

    @abstractmethod
    def likeliest(self) -> Tensor:
        """Return the likeliest token of every site, int64 ``(*batch, L)``."""

    @abstractmethod
    def draw(self, uniforms: Tensor) -> Tensor:
        """Return completions, int64, shaped like the uniforms.

        :param uniforms: numbers in ``[0, 1)``, ``(*batch, L, m)``, of ``m`` completions.
        """

    @abstractmethod
    def allow(self, tokens: Tensor) -> Tensor:
        """Return which sites may become given tokens, bool ``(*batch, L)``.

        :param tokens: clean tokens, int64, broadcastable to ``(*batch, L)``.
        """


class TableCompletions(Completions):
    """Completions of states whose law is a table.

    :param log_x0: ``log p(x0 | x_k)`` per site, ``(*batch, L, V)``.
    """

    def __init__(self, log_x0: Tensor) -> None:
        self.log_x0 = log_x0

    def likeliest(self) -> Tensor:
        """Return the likeliest tokens, see :class:`Completions`."""
        return self.log_x0.argmax(-1)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw completions, see :class:`Completions`."""
        drawn: Tensor = draw_categorical(self.log_x0[..., None, :], uniforms)
        return drawn

    def allow(self, tokens: Tensor) -> Tensor:
        """Return where tokens are possible, see :class:`Completions`."""
        ids = tokens.expand(self.log_x0.shape[:-1])[..., None]
        return self.log_x0.gather(-1, ids)[..., 0] > -torch.inf


class MaskedCompletions(Completions):
    """Completions of states of an absorbing process: the prediction where a site is masked.

    :param tokens: states, int64 ``(*batch, L)``.
    :param prediction: of the clean tokens, ``(*batch, L, V)``; it is asked for at masked sites.
    :param sites: the masked sites as indices into the flattened states, where they are known.
    """

    def __init__(self, tokens: Tensor, prediction: Prediction, sites: Tensor | None = None) -> None:
        self.tokens, self.prediction = tokens, prediction
        self.masked = tokens == prediction.shape[-1] if sites is None else sites

    def likeliest(self) -> Tensor:
        """Return the likeliest tokens, see :class:`Completions`."""
        with torch.no_grad():
            return self.prediction.likeliest(self.masked, self.tokens)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw completions, see :class:`Completions`."""
        known = self.tokens[..., None].expand(uniforms.shape)
        with torch.no_grad():
            return self.prediction.draw(uniforms, self.masked, known)

    def allow(self, tokens: Tensor) -> Tensor:
        """Return where tokens are possible, see :class:`Completions`."""
        ids = tokens.expand(self.tokens.shape)
        found = (self.tokens == ids).flatten()
        with torch.no_grad():
            for sites, log_c in self.prediction.rows(self.masked):
                own = log_c.gather(-1, ids.reshape(-1)[sites][:, None])[:, 0]
                found[sites] = own > -torch.inf
        return found.reshape(ids.shape)


class BridgedCompletions(Completions):
    """Completions of states of any process: the bridge taken all the way to the clean tokens.

    :param process: forward process.
    :param tokens: states, int64 ``(*batch, L)``.
    :param prediction: of the clean tokens, ``(*batch, L, V)``.
    :param alpha: signal level of the states.
    """

    def __init__(
        self, process: Process, tokens: Tensor, prediction: Prediction, alpha: float
    ) -> None:
        self.process, self.tokens, self.prediction = process, tokens, prediction
        self.alpha = alpha

    def likeliest(self) -> Tensor:
        """Return the likeliest tokens, see :class:`Completions`."""
        found = [table.likeliest() for _, table in self._tables()]
        return torch.cat(found).reshape(self.tokens.shape)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw completions, see :class:`Completions`."""
        noise = uniforms.reshape(-1, uniforms.shape[-1])
        drawn = [table.draw(noise[sites]) for sites, table in self._tables()]
        return torch.cat(drawn).reshape(uniforms.shape)

    def allow(self, tokens: Tensor) -> Tensor:
        """Return where tokens are possible, see :class:`Completions`."""
        ids = tokens.expand(self.tokens.shape).reshape(-1)
        found = [table.allow(ids[sites]) for sites, table in self._tables()]
        return torch.cat(found).reshape(self.tokens.shape)

    def _tables(self) -> Iterator[tuple[Tensor, TableCompletions]]:
        states = self.tokens.reshape(-1)
        for sites, log_c in self.prediction.rows(None):
            mean = log_posterior_mean(self.process, states[sites], log_c, self.alpha)
            yield sites, TableCompletions(mean)
