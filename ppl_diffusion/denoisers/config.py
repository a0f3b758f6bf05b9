"""The shape of the transformer."""

from __future__ import annotations

import dataclasses
from typing import get_args

from ppl_diffusion.denoisers.base import Kind

_KINDS = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a :class:`~ppl_diffusion.denoisers.Transformer`.

    :param vocab_size: number ``V`` of clean tokens, ids ``0..V-1``.
    :param num_states: number of input symbols, ``V + 1`` with a mask and ``V`` without.
    :param max_length: longest sequence the network accepts, in tokens.
    :param dim: width of the residual stream.
    :param depth: number of blocks.
    :param heads: attention heads; ``dim / heads`` must be even, as rotary positions turn pairs.
    :param mlp_ratio: width of the hidden layer of a block, in units of ``dim``.
    :param dropout: probability of dropping a unit, during training only.
    :param stem_width: how many tokens, an odd number, the input embedding of one position sees.
    :param conv_width: width of the depthwise convolution in each block, odd, or 0 for none.
    :param learned_positions: whether to add a learned vector per absolute position, for sequences
        aligned to a landmark such as a transcription start.
    :param time_conditioning: whether the network sees the time; without it the output is time-free.
    :param kind: what the network predicts at a visible position, ``"cavity"`` (from the others) or
        ``"posterior"`` (from all).
    :param num_classes: number of class labels the network can be given, or 0 for none.
    :param num_padding: how many of the last clean tokens only fill sequences up: they are read, and
        never predicted.
    :raises ValueError: if the numbers do not fit together.
    """

    vocab_size: int
    num_states: int
    max_length: int
    dim: int = 96
    depth: int = 3
    heads: int = 4
    mlp_ratio: float = 2.0
    dropout: float = 0.1
    stem_width: int = 1
    conv_width: int = 0
    learned_positions: bool = False
    time_conditioning: bool = False
    kind: Kind = "cavity"
    num_classes: int = 0
    num_padding: int = 0

    def __post_init__(self) -> None:
        if self.num_states not in (self.vocab_size, self.vocab_size + 1):
            raise ValueError(
                f"TransformerConfig: num_states is {self.num_states}; give {self.vocab_size} "
                f"(no mask) or {self.vocab_size + 1} (with a mask) for {self.vocab_size} tokens."
            )
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"TransformerConfig: dim {self.dim} over {self.heads} heads gives no even width; "
                "choose dim as a multiple of 2 * heads."
            )
        if self.stem_width % 2 == 0 or (self.conv_width and self.conv_width % 2 == 0):
            raise ValueError(
                f"TransformerConfig: stem_width {self.stem_width} and conv_width {self.conv_width} "
                "must be odd, so that a window has a centre (conv_width 0 means none)."
            )
        if self.kind not in _KINDS:
            raise ValueError(
                f"TransformerConfig: kind is {self.kind!r}; choose one of {', '.join(_KINDS)}."
            )
        if self.num_classes < 0:
            raise ValueError(
                f"TransformerConfig: num_classes is {self.num_classes}; give 0 for no labels."
            )

    @property
    def conditioned(self) -> bool:
        """Whether the blocks follow a condition: the time, a label, or both."""
        return self.time_conditioning or self.num_classes > 0
