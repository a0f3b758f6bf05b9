"""The parts of the transformer: input embeddings, conditioning, residual branches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.config import TransformerConfig

_TIME_FEATURES = 64


class Stem(nn.Module):
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
        looked_up = (table(padded[:, i : i + length]) for i, table in enumerate(self.tables))
        return self._sum(looked_up, length)

    def mix(self, ids: Tensor | None, weights: Tensor) -> Tensor:
        """Embed mixtures of symbols: every look-up becomes a weighted sum of rows.

        :returns: ``(n, L, dim)``; no look-up is kept apart, so memory does not grow with ``k``.
        """
        length, reach = weights.shape[1], self.width // 2
        # One more symbol in each mixture: what lies beyond the ends, with all of the weight there.
        beyond = F.pad(weights.new_zeros(len(weights), length, 1), (0, 0, reach, reach), value=1.0)
        weights = torch.cat([F.pad(weights, (0, 0, reach, reach)), beyond], dim=-1)
        if ids is not None:
            ids = F.pad(ids, (0, 1, reach, reach), value=self.outside)
        windows = (slice(i, i + length) for i in range(self.width))
        mixed = (
            _mixed_rows(table, None if ids is None else ids[:, window], weights[:, window])
            for table, window in zip(self.tables, windows, strict=True)
        )
        return self._sum(mixed, length)

    def _sum(self, parts: Iterator[Tensor], length: int) -> Tensor:
        # In place: fresh memory for every term costs several times what the sum does.
        state = next(parts)
        for part in parts:
            state += part
        if self.positions is not None:
            state += self.positions[:length]
        return self.dropout(state)


def _mixed_rows(table: nn.Module, ids: Tensor | None, weights: Tensor) -> Tensor:
    assert isinstance(table, nn.Embedding)
    if ids is None:
        return weights @ table.weight
    flat = weights.reshape(-1, weights.shape[-1])
    rows = F.embedding_bag(
        ids.reshape(flat.shape), table.weight, mode="sum", per_sample_weights=flat
    )
    return rows.unflatten(0, weights.shape[:-1])


class TimeEmbedding(nn.Module):
    """Fourier features of the time in [0, 1], then a two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(_TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        # In float64 up to here: float32 loses the bits that tell late steps apart.
        rates = torch.exp(
            torch.linspace(
                0.0,
                math.log(1000.0),
                _TIME_FEATURES // 2,
                dtype=torch.float64,
                device=times.device,
            )
        )
        angles = times[:, None] * rates
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.layers(features.to(next(self.parameters()).dtype))


def per_row(values: Tensor, batch: torch.Size) -> Tensor:
    """Return values of a batch as one per row, or as one where all rows share it.

    That is the rule in a reverse chain: what is embedded once broadcasts.
    """
    return values.reshape(1) if values.numel() == 1 else values.expand(batch).reshape(-1)


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift follow the condition, if there is one."""

    def __init__(self, dim: int, *, conditioned: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=not conditioned)
        self.modulation = nn.Linear(dim, 2 * dim) if conditioned else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, state: Tensor, condition: Tensor | None) -> Tensor:
        if self.modulation is None or condition is None:
            normed: Tensor = self.norm(state)
            return normed
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        if len(condition) == 1:  # one for all rows: the layer norm applies it in the same pass
            shape, eps = self.norm.normalized_shape, self.norm.eps
            return F.layer_norm(state, shape, 1.0 + scale.flatten(), shift.flatten(), eps)
        return torch.addcmul(shift, self.norm(state), 1.0 + scale)


class Gate(nn.Module):
    """Per-channel gate on a residual branch, following the condition if there is one."""

    def __init__(self, dim: int, *, conditioned: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, dim) if conditioned else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.ones_(self.modulation.bias)

    def forward(self, state: Tensor, branch: Tensor, condition: Tensor | None) -> Tensor:
        """Add the gated branch to the state; the branch is overwritten where it can be."""
        if self.modulation is None or condition is None:
            return branch.add_(state)
        return torch.addcmul(state, branch, self.modulation(condition))


class Block(nn.Module):
    """Local convolution (optional), attention and perceptron, each a gated residual branch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        branches: list[nn.Module] = [Attention(config), perceptron(config)]
        if config.conv_width:
            branches.insert(0, LocalConvolution(config))
        conditioned = config.conditioned
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(
            AdaptiveNorm(config.dim, conditioned=conditioned) for _ in branches
        )
        self.gates = nn.ModuleList(Gate(config.dim, conditioned=conditioned) for _ in branches)

    def forward(self, state: Tensor, rotation: Tensor, condition: Tensor | None) -> Tensor:
        for norm, branch, gate in zip(self.norms, self.branches, self.gates, strict=True):
            inner = norm(state, condition)
            inner = branch(inner, rotation) if isinstance(branch, Attention) else branch(inner)
            state = gate(state, inner, condition)
        return state


class Attention(nn.Module):
    """Multi-head self-attention over all positions, with rotary positions.

    Rotation turns position ``i`` of a head's first half together with ``i`` of its second. Where
    the two are neighbours that is one product of complex numbers, so the rows of the input weights
    are read in that order; queries and keys are permuted alike, which their products do not see.
    """

    pairs: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.inputs = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        _shrink(self.output, config.depth)
        self.register_buffer("pairs", _pairs(config), persistent=False)

    def forward(self, state: Tensor, rotation: Tensor) -> Tensor:
        return self.joined(F.scaled_dot_product_attention(*self.split(state, rotation)))

    def split(self, state: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, ``(rows, heads, L, width)`` each.

        :param rotation: of the positions, or None where they have none.
        """
        rows, length, dim = state.shape
        joint = F.linear(state, self.inputs.weight[self.pairs])
        split = joint.view(rows, length, 3, self.heads, dim // self.heads)
        if rotation is None:
            query, key, value = split.permute(2, 0, 3, 1, 4)
            return query, key, value
        # There are no complex numbers of two bfloat16, and hardly any of two halves.
        wide = torch.promote_types(joint.dtype, torch.float32)
        turned = torch.view_as_complex(split[:, :, :2].unflatten(-1, (-1, 2)).to(wide))
        turned = turned * torch.view_as_complex(rotation.to(wide))[:, None, None]
        turned = torch.view_as_real(turned).to(joint.dtype)
        query, key = turned.flatten(-2).permute(2, 0, 3, 1, 4)
        return query, key, split[:, :, 2].transpose(1, 2)

    def joined(self, mixed: Tensor) -> Tensor:
        """Return the output, ``(rows, L, dim)``, of mixed values ``(rows, heads, L, width)``."""
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return self.dropout(output)


class LocalConvolution(nn.Module):
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


def perceptron(config: TransformerConfig) -> nn.Sequential:
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


def rotations(config: TransformerConfig) -> Tensor:
    width = config.dim // config.heads
    rates = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(config.max_length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.float32)


def _pairs(config: TransformerConfig) -> Tensor:
    """Order of the outputs of an attention's input layer in which rotated pairs are neighbours."""
    half = config.dim // config.heads // 2
    order = torch.arange(3 * config.dim)
    paired = order[: 2 * config.dim].reshape(-1, 2, half).mT.flatten()
    return torch.cat([paired, order[2 * config.dim :]])
