"""Hard constraints: potentials that are 0 or ``-inf``, with a graded look-ahead.

A constraint knows by how much a sequence violates it. The exact potential only asks whether the
violation is zero; the look-ahead at unfinished sequences subtracts a penalty per unit, so that
particles are led towards the allowed set and never removed early.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.base import AbstractPotential, check_log_potential
from ppl_diffusion.potentials.dna import (
    Vocabulary,
    check_tokens,
    ids_of,
    parse_iupac,
    scan,
    strand_tables,
)

_BASES = "ACGT"


class AbstractConstraint(AbstractPotential):
    """Base of hard constraints; subclasses implement :meth:`violation`."""

    penalty: float = 1.0

    @abstractmethod
    def violation(self, x0: Tensor) -> Tensor:
        """Return by how much each sequence violates the constraint.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: ``(*batch,)``, 0 where the constraint holds, positive and finite elsewhere.
        """

    def satisfied(self, x0: Tensor) -> Tensor:
        """Return whether each sequence ``(*batch, L)`` is allowed, bool ``(*batch,)``."""
        return self._checked_violation(x0) == 0

    def log_potential(self, x0: Tensor) -> Tensor:
        zero = torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
        return zero.masked_fill(~self.satisfied(x0), -math.inf)

    def lookahead(self, x0: Tensor) -> Tensor:
        return -self.penalty * self._checked_violation(x0)

    def _checked_violation(self, x0: Tensor) -> Tensor:
        violation = check_log_potential(self.violation(x0), x0, self.name)
        if bool((violation < 0).any()):
            raise PotentialError(
                f"{self.name} returned a negative violation, {float(violation.min()):g}; "
                "return 0 where the constraint holds and a positive number elsewhere."
            )
        return violation

    def _set_penalty(self, penalty: float) -> None:
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"{self.name}: penalty must be finite and >= 0, got {penalty}.")
        self.penalty = float(penalty)


class Constraint(AbstractConstraint):
    """A hard constraint given by a function.

    :param violation: ``x0 (*batch, L) int64 -> (*batch,)``: 0 where the constraint holds, and how
        badly it is violated elsewhere (the number of wrong tokens, say).
    :param penalty: nats per unit of violation in the look-ahead.

    Example::

        starts_with_a = Constraint(lambda x0: x0[..., 0] != 0)
    """

    def __init__(
        self,
        violation: Callable[[Tensor], Tensor],
        *,
        penalty: float = 1.0,
        name: str | None = None,
    ) -> None:
        self.fn = violation
        self.name = name or str(getattr(violation, "__name__", type(violation).__name__))
        self._set_penalty(penalty)

    def violation(self, x0: Tensor) -> Tensor:
        return self.fn(x0)

    def __repr__(self) -> str:
        return f"Constraint({self.name})"


class GCContent(AbstractConstraint):
    """The share of G and C lies between two bounds, both included.

    The violation counts the bases that would have to change.

    :param low: smallest share, 0 to 1.
    :param high: largest share, 0 to 1.
    :param vocabulary: the letter of every token id.
    :param padding: token that fills short sequences up, which is no base; None if there is none.
    :param penalty: nats per base outside the range in the look-ahead. The log-odds of GC in the
        range against the prior is about right: 1 or more is so greedy, with argmax fills, that the
        evidence is too small in most runs.
    """

    def __init__(
        self,
        low: float,
        high: float,
        *,
        vocabulary: Vocabulary = _BASES,
        padding: int | None = None,
        penalty: float = 0.5,
    ) -> None:
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"The GC range must satisfy 0 <= low <= high <= 1, got {low} to {high}."
            )
        self.low, self.high = float(low), float(high)
        self.name = f"GC content {low:g} to {high:g}"
        self._counts = torch.zeros(len(list(vocabulary)), dtype=torch.float64)
        self._counts[ids_of("GC", vocabulary)] = 1.0
        self.padding = padding
        self._set_penalty(penalty)

    def violation(self, x0: Tensor) -> Tensor:
        check_tokens(x0, len(self._counts), 1, self.name)
        length = x0.new_full(x0.shape[:-1], x0.shape[-1])
        if self.padding is not None:
            length = (x0 != self.padding).sum(-1)
        # The tolerance keeps bounds such as 0.55 * 80 = 44.00000000000001 inclusive.
        fewest = (self.low * length.double() - 1e-9).ceil()
        most = (self.high * length.double() + 1e-9).floor()
        if self.padding is None and length.numel() and bool((fewest > most).all()):
            raise PotentialError(
                f"{self.name} allows no sequence of length {x0.shape[-1]}; widen the range."
            )
        count = self._counts.to(x0.device)[x0].sum(-1)
        return (fewest - count).clamp_min(0) + (count - most).clamp_min(0)

    def __repr__(self) -> str:
        return f"GCContent({self.low:g}, {self.high:g})"


class ForbiddenTokens(AbstractConstraint):
    """A piece occurs nowhere, token by token. The violation counts the positions where it does.

    :param tokens: ids of the piece.
    :param vocab_size: number ``V`` of clean tokens.
    :param penalty: nats per occurrence in the look-ahead.
    :raises ValueError: if the piece is empty, or holds another id.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        vocab_size: int,
        *,
        name: str | None = None,
        penalty: float = 1.0,
    ) -> None:
        self.tokens = list(tokens)
        if not self.tokens or not 0 <= min(self.tokens) <= max(self.tokens) < vocab_size:
            raise ValueError(
                f"ForbiddenTokens: a piece holds ids 0 to {vocab_size - 1}, got {self.tokens}."
            )
        self.name = name or f"forbidden tokens {self.tokens}"
        self._table = torch.ones(len(self.tokens), vocab_size, dtype=torch.float64)
        self._table[torch.arange(len(self.tokens)), torch.tensor(self.tokens)] = 0.0
        self._set_penalty(penalty)

    def violation(self, x0: Tensor) -> Tensor:
        """Return the number of occurrences; a sequence shorter than the piece holds none."""
        check_tokens(x0, self._table.shape[1], 0, self.name)
        if x0.shape[-1] < len(self.tokens):
            return torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
        return (scan(x0, self._table) == 0).sum(-1).to(torch.float64)

    def __repr__(self) -> str:
        return f"ForbiddenTokens({self.tokens})"


class _MotifConstraint(AbstractConstraint):
    """Counts mismatches of an IUPAC pattern at every position, on the better strand."""

    _kind: ClassVar[str]

    def __init__(
        self,
        motif: str,
        *,
        both_strands: bool = True,
        vocabulary: Vocabulary = _BASES,
        penalty: float = 1.0,
    ) -> None:
        self.name = f"{self._kind} motif {motif}"
        self.motif, self.both_strands = motif.strip().upper(), both_strands
        allowed = parse_iupac(motif)
        mismatch = torch.tensor([[float(b not in bases) for b in _BASES] for bases in allowed])
        self._tables = strand_tables(mismatch, vocabulary, absent=1.0, both_strands=both_strands)
        self._set_penalty(penalty)

    @property
    def width(self) -> int:
        return len(self._tables[0])

    def mismatches(self, x0: Tensor) -> Tensor:
        """Return those of the better strand, float64 ``(*batch, L - W + 1)``."""
        return torch.stack([scan(x0, table) for table in self._tables]).amin(0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.motif!r}, both_strands={self.both_strands})"


class ForbiddenMotif(_MotifConstraint):
    """A motif occurs nowhere. The violation counts the positions where it does.

    :param motif: IUPAC pattern, such as ``"GAATTC"`` or ``"GGNCC"``.
    :param both_strands: whether the reverse complement is forbidden as well.
    :param vocabulary: the letter of every token id.
    :param penalty: nats per occurrence in the look-ahead.
    :raises ValueError: if the motif is no IUPAC pattern.
    """

    _kind = "forbidden"

    def violation(self, x0: Tensor) -> Tensor:
        """Return the number of occurrences; a sequence shorter than the motif holds none."""
        check_tokens(x0, self._tables[0].shape[1], 0, self.name)
        if x0.shape[-1] < self.width:
            return torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
        return (self.mismatches(x0) == 0).sum(-1).to(torch.float64)


class RequiredMotif(_MotifConstraint):
    """A motif occurs at least so many times, at different positions.

    The violation is the number of mismatches of the best ``min_count`` positions.

    :param motif: IUPAC pattern, such as ``"TATAWAW"``.
    :param min_count: occurrences needed; they may overlap.
    :param options: as for :class:`ForbiddenMotif`; ``penalty`` is in nats per mismatch.
    :raises ValueError: if the motif is no IUPAC pattern, or the number is not positive.
    """

    _kind = "required"

    def __init__(self, motif: str, *, min_count: int = 1, **options: Any) -> None:
        super().__init__(motif, **options)
        if min_count < 1:
            raise ValueError(f"{self.name}: min_count must be at least 1, got {min_count}.")
        self.min_count = min_count

    def violation(self, x0: Tensor) -> Tensor:
        check_tokens(x0, self._tables[0].shape[1], self.width + self.min_count - 1, self.name)
        return self.mismatches(x0).topk(self.min_count, largest=False).values.sum(-1)
