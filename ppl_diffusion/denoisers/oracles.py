"""Denoisers that are exact for a known data law: the ground of every correctness test.

Both return, for each position, the exact law of its clean token given the noised sequence:
``kind="cavity"`` leaves that position's own state out (the kernel's single-site bridge is exact if
and only if it is given the cavity), ``kind="posterior"`` keeps it in.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Kind
from ppl_diffusion.processes.base import Process


class TableDenoiser:
    """Exact denoiser of a joint distribution given as a table.

    Cost and memory grow as ``V ** L`` per row: for tiny chains.

    :param joint: probabilities, shape ``(V,) * L``.
    :param process: forward process that noised the tokens.
    :raises ValueError: if the table is not a distribution or does not fit the process.
    """

    def __init__(self, joint: Tensor, process: Process, *, kind: Kind = "cavity") -> None:
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
        every = torch.arange(self.vocab_size, device=joint.device)
        grid = torch.cartesian_prod(*[every] * joint.ndim)
        self._sequences = grid.reshape(-1, joint.ndim)

    @property
    def length(self) -> int:
        """Number ``L`` of positions."""
        return self.joint.ndim

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return exact log-probabilities, shape ``(*batch, L, V)``, float64."""
        _check_length(tokens, self.length)
        evidence = emission(self.process, tokens, t)  # (*batch, L, V)
        weights = torch.stack(
            [self._site_weights(evidence, site) for site in range(self.length)], -2
        )
        if self.kind == "posterior":
            weights = weights * evidence
        return _normalised_log(weights)

    def parameters(self) -> Iterator[Tensor]:
        """Yield the table, which is all the output depends on."""
        yield self.joint

    def to(self, device: torch.device | str) -> Self:
        """Move the table, in place."""
        self.joint, self._sequences = self.joint.to(device), self._sequences.to(device)
        return self

    def _site_weights(self, evidence: Tensor, site: int) -> Tensor:
        """Return ``sum_x p(x) 1[x_site = v] prod_{l != site} q(z_l | x_l)``, ``(*batch, V)``."""
        weight = self.joint.reshape(-1)
        for other in range(self.length):
            if other != site:
                weight = weight * evidence[..., other, :][..., self._sequences[:, other]]
        weight = weight.expand(*evidence.shape[:-2], -1)
        totals = weight.new_zeros(*weight.shape[:-1], self.vocab_size)
        return totals.index_add(-1, self._sequences[:, site], weight)


class MarkovDenoiser:
    """Exact denoiser of a Markov chain along positions, by forward-backward, for any length.

    Vectorised over the batch; the recursion runs along positions once each way.

    :param initial: probabilities of the first token, shape ``(V,)``.
    :param transition: row-stochastic matrix, shape ``(V, V)``.
    :param process: forward process that noised the tokens.
    :raises ValueError: if the arrays are not distributions over the process's vocabulary.
    """

    def __init__(
        self, initial: Tensor, transition: Tensor, process: Process, *, kind: Kind = "cavity"
    ) -> None:
        self.initial = _stochastic(initial, (process.vocab_size,), "initial")
        self.transition = _stochastic(transition, (process.vocab_size,) * 2, "transition")
        self.process, self.kind, self.vocab_size = process, kind, process.vocab_size
        self.time_free = process.absorbing

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return exact log-probabilities, shape ``(*batch, L, V)``, float64."""
        evidence = emission(self.process, tokens, t)
        sites = evidence.unbind(-2)
        forward = [self.initial.expand_as(sites[0])]  # p(x_l, z_{<l}) up to scale
        for site in sites[:-1]:
            forward.append(_rescaled((forward[-1] * site) @ self.transition))
        backward = [torch.ones_like(sites[0])]  # p(z_{>l} | x_l) up to scale
        for site in reversed(sites[1:]):
            backward.append(_rescaled((backward[-1] * site) @ self.transition.T))
        weights = torch.stack(forward, -2) * torch.stack(backward[::-1], -2)
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


def emission(process: Process, tokens: Tensor, t: float | Tensor) -> Tensor:
    """Return ``q(z_t | x)`` for every clean ``x``, float64 ``(*batch, L, V)``.

    For the absorbing process without its factors ``alpha`` and ``1 - alpha``, which no clean token
    feels: one-hot for a revealed token and ones for a mask, at any time.
    """
    kept = torch.nn.functional.one_hot(tokens, process.num_states)[..., : process.vocab_size]
    noise = process.prior_prob(tokens)[..., None]
    if process.absorbing:  # a prompt is revealed at alpha = 0 already
        return kept.to(torch.float64) + noise
    a = float(process.schedule.alpha(float(t)))
    return a * kept.to(torch.float64) + (1 - a) * noise


def _check_length(tokens: Tensor, length: int) -> None:
    if tokens.shape[-1] != length:
        raise ValueError(f"this denoiser is for {length} positions, got {tokens.shape[-1]}.")


def _stochastic(values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    values = _float64(values)
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}.")
    if not bool((values >= 0).all()) or not bool(((values.sum(-1) - 1).abs() < 1e-6).all()):
        raise ValueError(f"{name} must hold probabilities that sum to one along the last axis.")
    return values / values.sum(-1, keepdim=True)


def _float64(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def _rescaled(message: Tensor) -> Tensor:
    return message / message.amax(-1, keepdim=True).clamp_min(torch.finfo(message.dtype).tiny)


def _normalised_log(weights: Tensor) -> Tensor:
    """Normalise rows; a row that no data can explain becomes uniform instead of NaN."""
    total = weights.sum(-1, keepdim=True)
    uniform = torch.full_like(weights, 1.0 / weights.shape[-1])
    return torch.log(
        torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), uniform)
    )


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.reshape(probs.shape[:-1])
