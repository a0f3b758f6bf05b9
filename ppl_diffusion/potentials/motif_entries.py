"""Motifs as they stand in files: entries of numbered lines, and what their numbers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ppl_diffusion.potentials.motifs import ROW_TOLERANCE, MotifMatrix

BASES = "ACGT"
NUM_SITES = 20.0
"""What the MEME suite assumes where a file gives probabilities and no number of sites."""
_FEWEST_SITES = 1.5


@dataclass(frozen=True, eq=False)
class Motif:
    """A matrix as it stands in a file.

    :param identifier: such as ``"MA0108.1"``.
    :param name: such as ``"TBP"``; equal to the identifier where the file gives none.
    :param probabilities: float64 ``(W, 4)``, bases in the order A, C, G, T, rows sum to one.
    :param sites: number of sites the probabilities were counted on.
    """

    identifier: str
    name: str
    probabilities: Tensor
    sites: float

    def potential(self, **options: Any) -> MotifMatrix:
        options = {"name": f"motif {self.name}", "sites": self.sites, **options}
        return MotifMatrix.from_probabilities(self.probabilities, **options)


class Line(NamedTuple):
    """A line of a file, counted from one."""

    number: int
    text: str

    def damaged(self, expected: str) -> DamagedMotif:
        return DamagedMotif(f"line {self.number} ({self.text[:40]!r}): {expected}")


class DamagedMotif(ValueError):
    """An entry cannot be read; the text names the line."""


@dataclass(frozen=True)
class Entry:
    """One motif of a file: its heading, which may be missing, and the lines below it."""

    heading: Line | None
    body: Sequence[Line]

    @property
    def first(self) -> Line:
        return self.heading or self.body[0]

    @property
    def last(self) -> Line:
        return self.body[-1] if self.body else self.first


def motif_of(identifier: str, name: str, table: Tensor, line: Line) -> Motif:
    """Make a motif of a table, after asking whether it holds counts or probabilities.

    :param table: ``(W, 4)``, bases in the order A, C, G, T.
    :param line: what an error names.
    :raises DamagedMotif: if it holds neither.
    """
    if not table.numel():
        raise line.damaged(f"{identifier} has no position")
    if bool((table < 0).any()):
        raise line.damaged(f"numbers of {identifier} must not be negative (log-odds are no counts)")
    totals = table.sum(-1, keepdim=True)
    if bool((totals <= 0).any()):
        raise line.damaged(f"every position of {identifier} must have counts")
    if not math.isfinite(float(totals.sum())):
        raise line.damaged(f"the numbers of {identifier} are too large to be counts")
    shares = bool(((totals - 1).abs() <= ROW_TOLERANCE).all())
    if not shares and float(totals.mean()) < _FEWEST_SITES:
        raise line.damaged(
            f"the numbers of {identifier} are no counts, and no probabilities that sum to one"
        )
    return Motif(identifier, name, table / totals, NUM_SITES if shares else float(totals.mean()))
