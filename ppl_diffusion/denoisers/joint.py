"""Several sequences side by side as one: each predicted by its own denoiser from its own part.

A model of several independent sequences (sites of a program, elements of a plate) is a chain over
their concatenation, and its denoiser is this one. Sequences that share a denoiser and a length go
to it as one flat batch, and a part that did not change since the last call is not asked about
again, although the row it lies in did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, Kind
from ppl_diffusion.denoisers.checks import without_mask
from ppl_diffusion.denoisers.evaluation import EvaluatedDenoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.processes.base import Process


class _Group(NamedTuple):
    """Sequences of one denoiser and one length: where they lie, int64 ``(copies, L)``."""

    denoiser: EvaluatedDenoiser
    positions: Tensor


class JointDenoiser:
    """A denoiser of concatenated sequences that know nothing of each other.

    Alphabets may differ under an absorbing process: tokens that a part does not have get
    probability zero, and its denoiser sees its own mask id. Costs are those of the parts: rows are
    counted, deduplicated and remembered part by part.

    :param process: the process of the concatenation, with the largest of the vocabularies.
    :param parts: denoiser and length of every sequence, in order.
    :param num_labels: positions behind the last sequence that are predicted to be what they are:
        marks that travel with a row and never change.
    :raises CapabilityError: if the parts' kinds or vocabularies do not fit together.

    :ivar excludes_tokens: whether a filter of a part may exclude tokens that its network allows.
    """

    def __init__(
        self, process: Process, parts: Sequence[tuple[Denoiser, int]], *, num_labels: int = 0
    ) -> None:
        self.vocab_size, self._absorbing = process.vocab_size, process.absorbing
        self.num_labels = num_labels
        denoisers = [denoiser for denoiser, _ in parts]
        self.kind: Kind = _common_kind(denoisers, process)
        self.time_free: bool = all(d.time_free for d in denoisers)
        self.excludes_tokens = any(getattr(d, "excludes_tokens", False) for d in denoisers)
        self.length = sum(length for _, length in parts) + num_labels
        self._groups = _groups(parts)
        self._denoisers = [group.denoiser for group in self._groups]
        if all(hasattr(d, "parameters") for d in denoisers):
            vars(self)["parameters"] = self._parameters

    @property
    def rows_evaluated(self) -> int:
        """Network rows of all parts so far."""
        return sum(denoiser.rows_evaluated for denoiser in self._denoisers)

    @property
    def changes(self) -> tuple[str, ...]:
        """What the parts do to the laws of their networks, each phrase once."""
        phrases = [phrase for d in self._denoisers for phrase in getattr(d, "changes", ())]
        return tuple(dict.fromkeys(phrases))

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return log-probabilities, float64 ``(*batch, L, V)``; ``L`` is the sum of all lengths."""
        if tokens.shape[-1] != self.length:
            raise ValueError(
                f"this denoiser is for {self.length} positions, got {tokens.shape[-1]}."
            )
        shape, device = (*tokens.shape, self.vocab_size), tokens.device
        log_c = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        for denoiser, positions in self._groups:
            own, size = self._own(tokens[..., positions], denoiser), denoiser.vocab_size
            rows = without_mask(denoiser(own, _per_part(t, own)), own.shape, size)
            log_c[..., positions.flatten(), :size] = rows.flatten(-3, -2).to(torch.float64)
        if self.num_labels:
            labels = tokens[..., -self.num_labels :].clamp_max(self.vocab_size - 1)
            log_c[..., -self.num_labels :, :].scatter_(-1, labels[..., None], 0.0)
        return log_c

    def _own(self, tokens: Tensor, denoiser: Denoiser) -> Tensor:
        """Return states in the ids of a part's own alphabet, the mask being the one that moves."""
        if not self._absorbing or denoiser.vocab_size == self.vocab_size:
            return tokens
        return torch.where(tokens == self.vocab_size, denoiser.vocab_size, tokens)

    def _parameters(self) -> Iterator[Tensor]:
        for denoiser in self._denoisers:
            yield from denoiser.parameters()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"JointDenoiser({', '.join(repr(d.denoiser) for d in self._denoisers)})"


def _groups(parts: Sequence[tuple[Denoiser, int]]) -> list[_Group]:
    """Gather the sequences that can be asked about in one batch."""
    found: dict[tuple[int, int], tuple[Denoiser, list[Tensor]]] = {}
    start = 0
    for denoiser, length in parts:
        _, places = found.setdefault((id(denoiser), length), (denoiser, []))
        places.append(torch.arange(start, start + length, device="cpu"))
        start += length
    return [_Group(EvaluatedDenoiser(d), torch.stack(places)) for d, places in found.values()]


def _common_kind(denoisers: Sequence[Denoiser], process: Process) -> Kind:
    kinds = {denoiser.kind for denoiser in denoisers}
    sizes = {denoiser.vocab_size for denoiser in denoisers}
    fits = max(sizes) <= process.vocab_size if process.absorbing else sizes == {process.vocab_size}
    if not fits:
        raise CapabilityError(
            f"JointDenoiser: parts with {sorted(sizes)} tokens do not fit {process!r}; only masked "
            "sequences may have alphabets of different sizes."
        )
    if process.absorbing:  # where a token is masked the two kinds coincide
        return "cavity"
    if len(kinds) > 1:
        raise CapabilityError(
            "JointDenoiser: one part is a cavity denoiser and another a posterior one; build all "
            "with one kind."
        )
    return kinds.pop()


def _per_part(t: float | Tensor, own: Tensor) -> float | Tensor:
    """Return one time per sequence where there is one per row."""
    if not isinstance(t, Tensor) or t.numel() == 1:
        return t
    return t.expand(own.shape[:-2])[..., None].expand(own.shape[:-1])
