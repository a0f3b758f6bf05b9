"""A transformer that draws the next state itself, and the one that learns how to hide.

Both are parts of one network, as a bound is of the two; sampling asks the reverse part alone.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.files import SavedNetwork
from ppl_diffusion.denoisers.transformer import Transformer

_UNEQUAL = 0.02
"""Noise that is alike for all sequences is a stationary point, from which nothing is learnt."""


@dataclasses.dataclass(frozen=True)
class DirectConfig(TransformerConfig):
    """Shape of a :class:`DirectTransformer`, beside that of its two transformers.

    :param num_steps: number ``T`` of steps of the chain; another one is another network.
    :param masks_only: learn nothing but when tokens are revealed.
    :raises ValueError: if the numbers do not fit together.
    """

    kind: Kind = "posterior"
    time_conditioning: bool = True
    num_steps: int = 4
    masks_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"DirectConfig: num_steps is {self.num_steps}; give 1 or more.")
        if not self.time_conditioning or self.kind != "posterior":
            raise ValueError(
                "DirectConfig: every step has a law of its own, which reads the state of its site; "
                "leave time_conditioning and kind out."
            )
        if self.num_classes or self.num_padding:
            raise ValueError(
                "DirectConfig: learned noise knows neither classes nor several lengths; leave "
                "num_classes and num_padding out."
            )
        if self.masks_only and self.num_states == self.vocab_size:
            raise ValueError("DirectConfig: masks_only needs a mask among the states.")

    def trunk(self, vocab_size: int) -> TransformerConfig:
        """Return the shape of a transformer that predicts so many columns."""
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        own = {name: value for name, value in vars(self).items() if name in names}
        return TransformerConfig(**{**own, "vocab_size": vocab_size})


class DirectTransformer(SavedNetwork):
    """``(tokens, t) -> log v and log p(x | z_t)``, and the marginals of the noise it was made for.

    Parameters and outputs are float32 whatever torch's default dtype is.

    :ivar output_size: ``S + V`` columns: the law of the next state, then the look-ahead.
    """

    config_class = DirectConfig
    config: DirectConfig

    def __init__(self, config: DirectConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.kind, self.time_free = config.vocab_size, config.kind, False
        self.num_states, self.num_steps = config.num_states, config.num_steps
        self.output_size = config.num_states + config.vocab_size
        self.reverse = Transformer(config.trunk(config.vocab_size))
        self.next = nn.Linear(config.dim, config.num_states)
        nn.init.zeros_(self.next.weight)
        nn.init.zeros_(self.next.bias)
        # It must say the same of a sequence every time: no dropout.
        self.noise = Transformer(dataclasses.replace(config.trunk(config.num_states), dropout=0.0))
        nn.init.normal_(self.noise.vocabulary.weight, std=_UNEQUAL)
        self.to(torch.float32)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return both, float32 ``(*batch, L, S + V)``.

        :param tokens: states, int64 ``(*batch, L)``.
        :param t: times ``1, (T - 1) / T .. 1 / T``.
        """
        return self._heads(self.reverse.hidden(tokens, t))

    def from_mixture(self, states: Tensor, t: Tensor) -> Tensor:
        """Return both of soft states, ``(n, L, S + V)``; one-hot ones give :meth:`forward`.

        :param states: weights, ``(n, L, S)``.
        :param t: steps, 1 to ``T``, int64 ``(n,)``.
        """
        return self._heads(self.reverse.hidden_mixture(None, states, t / self.num_steps))

    def marginal_logits(self, x: Tensor) -> Tensor:
        """Return what the marginals of the times between are made of.

        :param x: clean tokens, int64 ``(B, L)``.
        :returns: ``(T - 1, B, L, S)``, or with masks alone ``(T - 1, B, L)``.
        """
        times = torch.arange(1, self.num_steps, device=x.device)[:, None] / self.num_steps
        many = x.expand(self.num_steps - 1, *x.shape)
        log_u = self.noise(many, times)
        if not self.config.masks_only:
            return log_u
        return torch.logsumexp(log_u[..., :-1], -1) - log_u[..., -1]

    def rows_per_call(self, length: int) -> int:
        """Return how many rows are best sent at once."""
        return self.reverse.rows_per_call(length)

    def _heads(self, hidden: Tensor) -> Tensor:
        log_v = F.log_softmax(self.next(hidden).float(), -1)
        return torch.cat([log_v, self.reverse.head(hidden)], -1)
