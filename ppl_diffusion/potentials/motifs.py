"""Position weight matrices as potentials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.potentials.dna import Vocabulary, check_tokens, scan, strand_tables

Reduction = Literal["max", "logmeanexp"]
_UNIFORM = (0.25, 0.25, 0.25, 0.25)
ROW_TOLERANCE = 0.02 + 1e-9
"""How far from one the probabilities of a position may sum: four numbers of two decimals."""


class MotifMatrix(AbstractPotential):
    """The log-odds of a motif against a background, at its best position or averaged over all.

    With ``reduce="max"`` the potential is the score of the best hit. With ``"logmeanexp"`` it is
    the log-likelihood ratio of a sequence that holds the motif exactly once, at a uniformly random
    position and strand, against the background alone (the one-occurrence model of MEME).

    :param log_odds: finite log-odds in nats, ``(W, 4)``, bases in the order A, C, G, T.
    :param reduce: ``"max"`` or ``"logmeanexp"``.
    :param both_strands: whether the reverse complement is scanned as well.
    :param vocabulary: the letter of every token id; tokens that are no base score like the worst
        base of the column.
    """

    def __init__(
        self,
        log_odds: Tensor | Sequence[Sequence[float]],
        *,
        reduce: Reduction = "max",
        both_strands: bool = True,
        vocabulary: Vocabulary = "ACGT",
        name: str = "motif",
    ) -> None:
        columns = _as_matrix(log_odds, name)
        if reduce not in ("max", "logmeanexp"):
            raise ValueError(f'{name}: reduce is "max" or "logmeanexp", got {reduce!r}.')
        self.log_odds, self.reduce = columns, reduce
        self.both_strands, self.name = both_strands, name
        worst = float(columns.min())
        self._tables = strand_tables(columns, vocabulary, absent=worst, both_strands=both_strands)

    @classmethod
    def from_probabilities(
        cls,
        probabilities: Tensor | Sequence[Sequence[float]],
        *,
        sites: float = 100.0,
        pseudocount: float = 1.0,
        background: Sequence[float] = _UNIFORM,
        **options: Any,
    ) -> MotifMatrix:
        """Build log-odds from base probabilities, with a pseudo-count so that none is infinite.

        ``log(((sites * p + pseudocount * b) / (sites + pseudocount)) / b)``

        :param probabilities: ``(W, 4)``, rows sum to one up to the rounding to two decimals, bases
            in the order A, C, G, T.
        :param sites: number of sites the probabilities were counted on.
        :param pseudocount: counts added to each column, shared out as the background.
        :param background: probabilities ``b`` of the four bases outside the motif.
        :raises ValueError: if a number is out of range or a row does not sum to one.
        """
        name = options.get("name", "motif")
        p, b = _as_matrix(probabilities, name), torch.tensor(background, dtype=torch.float64)
        _check_probabilities(p, name)
        _check_background(b, name)
        if not (sites > 0 and pseudocount > 0 and math.isfinite(sites + pseudocount)):
            raise ValueError(
                f"{name}: sites and pseudocount must be positive and finite, got {sites} and "
                f"{pseudocount}."
            )
        p = p / p.sum(-1, keepdim=True)
        smoothed = (sites * p + pseudocount * b) / (sites + pseudocount)
        return cls((smoothed / b).log(), **options)

    @property
    def width(self) -> int:
        return len(self.log_odds)

    def scores(self, x0: Tensor) -> Tensor:
        """Return the log-odds at every position of each strand.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: nats, float64 ``(*batch, S, L - W + 1)`` with ``S`` strands, forward first.
        :raises PotentialError: if the sequences are shorter than the motif or hold other tokens.
        """
        check_tokens(x0, self._tables[0].shape[1], self.width, self.name)
        return torch.stack([scan(x0, table) for table in self._tables], dim=-2)

    def log_potential(self, x0: Tensor) -> Tensor:
        scores = self.scores(x0).flatten(-2)
        if self.reduce == "max":
            return scores.amax(-1)
        return scores.logsumexp(-1) - math.log(scores.shape[-1])

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the log-potential, which is finite."""
        return self(x0)

    def best_hit(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the motif fits best.

        :param x0: clean tokens, int64 ``(*batch, L)``.
        :returns: score (nats), position of the window's first base, and strand (0 forward,
            1 reverse), each ``(*batch,)``.
        """
        scores = self.scores(x0)
        best = scores.flatten(-2).max(-1)
        windows = scores.shape[-1]
        return best.values, best.indices % windows, best.indices // windows

    def __repr__(self) -> str:
        return f"MotifMatrix({self.name}, width={self.width}, reduce={self.reduce!r})"


def _as_matrix(values: Tensor | Sequence[Sequence[float]], name: str) -> Tensor:
    matrix = torch.as_tensor(values, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[1] != 4 or not len(matrix):
        raise ValueError(
            f"{name}: the matrix must have one row of 4 numbers (A, C, G, T) per position, got "
            f"shape {tuple(matrix.shape)}."
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{name}: the matrix must be finite; add a pseudo-count before logarithms."
        )
    return matrix


def _check_probabilities(p: Tensor, name: str) -> None:
    off = (p.sum(-1) - 1).abs()
    if bool((p < 0).any()) or float(off.max()) > ROW_TOLERANCE:
        raise ValueError(
            f"{name}: row {int(off.argmax())} sums to {float(p.sum(-1)[off.argmax()]):g}; give "
            "probabilities that are not negative and sum to one at each position."
        )


def _check_background(b: Tensor, name: str) -> None:
    if b.shape != (4,) or bool((b <= 0).any()) or abs(float(b.sum()) - 1) > 0.01:
        raise ValueError(
            f"{name}: the background must be 4 positive probabilities that sum to one, got "
            f"{b.tolist()}."
        )
