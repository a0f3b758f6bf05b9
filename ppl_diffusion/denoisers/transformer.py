"""A bidirectional transformer denoiser, small enough to train on a CPU.

The network reads noisy tokens and, if its configuration asks for it, the time; it returns
log-probabilities over the *clean* vocabulary only, so no mass can reach the mask. It is split in
two: :meth:`Transformer.hidden` pays for attention, :meth:`Transformer.head` for the vocabulary, and
the second can run on the positions that will draw and on no others.

Rotary positions follow Su et al. (2021, arXiv 2104.09864), conditioning by adaptive layer norm with
zero-initialised gates Peebles and Xie (2023, arXiv 2212.09748).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Kind

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_TIME_FEATURES = 64
_KINDS = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a :class:`Transformer`.

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


class Transformer(nn.Module):
    """Denoiser ``(tokens, t) -> log p(x0 | tokens, t)`` with a bidirectional transformer.

    Parameters and outputs are float32 whatever torch's default dtype is.

    :param config: the shape of the network.

    :ivar vocab_size: number ``V`` of clean tokens.
    :ivar kind: ``"cavity"`` or ``"posterior"``.
    :ivar time_free: whether the output does not depend on the time.
    """

    rotation: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.kind: Kind = config.kind
        self.time_free = not config.time_conditioning
        self.stem = _Stem(config)
        self.time = _TimeEmbedding(config.dim) if config.time_conditioning else None
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = _AdaptiveNorm(config.dim, conditioned=config.time_conditioning)
        self.vocabulary = nn.Linear(config.dim, config.vocab_size)
        nn.init.zeros_(self.vocabulary.weight)
        nn.init.zeros_(self.vocabulary.bias)
        self.register_buffer("rotation", _rotations(config), persistent=False)
        self.to(torch.float32)

    def hidden(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Compute the hidden states that :meth:`head` turns into log-probabilities.

        :param tokens: int64 ids in ``0..num_states-1``, shape ``(*batch, L)``.
        :param t: times in [0, 1], a number or a tensor that broadcasts to ``batch``.
        :returns: float32 hidden states, shape ``(*batch, L, dim)``.
        :raises ValueError: if ``L`` exceeds ``config.max_length``.
        """
        batch, length = tokens.shape[:-1], tokens.shape[-1]
        if length > self.config.max_length:
            raise ValueError(
                f"Transformer: sequences of {length} tokens, but the network was built for at most "
                f"{self.config.max_length}; shorten them or build one with a larger max_length."
            )
        state = self.stem(tokens.reshape(-1, length))
        condition = self._condition(t, batch)
        rotation = self.rotation[:length]
        for block in self.blocks:
            state = block(state, rotation, condition)
        return self.norm(state, condition).reshape(*batch, length, self.config.dim)

    def head(self, hidden: Tensor) -> Tensor:
        """Turn hidden states, of all positions or of gathered ones, into log-probabilities.

        :param hidden: float32 rows of :meth:`hidden`, shape ``(..., dim)``.
        :returns: normalised log-probabilities of clean tokens, float32, shape ``(..., V)``.
        """
        return F.log_softmax(self.vocabulary(hidden).float(), dim=-1)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return ``head(hidden(tokens, t))``, shape ``(*batch, L, V)``."""
        return self.head(self.hidden(tokens, t))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; reading them back gives the same bits.

        :param directory: folder, made if it is absent.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        text = json.dumps(dataclasses.asdict(self.config), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a network that :meth:`save_pretrained` wrote, in evaluation mode.

        :param directory: folder with ``model.safetensors`` and ``config.json``.
        :raises FileNotFoundError: if one of the two files is absent.
        :raises ValueError: if a file is corrupt or the two do not belong together.
        """
        folder = Path(directory)
        config = _read_config(folder / CONFIG_FILE)
        # The random start is overwritten; it must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            network = cls(config)
        _load_weights(network, folder / WEIGHTS_FILE)
        return network.eval()

    def _condition(self, t: float | Tensor, batch: torch.Size) -> Tensor | None:
        if self.time is None:
            return None
        times = torch.as_tensor(t, dtype=torch.float64, device=self.vocabulary.weight.device)
        # One time for all rows is the rule in a reverse chain: embed it once and let it broadcast.
        rows = times.reshape(1) if times.numel() == 1 else times.expand(batch).reshape(-1)
        return self.time(rows)[:, None, :]


class _Stem(nn.Module):
    """Embedding of a token together with its ``stem_width - 1`` nearest neighbours."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width = config.stem_width
        # One more symbol than there are states: what lies beyond the ends of a sequence.
        self.outside = config.num_states
        tables = [nn.Embedding(config.num_states + 1, config.dim) for _ in range(self.width)]
        for table in tables:
            nn.init.normal_(table.weight, std=self.width**-0.5)
        self.tables = nn.ModuleList(tables)
        self.positions = (
            nn.Parameter(0.02 * torch.randn(config.max_length, config.dim))
            if config.learned_positions
            else None
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        length, reach = tokens.shape[-1], self.width // 2
        padded = F.pad(tokens, (reach, reach), value=self.outside)
        state = self.tables[0](padded[:, :length])
        for shift in range(1, self.width):
            state = state + self.tables[shift](padded[:, shift : shift + length])
        if self.positions is not None:
            state = state + self.positions[:length]
        return self.dropout(state)


class _TimeEmbedding(nn.Module):
    """Fourier features of the time in [0, 1], then a two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(_TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        # In float64 up to here: float32 loses the bits that tell late steps apart.
        rates = torch.exp(
            torch.linspace(0.0, math.log(1000.0), _TIME_FEATURES // 2, dtype=torch.float64)
        ).to(times.device)
        angles = times[:, None] * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.layers(features.to(torch.float32))


class _AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift follow the condition, if there is one."""

    def __init__(self, dim: int, *, conditioned: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=not conditioned)
        self.modulation = nn.Linear(dim, 2 * dim) if conditioned else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, state: Tensor, condition: Tensor | None) -> Tensor:
        normed: Tensor = self.norm(state)
        if self.modulation is None or condition is None:
            return normed
        scale, shift = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return normed * (1.0 + scale) + shift


class _Gate(nn.Module):
    """Per-channel gate on a residual branch, following the condition if there is one."""

    def __init__(self, dim: int, *, conditioned: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, dim) if conditioned else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.ones_(self.modulation.bias)

    def forward(self, branch: Tensor, condition: Tensor | None) -> Tensor:
        if self.modulation is None or condition is None:
            return branch
        return branch * self.modulation(F.silu(condition))


class _Block(nn.Module):
    """Local convolution (optional), attention and perceptron, each a gated residual branch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        branches: list[nn.Module] = [_Attention(config), _perceptron(config)]
        if config.conv_width:
            branches.insert(0, _LocalConvolution(config))
        conditioned = config.time_conditioning
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(
            _AdaptiveNorm(config.dim, conditioned=conditioned) for _ in branches
        )
        self.gates = nn.ModuleList(_Gate(config.dim, conditioned=conditioned) for _ in branches)

    def forward(self, state: Tensor, rotation: Tensor, condition: Tensor | None) -> Tensor:
        for norm, branch, gate in zip(self.norms, self.branches, self.gates, strict=True):
            inner = norm(state, condition)
            inner = branch(inner, rotation) if isinstance(branch, _Attention) else branch(inner)
            state = state + gate(inner, condition)
        return state


class _Attention(nn.Module):
    """Multi-head self-attention over all positions, with rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.inputs = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        _shrink(self.output, config.depth)

    def forward(self, state: Tensor, rotation: Tensor) -> Tensor:
        rows, length, dim = state.shape
        split = self.inputs(state).reshape(rows, length, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            _rotate(query, rotation), _rotate(key, rotation), value
        )
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, length, dim))
        return self.dropout(output)


class _LocalConvolution(nn.Module):
    """Depthwise convolution along the sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.conv_width
        self.filter = nn.Conv1d(
            config.dim, config.dim, width, padding=width // 2, groups=config.dim
        )
        self.mix = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        _shrink(self.mix, config.depth)

    def forward(self, state: Tensor) -> Tensor:
        filtered = self.filter(state.transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = self.dropout(self.mix(F.silu(filtered)))
        return mixed


def _perceptron(config: TransformerConfig) -> nn.Sequential:
    width = round(config.mlp_ratio * config.dim)
    output = nn.Linear(width, config.dim)
    _shrink(output, config.depth)
    return nn.Sequential(
        nn.Linear(config.dim, width), nn.GELU(), output, nn.Dropout(config.dropout)
    )


def _shrink(layer: nn.Linear, depth: int) -> None:
    # Keeps the variance of the residual stream independent of the depth at the start of training.
    with torch.no_grad():
        layer.weight.mul_((2.0 * depth) ** -0.5)


def _rotations(config: TransformerConfig) -> Tensor:
    width = config.dim // config.heads
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(config.max_length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.float32)


def _rotate(rows: Tensor, rotation: Tensor) -> Tensor:
    even, odd = rows.chunk(2, dim=-1)
    cosine, sine = rotation[..., 0], rotation[..., 1]
    return torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)


def _read_config(path: Path) -> TransformerConfig:
    if not path.is_file():
        raise FileNotFoundError(
            f"Transformer: {path} does not exist; give a folder that save_pretrained wrote."
        )
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return TransformerConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Transformer: {path} is no transformer configuration ({error}); "
            "write it anew with save_pretrained."
        ) from error


def _load_weights(network: Transformer, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"Transformer: {path} does not exist; give a folder that save_pretrained wrote."
        )
    try:
        network.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"Transformer: {path} is not a readable safetensors file ({error}); fetch it anew."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"Transformer: the weights in {path} do not fit the configuration beside them; "
            "keep the two files of one save_pretrained call together."
        ) from error
