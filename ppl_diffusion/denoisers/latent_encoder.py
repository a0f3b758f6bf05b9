"""Encoders: what a clean sequence says, as a few vectors of unit variance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppl_diffusion.denoisers._blocks import Block, Stem, rotations
from ppl_diffusion.denoisers.latent_config import LatentConfig

_PACE = 0.01  # of the running mean and variance
_FLOOR = 1e-5  # of a variance that is divided by


class Standardised(nn.Module):
    """Coordinates with mean 0 and variance 1 over the data, each for itself.

    Noise of unit variance is then of the right size whatever the encoder does (unit vectors of
    ``d`` coordinates would have ``1 / d``), and an encoder cannot make its latent easier to predict
    by making it smaller; one that says the same of every sequence says 0.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, values: Tensor, *, learn: bool) -> Tensor:
        """Return standardised values, ``(n, *shape)``.

        :param learn: by the moments of these rows, which the running ones then follow; else by the
            running ones.
        """
        if not learn or len(values) < 2:
            return (values - self.mean) / (self.variance + _FLOOR).sqrt()
        variance, mean = torch.var_mean(values, dim=0, correction=0)
        self._follow(mean.detach(), variance.detach())
        return (values - mean) / (variance + _FLOOR).sqrt()

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.seen += 1  # a plain mean at first: the random start is forgotten at once
        pace = max(_PACE, 1.0 / float(self.seen))
        self.mean.lerp_(mean, pace)
        self.variance.lerp_(variance, pace)


class LatentEncoder(nn.Module):
    """A bidirectional transformer over clean tokens and ``N`` learned queries.

    :param config: shape of the network it belongs to.
    """

    rotation: Tensor

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        shape = config.reader
        self.hidden_token = config.vocab_size
        self.stem = Stem(shape)
        self.queries = nn.Parameter(torch.randn(config.num_slots, config.dim))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, config.latent_dim)
        self.scale = Standardised(config.num_slots, config.latent_dim)
        self.register_buffer("rotation", rotations(shape), persistent=False)

    def forward(
        self, tokens: Tensor, visible: Tensor | None = None, *, learn: bool = False
    ) -> Tensor:
        """Return ``N`` vectors per sequence, float32 ``(n, N, d)``.

        :param tokens: clean tokens, int64 ``(n, L)``.
        :param visible: bool ``(n, L)``, which tokens the encoder sees; all if None.
        :param learn: whether the scale follows these rows.
        """
        values: Tensor = self.scale(self.raw(tokens, visible), learn=learn)
        return values

    def raw(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the vectors before they are scaled, ``(n, N, d)``."""
        if visible is not None:
            tokens = tokens.masked_fill(~visible, self.hidden_token)
        queries = self.queries.expand(len(tokens), -1, -1)
        state = torch.cat([self.stem(tokens), queries], dim=1)
        rotation = self._turned(tokens.shape[1])
        for block in self.blocks:
            state = block(state, rotation, None)
        output: Tensor = self.output(self.norm(state[:, tokens.shape[1] :]))
        return output

    def _turned(self, length: int) -> Tensor:
        # Queries have no position: the first, at which nothing is turned, leaves them as they are.
        still = self.rotation[:1].expand(len(self.queries), -1, -1)
        return torch.cat([self.rotation[:length], still])
