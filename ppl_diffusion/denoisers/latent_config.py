"""The shape of the network that predicts tokens and a latent."""

from __future__ import annotations

import dataclasses

from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.latent import LatentSpec

QUANTISERS = ("vq", "gumbel")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Shape of a :class:`~ppl_diffusion.denoisers.latent_transformer.LatentTransformer`.

    :param vocab_size: number ``V`` of clean tokens; the mask has the id ``V``.
    :param max_length: longest sequence the network accepts, in tokens.
    :param num_slots: number ``N`` of slots of the latent.
    :param num_codes: number ``K`` of codes of a slot, or None for a continuous latent.
    :param latent_dim: coordinates ``d`` of a slot: of the vector that stands for a code, or of the
        continuous latent itself.
    :param quantiser: how codes are learnt, ``"vq"`` (nearest of unit vectors, moving averages) or
        ``"gumbel"`` (drawn, with a codebook trained by gradient).
    :param dim: width of both streams.
    :param depth: number of blocks, of two streams each.
    :param heads: attention heads; ``dim / heads`` must be even.
    :param mlp_ratio: width of the hidden layer of a block, in units of ``dim``.
    :param dropout: probability of dropping a unit of the denoiser, during training only.
    :param stem_width: how many tokens, an odd number, the input embedding of one position sees.
    :param learned_positions: whether to add a learned vector per absolute position.
    :param encoder_depth: blocks of the encoder, of the same width.
    :raises ValueError: if the numbers do not fit together.
    """

    vocab_size: int
    max_length: int
    num_slots: int
    num_codes: int | None = None
    latent_dim: int = 16
    quantiser: str = "vq"
    dim: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    stem_width: int = 1
    learned_positions: bool = False
    encoder_depth: int = 2

    def __post_init__(self) -> None:
        for name in ("num_slots", "latent_dim", "depth", "encoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"LatentConfig: {name} is {getattr(self, name)}; give 1 or more."
                )
        if self.num_codes is not None and self.num_codes < 2:
            raise ValueError(
                f"LatentConfig: num_codes is {self.num_codes}; give 2 or more, or None for a "
                "continuous latent."
            )
        if self.quantiser not in QUANTISERS:
            raise ValueError(
                f"LatentConfig: quantiser is {self.quantiser!r}; choose one of "
                f"{', '.join(QUANTISERS)}."
            )
        assert self.trunk  # checks what the two networks have in common

    @property
    def latent(self) -> LatentSpec:
        """What the latent is."""
        if self.num_codes is None:
            return LatentSpec(self.num_slots, dim=self.latent_dim)
        return LatentSpec(self.num_slots, num_codes=self.num_codes)

    @property
    def trunk(self) -> TransformerConfig:
        """Shape of the token stream."""
        return TransformerConfig(
            self.vocab_size,
            self.vocab_size + 1,
            self.max_length,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            stem_width=self.stem_width,
            learned_positions=self.learned_positions,
            time_conditioning=True,
        )

    @property
    def reader(self) -> TransformerConfig:
        """Shape of the encoder; it must say the same of a sequence every time: no dropout."""
        return dataclasses.replace(
            self.trunk, depth=self.encoder_depth, dropout=0.0, time_conditioning=False
        )
