"""Sequences of one's own, from text to what a prior is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.models.near_copies import Ids
from ppl_diffusion.models.sequence_files import Rows
from ppl_diffusion.models.sequences import Sequences
from ppl_diffusion.models.splits import FEWEST, Split, split_rows
from ppl_diffusion.tokenisers import MOLECULES, Tokeniser, padding_symbol

Unknown = Literal["drop", "error"]
LONGEST = 1024
"""Tokens above which a sequence is refused unless ``max_length`` says what to do."""
_SMOOTHING = 0.5
_NOUNS = {
    "dna": ("DNA sequences", "base"),
    "rna": ("RNA sequences", "base"),
    "protein": ("proteins", "residue"),
    "smiles": ("molecules as SMILES", "symbol"),
    "selfies": ("molecules as SELFIES", "symbol"),
    "safe": ("molecules as SAFE", "symbol"),
    "chars": ("texts", "character"),
}


@dataclass(frozen=True)
class Drops:
    """Rows that were left out: how many, by cause, and the first of each cause in words."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, cause: str, what: str) -> None:
        """Count one more."""
        self.counts[cause] = self.counts.get(cause, 0) + 1
        self.first.setdefault(cause, what)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class OwnData:
    """Sequences of one's own, ready to train on.

    :param rows: those that are used.
    :param tokens: their token ids.
    :param tokeniser: how they were cut.
    :param split: which are for what.
    :param sequences: the same as tensors.
    :param drops: what was left out.
    :param classes: names of the classes, in the order of their numbers.
    """

    rows: Rows
    tokens: list[list[int]]
    tokeniser: Tokeniser
    split: Split
    sequences: Sequences
    drops: Drops
    classes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What the rows and their parts are known by: they differ if it does."""
        parts = (self.split.train, self.split.valid, self.split.test)
        content = (self.rows.texts, self.rows.labels, self.rows.weights)
        text = repr((content, [part.tolist() for part in parts]))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prepare(
    rows: Rows,
    alphabet: Tokeniser,
    *,
    unknown: Unknown = "drop",
    max_length: int | None = None,
    seed: int = 0,
) -> OwnData:
    """Cut rows into tokens, check that every one comes back, and split them.

    :param unknown: what to do with a row that the alphabet cannot write: leave it out, or fail.
    :param max_length: leave out rows of more tokens.
    :param seed: of the split.
    :raises ValueError: if a row cannot be written and that is not to be dropped, or too few are
        left.
    """
    kept, pieces, drops = _cut(rows, alphabet, unknown, max_length)
    if len(kept) < FEWEST:
        raise _too_few(rows.source, len(kept), drops)
    rows = rows.taken(kept)
    symbols = alphabet.symbols or tuple(sorted({token for row in pieces for token in row}))
    tokeniser = alphabet if alphabet.symbols else alphabet.with_symbols(symbols)
    index = {symbol: number for number, symbol in enumerate(symbols)}
    tokens = [[index[token] for token in row] for row in pieces]
    molecules = alphabet.name in MOLECULES
    split = split_rows(rows.texts, tokens, parts=rows.parts, molecules=molecules, seed=seed)
    classes = tuple(sorted(set(rows.labels))) if rows.labels else ()
    sequences = _sequences(rows, tokens, tokeniser, split, classes)
    return OwnData(rows, tokens, tokeniser, split, sequences, drops, classes)


def _too_few(source: str, count: int, drops: Drops) -> ValueError:
    first = next(iter(drops.first.values()), "")
    left_out = f" The first of {drops.total} that cannot be used: {first}" if first else ""
    return ValueError(
        f"There are {count} usable sequences in {source}, too few to split into rows for training, "
        f"validation and test; give {FEWEST} or more.{left_out}"
    )


def _cut(
    rows: Rows, alphabet: Tokeniser, unknown: Unknown, max_length: int | None
) -> tuple[list[int], list[list[str]], Drops]:
    kept, pieces, drops = [], [], Drops()
    for number, (text, line) in enumerate(zip(rows.texts, rows.lines, strict=True)):
        try:
            tokens = _checked(text, alphabet)
        except ValueError as error:
            what = f"{rows.source}, line {line}: {error}"
            if unknown == "error":
                raise ValueError(what) from error
            drops.add("not of the alphabet", what)
            continue
        if max_length is not None and len(tokens) > max_length:
            drops.add("too long", f"{rows.source}, line {line}: {len(tokens)} tokens.")
            continue
        _check_length(rows.source, line, tokens, max_length)
        kept.append(number)
        pieces.append(tokens)
    return kept, pieces, drops


def _checked(text: str, alphabet: Tokeniser) -> list[str]:
    tokens = alphabet.split(text)
    if not tokens:
        raise ValueError("It is empty; leave it out.")
    if not alphabet.inverts(text, tokens):
        raise alphabet.refused(text, f"comes back as {alphabet.join(tokens)!r}, another sequence")
    return tokens


def _check_length(source: str, line: int, tokens: list[str], max_length: int | None) -> None:
    if max_length is None and len(tokens) > LONGEST:
        raise ValueError(
            f"{source}, line {line}: the sequence has {len(tokens)} tokens, more than {LONGEST}; "
            "cut it into windows, or leave longer ones out by --max-length."
        )


def _sequences(
    rows: Rows,
    tokens: Sequence[Sequence[int]],
    tokeniser: Tokeniser,
    split: Split,
    classes: tuple[str, ...],
) -> Sequences:
    sizes = np.array([len(row) for row in tokens])
    several = bool((sizes != sizes[0]).any())
    symbols = tokeniser.symbols
    filled = torch.full((len(tokens), int(sizes.max())), len(symbols), dtype=torch.int64)
    for row, ids in zip(filled, tokens, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    valid = as_weighted(split.valid, rows.weights)
    parts = [torch.from_numpy(part) for part in (split.train, valid, split.test)]
    weights = None if rows.weights is None else torch.tensor(rows.weights, dtype=torch.float64)
    train_weights = None if weights is None else _train_weights(weights[parts[0]])
    noun, unit = _NOUNS.get(tokeniser.name, ("sequences", "token"))
    train_rows, valid_rows, test_rows = (filled[part] for part in parts)
    return Sequences(
        train=train_rows,
        valid=valid_rows,
        test=test_rows,
        test_family=torch.from_numpy(split.test_family),
        related=filled[:0],
        related_weights=torch.empty(0, dtype=torch.float64),
        licence="",
        source=rows.source,
        vocabulary=(*symbols, padding_symbol(symbols)) if several else symbols,
        noun=noun,
        unit=unit,
        labels=_labels(rows, parts, classes),
        classes=classes,
        bundled=True,
        lengths=length_law(sizes, split.train, train_weights) if several else None,
        tokeniser=tokeniser,
        train_weights=train_weights,
    )


def _train_weights(weights: Tensor) -> Tensor:
    if not float(weights.sum()) > 0.0:
        raise ValueError("All training rows have the weight 0; give some of them more.")
    return weights


def as_weighted(numbers: Ids, weights: Sequence[float] | None) -> Ids:
    """Return as many rows, each as often as its weight says: rows of the law to be learnt.

    :param numbers: of the rows, int64 ``(n,)``.
    :param weights: of all rows; without them, or where all are 0, the rows stay as they are.
    """
    mass = np.ones(len(numbers)) if weights is None else np.array([weights[i] for i in numbers])
    if weights is None or mass.sum() == 0.0:
        return numbers
    places = (np.arange(len(numbers)) + 0.5) / len(numbers)
    ends = mass.cumsum() / mass.sum()
    chosen: Ids = numbers[np.searchsorted(ends, places).clip(max=len(numbers) - 1)]
    return chosen


def _labels(
    rows: Rows, parts: Sequence[Tensor], classes: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    if rows.labels is None:
        return None
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[label] for label in rows.labels])
    train, valid, test = (labels[part] for part in parts)
    return train, valid, test


def length_law(
    sizes: np.ndarray, train: np.ndarray, weights: Tensor | None = None
) -> tuple[float, ...]:
    """Return the law of lengths of the training rows, smoothed.

    Every length from the shortest to the longest of all rows counts half a row more, so that none
    between them is impossible.

    :param sizes: length of every row.
    :param train: numbers of the training rows, of ``weights`` each.
    :returns: probabilities of the lengths 0 to the longest.
    """
    mass = np.ones(len(train)) if weights is None else weights.numpy() / weights.numpy().mean()
    counts = np.bincount(sizes[train], mass, minlength=int(sizes.max()) + 1).astype(np.float64)
    counts[int(sizes.min()) :] += _SMOOTHING
    return tuple((counts / counts.sum()).tolist())
