"""Sums, differences and products of whole numbers as strings of ten characters.

The operands are 0 to 99, differences are not negative, and every number stands at the right end of
its columns: ``17+25=42`` is ``17+25=__42`` and ``7*8=56`` is ``_7*_8=__56``. All of them are
generated, so that a prior over them needs no data, and a right equation can be told from a wrong
one: what a prior believes of a question and what is true are two things that can be compared.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ppl_diffusion.models.sequences import PADDING, Sequences, unrelated
from ppl_diffusion.potentials.constraints import AbstractConstraint
from ppl_diffusion.potentials.embedded import EmbeddedPotential

OPERATIONS = "+-*"
LETTERS = "0123456789" + OPERATIONS + "=" + PADDING
LENGTH = 10
_OPERANDS, _RESULTS = 100, 10_000
_SEED = 20_251_129
_VALID, _TEST = 500, 2500


def equations() -> Tensor:
    """Return all right equations, ids of :data:`LETTERS`, int64 ``(25050, 10)``."""
    operation, first, second, result = _right()
    parts = [
        _spelled(first, 2),
        len("0123456789") + operation[:, None],
        _spelled(second, 2),
        torch.full((len(first), 1), LETTERS.index("=")),
        _spelled(result, 4),
    ]
    return torch.cat(parts, -1)


def spell(text: str) -> str:
    """Return an equation in its ten columns; ``?`` stands for a character to be found.

    :param text: as ``"17+2?=42"``.
    :raises ValueError: if it is no equation of that form.
    """
    left, equals, result = text.partition("=")
    operation = next((letter for letter in left if letter in OPERATIONS), "")
    first, _, second = left.partition(operation) if operation else ("", "", "")
    spelled = f"{first:{PADDING}>2}{operation}{second:{PADDING}>2}{equals}{result:{PADDING}>4}"
    given = first and second and result
    if not given or len(spelled) != LENGTH or set(spelled) - {*LETTERS, "?"}:
        raise ValueError(
            f"arithmetic: {text!r} is no equation as '17+2?=42' is: operands of at most two "
            "digits, a result of at most four, '?' for each character to be found."
        )
    return spelled


class RightEquation(AbstractConstraint):
    """Whether a string is a right equation; a hard constraint."""

    name = "right equation"

    def __init__(self) -> None:
        self._numbers = _numbers(equations()).sort().values

    def violation(self, x0: Tensor) -> Tensor:
        """Return 0 for right equations and 1 for all other strings, ``(*batch,)``."""
        numbers = _numbers(x0)
        index = torch.searchsorted(self._numbers, numbers).clamp_max(len(self._numbers) - 1)
        return (self._numbers[index] != numbers).double()


class EquationReward(EmbeddedPotential):
    """The probability that independent characters form a right equation, softened.

    With ``e (L, K)`` the laws of the characters (at a string, its one-hot rows), ``E`` the right
    equations and a probability ``slack`` that anything counts as right::

        log g(e) = log( slack + (1 - slack) sum_{x in E} prod_i e_i(x_i) )

    It is 0 at a right equation and ``log(slack)`` at a wrong one: at strings, what
    :class:`RightEquation` says with its edge taken off; in between, the multilinear extension. The
    sum is over numbers, not over strings: digits are multiplied into laws of operands and results.

    :param slack: in (0, 1).
    :raises ValueError: if it is not.
    """

    def __init__(self, slack: float = 1e-3) -> None:
        if not 0.0 < slack < 1.0:
            raise ValueError(f"EquationReward: slack must lie in (0, 1), got {slack}.")
        self.slack = slack
        operation, first, second, result = _right()
        self._triples = (operation * _OPERANDS + first) * _OPERANDS + second
        self._results = result
        self._columns = [_spelled(torch.arange(n), w) for n, w in ((_OPERANDS, 2), (_RESULTS, 4))]
        super().__init__(self._log_g, torch.eye(len(LETTERS)), name="equation")

    def probability(self, embeddings: Tensor) -> Tensor:
        """Return the probability that independent characters form a right equation.

        :param embeddings: laws of the characters, ``(*batch, 10, 15)``.
        :returns: ``(*batch,)``, differentiable.
        """
        operands, results = self._columns
        first, second = (_law(embeddings[..., at : at + 2, :], operands) for at in (0, 3))
        result = _law(embeddings[..., 6:, :], results)
        operation = embeddings[..., 2, 10 : 10 + len(OPERATIONS)]
        questions = operation[..., :, None, None] * first[..., None, :, None]
        questions = (questions * second[..., None, None, :]).flatten(-3)
        right = (questions[..., self._triples] * result[..., self._results]).sum(-1)
        return embeddings[..., 5, LETTERS.index("=")] * right

    def _log_g(self, embeddings: Tensor) -> Tensor:
        # Away from laws, where an optimiser may look, the extension can be negative.
        probability = self.probability(embeddings).clamp_min(0.0)
        return torch.log(self.slack + (1 - self.slack) * probability)


def sequences(folder: str | Path | None = None) -> Sequences:
    """Return all right equations, split by question at random; no data are read."""
    rows = equations()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_SEED))
    test, valid, train = order.split([_TEST, _VALID, len(rows) - _TEST - _VALID])
    return unrelated(
        [rows[part] for part in (train, valid, test)],
        licence="Data: none, the strings are generated.",
        source=f"All {len(rows)} right equations a+b=c, a-b=c (not negative) and a*b=c of numbers "
        "from 0 to 99, generated; questions of the test part are not among those trained on.",
        vocabulary=LETTERS,
        noun="right equations",
        unit="character",
        bundled=True,
    )


def _right() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return operation, operands and result of every right equation, int64 ``(n,)`` each."""
    operation, first, second = torch.meshgrid(
        *(torch.arange(n) for n in (len(OPERATIONS), _OPERANDS, _OPERANDS)), indexing="ij"
    )
    values = torch.stack([first[0] + second[0], first[1] - second[1], first[2] * second[2]])
    kept = values >= 0
    return operation[kept], first[kept], second[kept], values[kept]


def _spelled(numbers: Tensor, width: int) -> Tensor:
    """Return digits of numbers, without leading zeros, int64 ``(n, width)``."""
    powers = 10 ** torch.arange(width - 1, -1, -1)
    digits = numbers[:, None] // powers % 10
    leading = (numbers[:, None] < powers) & (powers > 1)
    return torch.where(leading, LETTERS.index(PADDING), digits)


def _law(columns: Tensor, spelled: Tensor) -> Tensor:
    """Return the law of a number from those of its columns, ``(*batch, len(spelled))``."""
    law = columns[..., 0, spelled[:, 0]]
    for place in range(1, spelled.shape[1]):
        law = law * columns[..., place, spelled[:, place]]
    return law


def _numbers(rows: Tensor) -> Tensor:
    """Return strings as numbers of base 15, which fit into 64 bits."""
    assert math.log2(len(LETTERS)) * LENGTH < 63
    powers = len(LETTERS) ** torch.arange(LENGTH - 1, -1, -1, device=rows.device)
    return (rows * powers).sum(-1)
