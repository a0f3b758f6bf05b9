"""Sentences of restaurant reviews, each praising or not: what a text prior and its reward read."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ppl_diffusion.models.sequences import PADDING, Sequences, find_data, unrelated

FILE = "text/yelp_sentiment.csv.gz"
LENGTH = 48
LETTERS = " abcdefghijklmnopqrstuvwxyz0.,!?'$-" + PADDING
_NUMBER = "_num_"  # what the source writes for a number; a zero stands for it here
SOURCE = (
    "Sentences of Yelp reviews in lower case (Shen et al. 2017, repository "
    "shentianxiao/language-style-transfer)"
)
LICENCE = (
    "Data: repository shentianxiao/language-style-transfer is Apache-2.0; the licence of the Yelp "
    "data themselves is not stated there."
)


@dataclass(frozen=True)
class Reviews:
    """Sentences that fit, with what they say.

    :param tokens: ids of :data:`LETTERS`, int64 ``(n, 48)``.
    :param labels: 1 for praise, 0 for a complaint, int64 ``(n,)``.
    :param part: which part of the split each is of: ``train``, ``valid`` or ``test``.
    :param left_out: how many sentences are longer or hold other letters.
    """

    tokens: Tensor
    labels: Tensor
    part: list[str]
    left_out: int

    def of(self, part: str) -> Tensor:
        """Return which rows are of a part, bool ``(n,)``."""
        return torch.tensor([own == part for own in self.part])


def read_reviews(folder: str | Path | None = None) -> Reviews:
    """Read the sentences of the external data folder that fit into 48 letters.

    :raises FileNotFoundError: if the file is not there.
    """
    with gzip.open(find_data(folder, FILE), "rt", newline="", encoding="utf-8") as lines:
        rows = [{**row, "text": row["text"].replace(_NUMBER, "0")} for row in csv.DictReader(lines)]
    kept = [row for row in rows if len(row["text"]) <= LENGTH and set(row["text"]) <= _ALLOWED]
    return Reviews(
        tokens=torch.stack([spell(row["text"]) for row in kept]),
        labels=torch.tensor([int(row["label"]) for row in kept]),
        part=[row["split"] for row in kept],
        left_out=len(rows) - len(kept),
    )


def spell(text: str) -> Tensor:
    """Return a sentence as ids, filled up behind its end, int64 ``(48,)``."""
    return torch.tensor([_CODES[letter] for letter in text.ljust(LENGTH, PADDING)])


def sequences(folder: str | Path | None = None) -> Sequences:
    """Sentences of at most 48 letters, filled up with :data:`PADDING`."""
    reviews = read_reviews(folder)
    total = len(reviews.part) + reviews.left_out
    return unrelated(
        [reviews.tokens[reviews.of(part)] for part in ("train", "valid", "test")],
        licence=LICENCE,
        source=f"{SOURCE}, 0 for a number, filled up to {LENGTH} with {PADDING!r}; "
        f"{reviews.left_out} of {total} are longer or hold rare characters and are left out.",
        vocabulary=LETTERS,
        noun="sentences of restaurant reviews",
        unit="character",
    )


_CODES = {letter: code for code, letter in enumerate(LETTERS)}
_ALLOWED = set(LETTERS) - {PADDING}
