"""A transformer of two streams that predicts clean tokens and a clean latent at once.

Tokens and slots have their own weights and attend to each other (LADD, arXiv 2510.18114; the block
is that of Esser et al. 2024, arXiv 2403.03206). They are told the noise level of the latent; that
of the tokens is not told, as the best prediction from masked tokens does not depend on it. Where
the latent is all noise the network is an ordinary masked denoiser.

The encoder that turns a clean sequence into its latent, and the vectors that stand for codes, are
parts of the network: one file holds them all.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers._blocks import AdaptiveNorm, Stem, TimeEmbedding, per_row, rotations
from ppl_diffusion.denoisers._two_streams import TwoStreamBlock
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.batching import rows_that_fit
from ppl_diffusion.denoisers.files import SavedNetwork
from ppl_diffusion.denoisers.hidden_states import HiddenStatesEncoder
from ppl_diffusion.denoisers.latent_config import LatentConfig
from ppl_diffusion.denoisers.latent_encoder import LatentEncoder
from ppl_diffusion.denoisers.quantiser import nearest, unit_codes


class LatentTransformer(SavedNetwork):
    """Denoiser of tokens and of a latent beside them, with its own encoder.

    Parameters and outputs are float32 whatever torch's default dtype is.

    :param config: its shape.
    :param encoder: a pretrained encoder in place of its own; it is saved with the network.

    :ivar latent: what the latent is, ``N`` codes or ``N`` vectors.
    :ivar conditions: what the output depends on besides tokens: the latent and its noise level.
    :ivar hidden_size: width of the rows that the heads read.
    :ivar encoder: what reads clean sequences, :meth:`encode` in raw vectors.
    :ivar codebook: vectors of the codes, float32 ``(K, d)``; absent in a continuous latent.
    """

    config_class = LatentConfig
    config: LatentConfig
    rotation: Tensor
    codebook: Tensor

    def __init__(self, config: LatentConfig, encoder: HiddenStatesEncoder | None = None) -> None:
        super().__init__()
        if encoder is not None:
            config = dataclasses.replace(config, encoder=encoder.description)
        self.config = config
        self.vocab_size, self.hidden_size = config.vocab_size, config.dim
        self.kind: Kind = "cavity"
        self.time_free = True
        self.latent = config.latent
        self.conditions = {"latent": len(self.latent.event_shape), "latent_time": 0}
        trunk = config.trunk
        self.stem, self.time = Stem(trunk), TimeEmbedding(config.dim)
        # Two layers, not one: the first layer norm would erase how noisy a vector looks.
        self.inputs = nn.Sequential(
            nn.Linear(config.latent_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.slots = nn.Parameter(torch.randn(config.num_slots, config.dim))
        self._make_codes()
        self.blocks = nn.ModuleList(TwoStreamBlock(trunk) for _ in range(config.depth))
        self.norm = AdaptiveNorm(config.dim, conditioned=config.adaptive)
        self.latent_norm = AdaptiveNorm(config.dim, conditioned=config.adaptive)
        self.vocabulary = _silent(config.dim, config.vocab_size)
        self.prediction = _silent(config.dim, config.num_codes or config.latent_dim)
        self.encoder = encoder or _encoder(config)
        self.register_buffer("rotation", rotations(trunk), persistent=False)
        self.to(torch.float32)

    def _make_codes(self) -> None:
        config = self.config
        if config.num_codes is None:
            return
        self.hole = nn.Parameter(torch.randn(config.latent_dim))
        codes = unit_codes(torch.randn(config.num_codes, config.latent_dim))
        if config.quantiser == "gumbel":
            self.register_parameter("codebook", nn.Parameter(codes))
        else:  # whoever trains it writes here
            self.register_buffer("codebook", codes)

    def joint(
        self, tokens: Tensor, t: float | Tensor, *, latent: Tensor, latent_time: float | Tensor
    ) -> Tensor:
        """Return one row per token and one per slot, float32 ``(*batch, L + N, dim)``.

        :param tokens: states, int64 ``(*batch, L)``; the mask has the id ``V``.
        :param t: level of the tokens, which is not read.
        :param latent: int64 ``(*batch, N)`` with holes ``K``, or float ``(*batch, N, d)``.
        :param latent_time: noise level of the latent, in ``[0, 1]``, a number or ``(*batch,)``.
        :raises ValueError: if a shape is wrong.
        """
        return self.rows(tokens, self.vectors(latent), latent_time)

    def hidden(
        self, tokens: Tensor, t: float | Tensor, *, latent: Tensor, latent_time: float | Tensor
    ) -> Tensor:
        """Return the rows of :meth:`joint` that belong to tokens, ``(*batch, L, dim)``."""
        rows = self.joint(tokens, t, latent=latent, latent_time=latent_time)
        return rows[..., : tokens.shape[-1], :]

    def forward(
        self, tokens: Tensor, t: float | Tensor, *, latent: Tensor, latent_time: float | Tensor
    ) -> Tensor:
        """Return log-probabilities of clean tokens, ``(*batch, L, V)``; as :meth:`joint`."""
        return self.head(self.hidden(tokens, t, latent=latent, latent_time=latent_time))

    def head(self, rows: Tensor) -> Tensor:
        """Return normalised log-probabilities of clean tokens, ``(..., V)``."""
        return F.log_softmax(self.vocabulary(rows).float(), dim=-1)

    def latent_head(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of codes, ``(..., K)``, or the clean latent, ``(..., d)``.

        There is no column for a hole: what is predicted is clean.
        """
        predicted = self.prediction(rows).float()
        return predicted if self.latent.dim is not None else F.log_softmax(predicted, dim=-1)

    def vectors(self, latent: Tensor) -> Tensor:
        """Return what the network reads of a latent, float32 ``(*batch, N, d)``.

        :raises ValueError: if its shape is wrong.
        """
        shape = self.latent.event_shape
        if tuple(latent.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"LatentTransformer: a latent of this network ends in {shape}, but was given "
                f"{tuple(latent.shape)}."
            )
        if self.latent.num_codes is None:
            return latent.to(torch.float32)
        return F.embedding(latent, torch.cat([self.codebook, self.hole[None]]))

    def rows(self, tokens: Tensor, vectors: Tensor, latent_time: float | Tensor) -> Tensor:
        """Return the rows of :meth:`joint` for a latent given as vectors, which gradients reach.

        :param vectors: float32 ``(*batch, N, d)``, as :meth:`vectors` returns.
        """
        batch = torch.broadcast_shapes(tokens.shape[:-1], vectors.shape[:-2])
        length = self._checked(tokens.shape[-1])
        state = self.stem(tokens.expand(*batch, length).reshape(-1, length))
        inner = self.inputs(vectors).expand(*batch, -1, -1)
        slots = inner.reshape(-1, *inner.shape[-2:]) + self.slots
        level = self._level(latent_time, batch)
        condition = F.silu(level) if self.config.adaptive else None
        slots = slots if self.config.adaptive else slots + level
        rotation = self.rotation[:length]
        for block in self.blocks:
            state, slots = block(state, slots, rotation, condition)
        state, slots = self.norm(state, condition), self.latent_norm(slots, condition)
        return torch.cat([state, slots], dim=1).reshape(*batch, -1, slots.shape[-1])

    def _level(self, latent_time: float | Tensor, batch: torch.Size) -> Tensor:
        """Return the embedded level of every row, or one that all share, ``(n or 1, 1, dim)``."""
        times = torch.as_tensor(latent_time, dtype=torch.float64, device=self.slots.device)
        level: Tensor = self.time(per_row(times, batch))[:, None, :]
        return level

    def _checked(self, length: int) -> int:
        if length > self.config.max_length:
            raise ValueError(
                f"LatentTransformer: sequences of {length} tokens, but the network was built for "
                f"at most {self.config.max_length}; shorten them or build one with a larger "
                "max_length."
            )
        return length

    def rows_per_call(self, length: int) -> int:
        """Return how many rows are best sent at once; it depends on the machine alone.

        :param length: tokens of a row.
        """
        whole = length + self.config.num_slots
        widest = max(3.0, self.config.mlp_ratio) * self.config.dim
        return rows_that_fit(round(widest * whole * 4), whole, self.slots.device)

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Return the latent of clean sequences.

        :param tokens: int64 ``(*batch, L)``.
        :returns: codes, int64 ``(*batch, N)``, or vectors, float32 ``(*batch, N, d)``.
        """
        batch, length = tokens.shape[:-1], self._checked(tokens.shape[-1])
        parts = tokens.reshape(-1, length).split(self.rows_per_call(length))
        latent = torch.cat([self._latent(self.encoder(part)) for part in parts])
        return latent.reshape(*batch, *latent.shape[1:])

    def _latent(self, vectors: Tensor) -> Tensor:
        return vectors if self.latent.num_codes is None else nearest(vectors, self.codebook)


def _encoder(config: LatentConfig) -> LatentEncoder | HiddenStatesEncoder:
    if config.encoder is None:
        return LatentEncoder(config)
    return HiddenStatesEncoder.restore(config.encoder, config.num_slots, config.latent_dim)


def _silent(width: int, outputs: int) -> nn.Linear:
    """Return a layer that starts at 0: the uniform law, the mean of a standardised latent."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
