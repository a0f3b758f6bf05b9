"""Denoisers that are exact for a known data law: the ground of every correctness test.

Both return, for each position, the exact law of its clean token given the noised sequence:
``kind="cavity"`` leaves that position's own state out (the kernel's single-site bridge is exact if
and only if it is given the cavity), ``kind="posterior"`` keeps it in. Both are array-API code: made
of JAX arrays they answer in JAX.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from array_api_compat import is_jax_array
from torch import Tensor

from ppl_diffusion.arrays import Array, array_namespace, device_of, float64_of, to_float64
from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.processes.base import Process


class TableDenoiser:
    """Exact denoiser of a joint distribution given as a table.

    Cost and memory grow as ``V ** L`` per row: for tiny chains.

    :param joint: probabilities, shape ``(V,) * L``.
    :param process: forward process that noised the tokens.
    :raises ValueError: if the table is not a distribution or does not fit the process.
    """

    def __init__(self, joint: Array, process: Process, *, kind: Kind = "cavity") -> None:
        joint = _float64(joint)
        if joint.ndim < 1 or set(joint.shape) != {process.vocab_size}:
            raise ValueError(
                f"joint must have shape (V,) * L with V = {process.vocab_size}, "
                f"got {tuple(joint.shape)}."
            )
        if not bool((joint >= 0).all()) or abs(float(joint.sum()) - 1) > 1e-6:
            raise ValueError("joint must hold non-negative probabilities that sum to one.")
        self.process, self.kind, self.vocab_size = process, kind, process.vocab_size
        self.time_free = process.absorbing
        self.joint = joint / joint.sum()

    @property
    def length(self) -> int:
        """Number ``L`` of positions."""
        return self.joint.ndim

    def __call__(self, tokens: Array, t: float | Array, /) -> Array:
        """Return exact log-probabilities, shape ``(*batch, L, V)``, float64."""
        _check_length(tokens, self.length)
        evidence = emission(self.process, tokens, t)  # (*batch, L, V)
        sites = [self._site_weights(evidence, site) for site in range(self.length)]
        weights = array_namespace(tokens).stack(sites, axis=-2)
        if self.kind == "posterior":
            weights = weights * evidence
        return _normalised_log(weights)

    def parameters(self) -> Iterator[Array]:
        """Yield the table, which is all the output depends on."""
        yield self.joint

    def to(self, device: torch.device | str) -> Self:
        """Move the table, in place."""
        self.joint = self.joint.to(device)
        return self

    def _site_weights(self, evidence: Array, site: int) -> Array:
        """Return ``sum_x p(x) 1[x_site = v] prod_{l != site} q(z_l | x_l)``, ``(*batch, V)``."""
        xp, weight = array_namespace(evidence), self.joint.reshape(-1)
        for other in range(self.length):
            if other != site:
                column = _sequences(self.vocab_size, self.length)[:, other]
                tokens = xp.asarray(column, device=device_of(evidence))
                weight = weight * xp.take(evidence[..., other, :], tokens, axis=-1)
        # Position ``site`` is one axis of the table: all others are summed away.
        table = weight.reshape(*weight.shape[:-1], *self.joint.shape)
        gone = tuple(axis - self.length for axis in range(self.length) if axis != site)
        totals = xp.sum(table, axis=gone) if gone else table
        return xp.broadcast_to(totals, (*evidence.shape[:-2], self.vocab_size))


class MarkovDenoiser:
    """Exact denoiser of a Markov chain along positions, by forward-backward, for any length.

    Vectorised over the batch; the recursion runs along positions once each way.

    :param initial: probabilities of the first token, shape ``(V,)``.
    :param transition: row-stochastic matrix, shape ``(V, V)``.
    :param process: forward process that noised the tokens.
    :raises ValueError: if the arrays are not distributions over the process's vocabulary.
    """

    def __init__(
        self, initial: Array, transition: Array, process: Process, *, kind: Kind = "cavity"
    ) -> None:
        self.initial = _stochastic(initial, (process.vocab_size,), "initial")
        self.transition = _stochastic(transition, (process.vocab_size,) * 2, "transition")
        self.process, self.kind, self.vocab_size = process, kind, process.vocab_size
        self.time_free = process.absorbing

    def __call__(self, tokens: Array, t: float | Array, /) -> Array:
        """Return exact log-probabilities, shape ``(*batch, L, V)``, float64."""
        xp, evidence = array_namespace(tokens), emission(self.process, tokens, t)
        sites = [evidence[..., site, :] for site in range(evidence.shape[-2])]
        # p(x_l, z_{<l}) and p(z_{>l} | x_l), up to scale
        forward = [xp.broadcast_to(self.initial, sites[0].shape)]
        for site in sites[:-1]:
            forward.append(_rescaled((forward[-1] * site) @ self.transition))
        backward = [xp.ones_like(sites[0])]
        for site in reversed(sites[1:]):
            backward.append(_rescaled((backward[-1] * site) @ self.transition.T))
        weights = xp.stack(forward, axis=-2) * xp.stack(backward[::-1], axis=-2)
        return _normalised_log(weights * evidence if self.kind == "posterior" else weights)

    def parameters(self) -> Iterator[Tensor]:
        """Yield the two arrays that are all the output depends on."""
        yield from (self.initial, self.transition)

    def to(self, device: torch.device | str) -> Self:
        """Move the two arrays, in place."""
        self.initial, self.transition = self.initial.to(device), self.transition.to(device)
        return self

    def sample(
        self, shape: tuple[int, ...], length: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw sequences from the data law, int64 ``(*shape, length)``."""
        tokens = [_draw(self.initial.expand(*shape, -1), generator)]
        for _ in range(length - 1):
            tokens.append(_draw(self.transition[tokens[-1]], generator))
        return torch.stack(tokens, -1)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Return the data law's log-probability, float64 ``(*batch,)``.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        """
        moves = self.transition.log()[x0[..., :-1], x0[..., 1:]]
        return self.initial.log()[x0[..., 0]] + moves.sum(-1)


def emission(process: Process, tokens: Array, t: float | Array) -> Array:
    """Return ``q(z_t | x)`` for every clean ``x``, float64 ``(*batch, L, V)``.

    For the absorbing process without its factors ``alpha`` and ``1 - alpha``, which no clean token
    feels: one-hot for a revealed token and ones for a mask, at any time.

    :param t: the time, one number for all rows.
    """
    xp = array_namespace(tokens)
    clean = xp.arange(process.vocab_size, device=device_of(tokens))
    kept = xp.astype(tokens[..., None] == clean, float64_of(xp))
    noise = process.prior_prob(tokens)[..., None]
    if process.absorbing:  # a prompt is revealed at alpha = 0 already
        return kept + noise
    # A number, not NumPy's array of no dimensions, which torch does not multiply.
    a = process.schedule.alpha(t) if is_jax_array(t) else float(process.schedule.alpha(float(t)))
    return a * kept + (1 - a) * noise


@cache
def _sequences(size: int, length: int) -> np.ndarray:
    """Return all sequences in the order of a flattened table, ``(size ** length, length)``."""
    return np.stack([axis.ravel() for axis in np.indices((size,) * length)], axis=-1)


def _check_length(tokens: Array, length: int) -> None:
    if tokens.shape[-1] != length:
        raise ValueError(f"this denoiser is for {length} positions, got {tokens.shape[-1]}.")


def _stochastic(values: Array, shape: tuple[int, ...], name: str) -> Array:
    values = _float64(values)
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}.")
    if not bool((values >= 0).all()) or not bool((abs(values.sum(-1) - 1) < 1e-6).all()):
        raise ValueError(f"{name} must hold probabilities that sum to one along the last axis.")
    return values / values.sum(-1)[..., None]


def _float64(values: Any) -> Array:
    if is_jax_array(values) or isinstance(values, Tensor):
        return to_float64(values)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _rescaled(message: Array) -> Array:
    xp = array_namespace(message)
    top = xp.max(message, axis=-1, keepdims=True)
    return message / xp.where(top > 0, top, 1.0)


def _normalised_log(weights: Array) -> Array:
    """Normalise rows; a row that no data can explain becomes uniform instead of NaN."""
    xp = array_namespace(weights)
    total = xp.sum(weights, axis=-1, keepdims=True)
    live = total > 0
    return xp.log(xp.where(live, weights / xp.where(live, total, 1.0), 1.0 / weights.shape[-1]))


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.reshape(probs.shape[:-1])
