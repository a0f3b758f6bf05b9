"""A bidirectional transformer denoiser, small enough to train on a CPU.

The network reads noisy tokens and, if its configuration asks for it, the time; it returns
log-probabilities over the *clean* vocabulary only, so no mass can reach the mask. It is split in
two: :meth:`Transformer.hidden` pays for attention, :meth:`Transformer.head` for the vocabulary, and
the second can run on the positions that will draw and on no others.

Rotary positions follow Su et al. (2021, arXiv 2104.09864), conditioning by adaptive layer norm with
zero-initialised gates Peebles and Xie (2023, arXiv 2212.09748).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers._blocks import (
    AdaptiveNorm,
    Block,
    Stem,
    TimeEmbedding,
    per_row,
    rotations,
)
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.batching import rows_that_fit
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.files import SavedNetwork


class Transformer(SavedNetwork):
    """Denoiser ``(tokens, t) -> log p(x0 | tokens, t)`` with a bidirectional transformer.

    With ``num_classes`` labels it is also ``(tokens, t, label)``, for classifier-free guidance
    (Ho and Salimans 2022, arXiv 2207.12598): label ``num_classes``, or none, is the null label.

    Parameters and outputs are float32 whatever torch's default dtype is.

    :ivar vocab_size: number ``V`` of clean tokens.
    :ivar kind: ``"cavity"`` or ``"posterior"``.
    :ivar time_free: whether the output does not depend on the time.
    :ivar hidden_size: width of the rows between :meth:`hidden` and :meth:`head`.
    :ivar num_classes: number of class labels; the id of the null label.
    """

    config_class = TransformerConfig
    config: TransformerConfig
    rotation: Tensor
    padding: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.kind: Kind = config.kind
        self.time_free = not config.time_conditioning
        self.hidden_size = config.dim
        self.num_classes = config.num_classes
        self.num_padding = config.num_padding
        self.stem = Stem(config)
        self.time = TimeEmbedding(config.dim) if config.time_conditioning else None
        self.label = (
            nn.Embedding(config.num_classes + 1, config.dim) if config.num_classes else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = AdaptiveNorm(config.dim, conditioned=config.conditioned)
        self.vocabulary = nn.Linear(config.dim, config.vocab_size)
        nn.init.zeros_(self.vocabulary.weight)
        nn.init.zeros_(self.vocabulary.bias)
        self.register_buffer("rotation", rotations(config), persistent=False)
        filling = torch.arange(config.vocab_size - config.num_padding, config.vocab_size)
        self.register_buffer("padding", filling, persistent=False)
        self.to(torch.float32)

    def hidden(
        self, tokens: Tensor, t: float | Tensor, label: int | Tensor | None = None
    ) -> Tensor:
        """Compute the hidden states that :meth:`head` turns into log-probabilities.

        :param tokens: int64 ids in ``0..num_states-1``, shape ``(*batch, L)``.
        :param t: times in [0, 1], a number or a tensor that broadcasts to ``batch``.
        :param label: class labels in ``0..num_classes``, a number or an int64 tensor that
            broadcasts to ``batch``; ``num_classes``, or None, is no label.
        :returns: float32 hidden states, shape ``(*batch, L, dim)``.
        :raises ValueError: if ``L`` exceeds ``config.max_length`` or the label does not exist.
        """
        batch, length = tokens.shape[:-1], self._checked(tokens.shape[-1])
        return self._trunk(self.stem(tokens.reshape(-1, length)), batch, t, label)

    def rows_per_call(self, length: int) -> int:
        """Return how many rows are best sent at once; it depends on the machine, not on the clock.

        :param length: tokens of a row.
        """
        widest = max(3.0, self.config.mlp_ratio) * self.config.dim
        if (device := self.vocabulary.weight.device).type != "cpu":
            widest = max(widest, self.vocab_size)  # the head may run on every position
        return rows_that_fit(round(widest * length * 4), length, device)

    def hidden_mixture(
        self,
        ids: Tensor | None,
        weights: Tensor,
        t: float | Tensor,
        label: int | Tensor | None = None,
    ) -> Tensor:
        """Compute the hidden states of soft inputs: mixtures of states in place of states.

        Every embedding look-up becomes the weighted sum of rows (Duo, arXiv 2506.10892, section
        4.1); one-hot weights give :meth:`hidden`. The gradient reaches the weights.

        :param ids: int64 ids of the ``k`` states of each mixture, shape ``(*batch, L, k)``, or None
            for all ``num_states`` states in their order.
        :param weights: their weights, shape ``(*batch, L, k)``; they need not add up to one.
        :param label: as in :meth:`hidden`.
        :returns: float32 hidden states, shape ``(*batch, L, dim)``.
        :raises ValueError: as :meth:`hidden`, or if the last dimensions do not fit.
        """
        expected = self.config.num_states if ids is None else ids.shape[-1]
        if weights.shape[-1] != expected:
            raise ValueError(
                f"Transformer: {weights.shape[-1]} weights for mixtures of {expected} states; "
                "give one weight per id, or one per state if ids is None."
            )
        batch, length = weights.shape[:-2], self._checked(weights.shape[-2])
        flat = weights.to(torch.float32).reshape(-1, length, expected)
        rows = None if ids is None else ids.expand(weights.shape).reshape(flat.shape)
        return self._trunk(self.stem.mix(rows, flat), batch, t, label)

    def head(self, hidden: Tensor) -> Tensor:
        """Turn hidden states, of all positions or of gathered ones, into log-probabilities.

        :param hidden: float32 rows of :meth:`hidden`, shape ``(..., dim)``.
        :returns: normalised log-probabilities of clean tokens, float32, shape ``(..., V)``.
        """
        logits = self.vocabulary(hidden).float()
        if self.num_padding:
            logits = logits.index_fill(-1, self.padding, -torch.inf)
        return F.log_softmax(logits, dim=-1)

    def forward(
        self, tokens: Tensor, t: float | Tensor, label: int | Tensor | None = None
    ) -> Tensor:
        """Return ``head(hidden(tokens, t, label))``, shape ``(*batch, L, V)``."""
        return self.head(self.hidden(tokens, t, label))

    def _checked(self, length: int) -> int:
        if length > self.config.max_length:
            raise ValueError(
                f"Transformer: sequences of {length} tokens, but the network was built for at most "
                f"{self.config.max_length}; shorten them or build one with a larger max_length."
            )
        return length

    def _trunk(
        self, state: Tensor, batch: torch.Size, t: float | Tensor, label: int | Tensor | None
    ) -> Tensor:
        condition = self._condition(t, label, batch)
        rotation = self.rotation[: state.shape[1]]
        for block in self.blocks:
            state = block(state, rotation, condition)
        return self.norm(state, condition).reshape(*batch, *state.shape[1:])

    def _condition(
        self, t: float | Tensor, label: int | Tensor | None, batch: torch.Size
    ) -> Tensor | None:
        parts = (self._embedded_time(t, batch), self._embedded_label(label, batch))
        present = [part[:, None, :] for part in parts if part is not None]
        return F.silu(sum(present[1:], present[0])) if present else None

    def _embedded_time(self, t: float | Tensor, batch: torch.Size) -> Tensor | None:
        if self.time is None:
            return None
        times = torch.as_tensor(t, dtype=torch.float64, device=self.vocabulary.weight.device)
        embedded: Tensor = self.time(per_row(times, batch))
        return embedded

    def _embedded_label(self, label: int | Tensor | None, batch: torch.Size) -> Tensor | None:
        if self.label is None and label is not None:
            raise ValueError(
                "Transformer: a label was given to a network without classes; "
                "build it with num_classes, or leave the label out."
            )
        if self.label is None:
            return None
        label = self.num_classes if label is None else label
        labels = torch.as_tensor(label, device=self.vocabulary.weight.device)
        try:
            embedded: Tensor = self.label(per_row(labels, batch))
        except IndexError as error:
            raise ValueError(
                f"Transformer: a label lies outside 0..{self.num_classes}; "
                "the last of these means no label."
            ) from error
        return embedded
