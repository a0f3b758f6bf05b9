"""What priors are trained on: aligned sequences, checked, and the filling up of short ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_diffusion.models.recipes import Recipe

if TYPE_CHECKING:
    from ppl_diffusion.tokenisers import Tokeniser

BASES = "ACGT"
PADDING = "_"
"""The letter for no letter; it fills short sequences up, behind their end."""


@dataclass(frozen=True)
class Sequences:
    """Aligned sequences of one length, split by family.

    :param train: rows of the law to be learnt, int64 ``(n, L)``.
    :param valid: rows of that law for early stopping.
    :param test: rows of that law for the quoted bounds.
    :param test_family: family of near copies of each test row, int64 ``(k,)``.
    :param related: other rows, or all of them, to pretrain on, int64 ``(m, L)``.
    :param related_weights: how often each related row is drawn, relative, float64 ``(m,)``.
    :param licence: one sentence, as ``source`` is, for the card of a prior.
    :param vocabulary: one symbol per token id, a letter each if it is a text.
    :param noun: what the sequences are, for the same; ``unit`` is what a token is.
    :param labels: classes of the rows of ``train``, ``valid`` and ``test``, int64 ``(n,)`` each,
        for a network with classes.
    :param classes: names of the classes, in the order of their numbers.
    :param codec: name of the codec whose tokens they are, of images.
    :param bundled: whether they come with an installed package, or are generated, so that no folder
        is needed.
    :param lengths: probabilities of the lengths 0 to ``L``, where sequences have several; the last
        symbol of the vocabulary then only fills them up.
    :param tokeniser: how text becomes tokens, if symbols are not simply letters.
    :param train_weights: how often each training row is drawn, relative, float64 ``(n,)``; equally
        often if None.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    test_family: Tensor
    related: Tensor
    related_weights: Tensor
    licence: str
    source: str
    vocabulary: str | Sequence[str] = BASES
    noun: str = "promoter sequences"
    unit: str = "base"
    labels: tuple[Tensor, Tensor, Tensor] | None = None
    classes: tuple[str, ...] = ()
    codec: str = ""
    bundled: bool = False
    lengths: tuple[float, ...] | None = None
    tokeniser: Tokeniser | None = None
    train_weights: Tensor | None = None

    @property
    def length(self) -> int:
        return self.train.shape[-1]


def unrelated(parts: Sequence[Tensor], **words: Any) -> Sequences:
    """Return sequences without related rows, each a family of its own.

    :param parts: rows to train on, to stop by, and to quote, int64 ``(n, L)`` each.
    :param words: ``licence``, ``source`` and other fields that have nothing to do with rows.
    """
    train, valid, test = parts
    return Sequences(
        train=train,
        valid=valid,
        test=test,
        test_family=torch.arange(len(test)),
        related=train[:0],
        related_weights=torch.empty(0, dtype=torch.float64),
        **words,
    )


def check_sequences(sequences: Sequences, recipe: Recipe) -> None:
    """Refuse data that a recipe cannot be followed with."""
    for part in ("train", "valid", "test", "related"):
        if len(getattr(sequences, part)):
            _check_rows(sequences, part)
        elif part in ("train", "valid"):
            raise ValueError(f"Sequences: {part} holds no rows; training needs at least one.")
    if min(recipe.shares) < 1.0:
        _check_related(sequences, recipe)
    if recipe.shape.get("num_classes"):
        _check_labels(sequences, recipe)
    if recipe.both_strands and len(sequences.vocabulary) != len(BASES):
        raise ValueError(
            f"Recipe: both_strands needs the four letters {BASES}, but the vocabulary is "
            f"{sequences.vocabulary!r}; set it to False."
        )


def _check_rows(sequences: Sequences, part: str) -> None:
    rows, size = getattr(sequences, part), len(sequences.vocabulary)
    if rows.dtype != torch.int64 or rows.ndim != 2:
        raise ValueError(
            f"Sequences: {part} must hold token ids, int64 (n, L), but is {rows.dtype} "
            f"{tuple(rows.shape)}; convert it."
        )
    if rows.shape[1] != sequences.length:
        raise ValueError(
            f"Sequences: rows of {part} have {rows.shape[1]} tokens, those of train "
            f"{sequences.length}; cut or pad them."
        )
    low, high = (int(end) for end in rows.aminmax())
    if low < 0 or high >= size:
        letters = "".join(sequences.vocabulary)
        raise ValueError(
            f"Sequences: {part} holds the id {low if low < 0 else high}, but those of the "
            f"{size} letters {letters!r} are 0 to {size - 1}; drop or recode its row."
        )


def _check_labels(sequences: Sequences, recipe: Recipe) -> None:
    if recipe.objective != "nelbo" or min(recipe.shares) < 1.0:
        raise ValueError(
            "Recipe: classes are learnt by the objective nelbo, from rows that have labels; set "
            'objective="nelbo" and shares=(1.0, 1.0), or leave num_classes out.'
        )
    parts, labels = (sequences.train, sequences.valid, sequences.test), sequences.labels
    if labels is None or [len(rows) for rows in parts] != [len(label) for label in labels]:
        raise ValueError(
            "Sequences: a network with classes needs labels, one for each row of train, valid and "
            "test; add them, or leave num_classes out of the recipe."
        )


def _check_related(sequences: Sequences, recipe: Recipe) -> None:
    rows, weights = sequences.related, sequences.related_weights
    if not len(rows):
        raise ValueError(
            f"Recipe: shares {tuple(recipe.shares)} draw related rows, but the data have none; set "
            "shares=(1.0, 1.0)."
        )
    positive = bool((weights >= 0).all() and weights.isfinite().all() and weights.sum() > 0)
    if weights.shape != rows.shape[:1] or not positive:
        raise ValueError(
            f"Sequences: related_weights must be {len(rows)} finite numbers from 0 up, one per "
            "related row and not all 0; mend them."
        )


def unpad(text: str) -> str:
    """Return a decoded sequence without the :data:`PADDING` behind its end."""
    return text.rstrip(PADDING)


def find_data(folder: str | Path | None, file: str) -> Path:
    folder = folder or os.environ.get("PPL_DIFFUSION_DATA")
    if folder is None:
        raise FileNotFoundError(
            "No data folder was given: pass --data, or set PPL_DIFFUSION_DATA, to the folder that "
            f"holds {file}."
        )
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"The data folder {str(folder)!r} does not hold {file}: check --data."
        )
    return path
