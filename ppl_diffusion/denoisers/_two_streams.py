"""A block of two streams, tokens and slots of a latent, that share one attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers._blocks import AdaptiveNorm, Attention, Gate, perceptron
from ppl_diffusion.denoisers.config import TransformerConfig


class Stream(nn.Module):
    """What one stream of a block has of its own: norms, gates, projections, a perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        conditioned, dim = config.conditioned, config.dim
        self.attention = Attention(config)
        self.perceptron = perceptron(config)
        self.norms = nn.ModuleList(AdaptiveNorm(dim, conditioned=conditioned) for _ in range(2))
        self.gates = nn.ModuleList(Gate(dim, conditioned=conditioned) for _ in range(2))

    def split(
        self, state: Tensor, rotation: Tensor | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the joint attention."""
        return self.attention.split(self.norms[0](state, condition), rotation)

    def forward(self, state: Tensor, mixed: Tensor, condition: Tensor | None) -> Tensor:
        """Add what attention mixed, ``(rows, heads, n, width)``, and then the perceptron."""
        state = self.gates[0](state, self.attention.joined(mixed), condition)
        inner = self.perceptron(self.norms[1](state, condition))
        output: Tensor = self.gates[1](state, inner, condition)
        return output


class TwoStreamBlock(nn.Module):
    """Separate weights for tokens and slots, one attention over both (MM-DiT, arXiv 2403.03206).

    Tokens have rotary positions. Slots have none; what tells them apart is in their embeddings.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tokens, self.slots = Stream(config), Stream(config)

    def forward(
        self, tokens: Tensor, slots: Tensor, rotation: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length = tokens.shape[1]
        ours = self.tokens.split(tokens, rotation, condition)
        theirs = self.slots.split(slots, None, condition)
        both = (torch.cat(pair, dim=2) for pair in zip(ours, theirs, strict=True))
        mixed = F.scaled_dot_product_attention(*both)
        tokens = self.tokens(tokens, mixed[:, :, :length], condition)
        return tokens, self.slots(slots, mixed[:, :, length:], condition)
