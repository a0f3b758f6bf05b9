"""The transformer denoiser in JAX: the network of :class:`ppl_diffusion.denoisers.Transformer`.

It reads the same two files and is the same function, within round-off; there is no dropout, as it
is not trained here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ppl_diffusion.arrays import Array
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.denoisers.config import TransformerConfig
from ppl_diffusion.denoisers.files import WEIGHTS_FILE, read_config

_EPS = 1e-5  # of layer norms, torch's default


class Transformer(eqx.Module):
    """Denoiser ``(tokens, t) -> log p(x0 | tokens, t)``; with classes ``(tokens, t, label)``.

    :param config: shape of the network.
    :param weights: its float32 arrays by the names of the torch module.
    """

    weights: dict[str, Array]
    config: TransformerConfig = eqx.field(static=True)

    @property
    def vocab_size(self) -> int:
        """Number ``V`` of clean tokens."""
        return self.config.vocab_size

    @property
    def kind(self) -> Kind:
        """Whether the prediction at a visible position counts its own token."""
        return self.config.kind

    @property
    def time_free(self) -> bool:
        """Whether the output does not depend on the time."""
        return not self.config.time_conditioning

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a network that the torch module's ``save_pretrained`` wrote.

        :param directory: folder with ``model.safetensors`` and ``config.json``.
        :raises FileNotFoundError: if one of the two files is absent.
        :raises ValueError: if a file is damaged, or the two do not belong together.
        """
        config = read_config(directory, TransformerConfig)
        path = Path(directory) / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"Transformer: {path} does not exist; give the whole folder.")
        try:
            weights = {name: jnp.asarray(value) for name, value in load_file(path).items()}
            network = cls(weights, config)
            jax.eval_shape(network.__call__, jnp.zeros((1, config.max_length), int), 0.5)
        except SafetensorError as error:
            raise ValueError(
                f"Transformer: {path} is not a readable safetensors file ({error}); fetch it anew."
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Transformer: the weights in {path} do not fit the configuration beside them; "
                "keep the two files of one network together."
            ) from error
        return network

    def hidden(self, tokens: Array, t: Array, label: Array | None = None) -> Array:
        """Compute the hidden states that :meth:`head` turns into log-probabilities.

        :param tokens: ids ``(*batch, L)``.
        :param t: one time.
        :param label: class labels, one or ``(*batch,)``; None is no label.
        :returns: float32 ``(*batch, L, dim)``.
        :raises ValueError: if the sequence is too long, or the network knows no labels.
        """
        batch, length = jnp.shape(tokens)[:-1], jnp.shape(tokens)[-1]
        if length > self.config.max_length:
            raise ValueError(
                f"Transformer: sequences of {length} tokens, but the network was built for at most "
                f"{self.config.max_length}; shorten them or build one with a larger max_length."
            )
        condition = self._condition(t, label, batch)
        state = self._stem(jnp.reshape(tokens, (-1, length)))
        turn = _rotations(length, self.config.dim // self.config.heads)
        for block in range(self.config.depth):
            state = self._block(f"blocks.{block}", state, turn, condition)
        return self._norm("norm", state, condition).reshape(*batch, length, self.config.dim)

    def head(self, hidden: Array) -> Array:
        """Turn hidden states into log-probabilities of clean tokens, float32 ``(..., V)``."""
        logits = self._linear("vocabulary", hidden)
        if self.config.num_padding:
            letters = self.config.vocab_size - self.config.num_padding
            logits = logits.at[..., letters:].set(-jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)

    def __call__(self, tokens: Array, t: Array, label: Array | None = None) -> Array:
        """Return ``head(hidden(tokens, t, label))``, ``(*batch, L, V)``."""
        return self.head(self.hidden(tokens, t, label))

    def at(self, tokens: Array, t: Array, positions: Array, label: Array | None = None) -> Array:
        """Return the log-probabilities at some positions: of a large vocabulary only what is asked.

        :param positions: ``(*batch, m)``; their number ``m`` is part of the compiled shape.
        :returns: ``(*batch, m, V)``.
        """
        hidden = self.hidden(tokens, t, label)
        return self.head(jnp.take_along_axis(hidden, positions[..., None], axis=-2))

    def _linear(self, name: str, x: Array) -> Array:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _stem(self, tokens: Array) -> Array:
        length, reach = tokens.shape[-1], self.config.stem_width // 2
        padded = jnp.pad(
            tokens, ((0, 0), (reach, reach)), constant_values=self.config.num_states
        )  # one more symbol than there are states: what lies beyond the ends
        state: Array = sum(
            self.weights[f"stem.tables.{i}.weight"][padded[:, i : i + length]]
            for i in range(self.config.stem_width)
        )
        positions = self.weights.get("stem.positions")
        return state if positions is None else state + positions[:length]

    def _condition(self, t: Array, label: Array | None, batch: tuple[int, ...]) -> Array | None:
        parts = []
        if self.config.time_conditioning:
            features = _time_features(jnp.asarray(t), self.weights["time.layers.0.weight"].shape[1])
            inner = jax.nn.silu(self._linear("time.layers.0", features))
            parts.append(self._linear("time.layers.2", inner)[None])
        if self.config.num_classes:
            ids = self.config.num_classes if label is None else label
            rows = jnp.broadcast_to(jnp.asarray(ids), batch).reshape(-1)
            parts.append(self.weights["label.weight"][rows])
        elif label is not None:
            raise ValueError(
                "Transformer: a label was given to a network without classes; leave it out."
            )
        return jax.nn.silu(sum(parts))[:, None, :] if parts else None

    def _norm(self, name: str, state: Array, condition: Array | None) -> Array:
        mean = state.mean(-1, keepdims=True)
        variance = jnp.square(state - mean).mean(-1, keepdims=True)
        normed = (state - mean) / jnp.sqrt(variance + _EPS)
        if condition is None:
            return normed * self.weights[f"{name}.norm.weight"] + self.weights[f"{name}.norm.bias"]
        scale, shift = jnp.split(self._linear(f"{name}.modulation", condition), 2, axis=-1)
        return shift + normed * (1.0 + scale)

    def _block(self, name: str, state: Array, turn: Array, condition: Array | None) -> Array:
        branches = [self._attention, self._perceptron]
        if self.config.conv_width:
            branches.insert(0, self._convolution)
        for i, branch in enumerate(branches):
            inner = branch(
                f"{name}.branches.{i}", self._norm(f"{name}.norms.{i}", state, condition), turn
            )
            if condition is not None:
                inner = inner * self._linear(f"{name}.gates.{i}.modulation", condition)
            state = state + inner
        return state

    def _attention(self, name: str, state: Array, turn: Array) -> Array:
        rows, length, dim = state.shape
        heads = self.config.heads
        joint = self._linear(f"{name}.inputs", state).reshape(rows, length, 3, heads, dim // heads)
        query, key = (_turned(joint[:, :, i], turn) for i in (0, 1))
        mixed = jax.nn.dot_product_attention(query, key, joint[:, :, 2])
        return self._linear(f"{name}.output", mixed.reshape(rows, length, dim))

    def _convolution(self, name: str, state: Array, turn: Array) -> Array:
        # A sum of shifted rows: XLA's grouped convolution is several times slower on the CPU.
        width, length = self.config.conv_width, state.shape[1]
        taps = self.weights[f"{name}.filter.weight"][:, 0]
        padded = jnp.pad(state, ((0, 0), (width // 2, width // 2), (0, 0)))
        moved = sum(padded[:, i : i + length] * taps[:, i] for i in range(width))
        return self._linear(f"{name}.mix", jax.nn.silu(moved + self.weights[f"{name}.filter.bias"]))

    def _perceptron(self, name: str, state: Array, turn: Array) -> Array:
        inner = jax.nn.gelu(self._linear(f"{name}.0", state), approximate=False)
        return self._linear(f"{name}.2", inner)


def _rotations(length: int, width: int) -> np.ndarray:
    """Return cosines and sines of the angles of positions, ``(2, L, 1, width / 2)``."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    return np.stack([np.cos(angles), np.sin(angles)])[:, :, None].astype(np.float32)


def _turned(x: Array, turn: Array) -> Array:
    """Rotate pairs: position ``i`` of the first half of a head with ``i`` of its second."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = turn
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _time_features(t: Array, size: int) -> Array:
    rates = np.exp(np.linspace(0.0, np.log(1000.0), size // 2))
    angles = t * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]).astype(jnp.float32)
