"""A transformer that draws the next state itself, and the one that learns how to hide.

Both are parts of one network, as a bound is of the two; sampling asks the reverse part alone. Both
say how they depart from a noise that is given, the linear schedule of masks or of uniform tokens:
before anything is learned the noise is nearly that one, and the chain its bridge around what the
look-ahead predicts. Noise that starts out saying nothing stays so, as no chain can learn to read
it; and a trained prior of the given noise is a start (:meth:`DirectTransformer.start_from`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.files import SavedNetwork
from ppl_diffusion.denoisers.transformer import Transformer

Noise = Literal["tokens", "reveals", "positions"]

_SPREAD = 0.5
"""Standard deviation of the first logits that read the sequence."""
_ORDER = 2.0
"""How far, in logits, a random order of the positions is from no order.

Noise that treats all positions alike is a saddle point: what a step changes is lost in the noise of
the gradient, and training stays there for thousands of steps."""
_LEAST, _DOUBT = 0.03, 1e-3
"""Shares of the given noise, and of its bridge, that may be any state: logarithms start from them.
Noise must be able to find uses for states; a doubt of the chain is paid for at every step."""


@dataclasses.dataclass(frozen=True)
class DirectConfig(TransformerConfig):
    """Shape of a :class:`DirectTransformer`, beside that of its two transformers.

    :param num_steps: number ``T`` of steps of the chain; another one is another network.
    :param noise: what is learned of how a token is hidden: its law over all states
        (``"tokens"``), or only how probably it is shown, as the whole sequence suggests
        (``"reveals"``) or as its position does (``"positions"``); the latter two need a mask.
    :raises ValueError: if the numbers do not fit together.
    """

    kind: Kind = "posterior"
    num_steps: int = 4
    noise: Noise = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.num_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"DirectConfig: num_steps is {steps!r}; give an integer from 1 up.")
        if self.time_conditioning or self.kind != "posterior":
            raise ValueError(
                "DirectConfig: every step has a law of its own, which reads the step and the state "
                "of its site; leave time_conditioning and kind out."
            )
        if self.num_classes or self.num_padding:
            raise ValueError(
                "DirectConfig: learned noise knows neither classes nor several lengths; leave "
                "num_classes and num_padding out."
            )
        if self.noise not in get_args(Noise):
            known = ", ".join(get_args(Noise))
            raise ValueError(f"DirectConfig: noise is {self.noise!r}; choose one of {known}.")
        if self.masks_only and self.num_states == self.vocab_size:
            raise ValueError(f"DirectConfig: noise={self.noise!r} needs a mask among the states.")

    @property
    def masks_only(self) -> bool:
        """Whether nothing is learned but when tokens are shown."""
        return self.noise != "tokens"

    def trunk(self, **changes: object) -> TransformerConfig:
        """Return the shape of one of its transformers."""
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        own = {name: value for name, value in vars(self).items() if name in names}
        return TransformerConfig(**{**own, **changes})


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
        self.reverse = _Stepwise(config)
        self.next = nn.Linear(config.dim, config.num_states)
        nn.init.zeros_(self.next.weight)
        nn.init.zeros_(self.next.bias)
        self.noise = _Noise(config)
        self.to(torch.float32)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return both, float32 ``(*batch, L, S + V)``.

        :param tokens: states, int64 ``(*batch, L)``.
        :param t: times ``1, (T - 1) / T .. 1 / T``.
        """
        states = F.one_hot(tokens, self.num_states)
        return self._heads(self.reverse.hidden(tokens, t), states, t)

    def from_mixture(self, states: Tensor, t: Tensor) -> Tensor:
        """Return both of soft states, ``(n, L, S + V)``; one-hot ones give :meth:`forward`.

        :param states: weights, ``(n, L, S)``.
        :param t: steps, 1 to ``T``, int64 ``(n,)``.
        """
        time = t / self.num_steps
        return self._heads(self.reverse.hidden_mixture(None, states, time), states, time)

    def marginal_logits(self, x: Tensor) -> Tensor:
        """Return what the marginals of the times between are made of.

        :param x: clean tokens, int64 ``(B, L)``.
        :returns: ``(T - 1, B, L, S)``, or where only masks are learned ``(T - 1, B, L)``.
        """
        logits: Tensor = self.noise(x)
        return logits

    def start_from(self, network: Transformer) -> None:
        """Take over what a network of the given noise has learned, in place.

        Then the chain starts out as the factorised one of that network, of ``T`` steps.

        :param network: of the same shape.
        :raises ValueError: if it has another shape, or reads the time.
        """
        if network.config != self.config.trunk(kind=network.config.kind):
            raise ValueError(
                f"DirectTransformer: the network to start from has the shape {network.config}, "
                f"and the chain's is {self.config.trunk()}; give both the same one."
            )
        self.reverse.load_state_dict(network.state_dict(), strict=False)

    def rows_per_call(self, length: int) -> int:
        """Return how many rows are best sent at once."""
        return self.reverse.rows_per_call(length)

    def _heads(self, hidden: Tensor, states: Tensor, t: float | Tensor) -> Tensor:
        look_ahead = self.reverse.head(hidden)
        given = self._given(look_ahead, states.to(hidden.dtype), t)
        given = (1 - _DOUBT) * given + _DOUBT / self.num_states
        log_v = F.log_softmax(self.next(hidden).float() + given.log(), -1)
        return torch.cat([log_v, look_ahead], -1)

    def _given(self, look_ahead: Tensor, states: Tensor, t: float | Tensor) -> Tensor:
        """Return the bridge of the given noise: what is noise is drawn with ``1 / step`` anew."""
        steps = torch.as_tensor(t, dtype=states.dtype, device=states.device) * self.num_steps
        stay = ((steps - 1) / steps)[..., None, None]
        anew = look_ahead.exp()
        if self.num_states > self.vocab_size:  # a mask is noise, and a token is known to be none
            anew = states[..., :-1] + states[..., -1:] * anew
            anew = F.pad(anew, (0, 1))
        return stay * states + (1 - stay) * anew


class _Stepwise(Transformer):
    """A trunk that is told the step by a vector beside each position, at the cost of no matrix."""

    def __init__(self, config: DirectConfig) -> None:
        super().__init__(config.trunk())
        self.steps = nn.Parameter(torch.zeros(config.num_steps, config.dim))

    def _trunk(
        self, state: Tensor, batch: torch.Size, t: float | Tensor, label: int | Tensor | None
    ) -> Tensor:
        steps = torch.as_tensor(t, device=state.device) * len(self.steps)
        told = self.steps[steps.round().long() - 1].expand(*batch, -1)
        return super()._trunk(state + told.reshape(-1, 1, told.shape[-1]), batch, t, label)


def random_order(length: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw an order of positions, as what it adds to the logits of being shown, float64 ``(L,)``.

    It is made of quantiles, so that no two positions are alike however few there are.

    :param length: number ``L`` of positions.
    :param generator: source of randomness, on whose device the order is.
    """
    device = torch.device("cpu") if generator is None else generator.device
    ranks = torch.randperm(length, generator=generator, device=device).double() + 0.5
    return _ORDER * torch.special.ndtri(ranks / length)


class _Noise(nn.Module):
    """Logits of the marginals of all times between, from one reading of the sequence."""

    def __init__(self, config: DirectConfig) -> None:
        super().__init__()
        self.config = config
        between = config.num_steps - 1
        self.shown = nn.Parameter(random_order(config.max_length).repeat(between, 1))
        self.columns = 1 if config.masks_only else config.num_states
        if config.noise != "positions":
            # It must say the same of a sequence every time: no dropout.
            self.trunk = Transformer(config.trunk(dropout=0.0))
            self.trunk.vocabulary = nn.Linear(config.dim, between * self.columns)
            nn.init.normal_(self.trunk.vocabulary.weight, std=_SPREAD * config.dim**-0.5)
            nn.init.zeros_(self.trunk.vocabulary.bias)

    def forward(self, x: Tensor) -> Tensor:
        config, between = self.config, self.config.num_steps - 1
        times = torch.arange(1, between + 1, device=x.device)[:, None] / config.num_steps
        shown = (torch.logit(1 - times) + self.shown[:, : x.shape[-1]])[:, None]
        if config.noise == "positions":
            return shown.expand(-1, len(x), -1)
        hidden = self.trunk.hidden(x, 0.0)
        read = self.trunk.vocabulary(hidden).unflatten(-1, (between, self.columns)).movedim(-2, 0)
        if config.masks_only:
            return read[..., 0] + shown
        clean, level = F.one_hot(x, config.num_states).to(read.dtype), shown[..., None].sigmoid()
        prior = torch.full_like(clean, 1 / config.vocab_size)
        if config.num_states > config.vocab_size:
            prior = F.one_hot(torch.full_like(x, config.vocab_size)).to(read.dtype)
        given = level * clean + (1 - level) * prior
        return read + ((1 - _LEAST) * given + _LEAST / config.num_states).log()
