"""What held-out sequences look like: frequencies of short words, committed as a small table.

``python -m benchmarks._references --data DATA`` makes ``reference_kmers.json`` anew. Held-out rows
(validation and test) are split into two halves, by families of near copies where there are such;
each half keeps its word frequencies. The noise floor is the same measure that samples get, taken
of as many real sequences from the other half. Sequences that are filled up to a length are cut at
their end, and their words may reach over it by one letter to either side: where sequences begin and
end is measured too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.special import rel_entr

from ppl_diffusion.models.datasets import PADDING, Sequences, load_sequences, unpad

FILE = Path(__file__).with_name("reference_kmers.json")
ORDERS = {"yeast": 4, "tinyshakespeare": 3, "names": 3, "qm9": 4}
"""Letters of a word in each data set."""

SIZES = (8, 24, 48, 96)
"""Numbers of sequences with a noise floor."""

SHORT_SIZES = (256, 1024)
"""The same for short sequences, those that are filled up: each holds few words."""

_DRAWS = 200


@dataclass(frozen=True)
class Reference:
    """Held-out statistics of one data set.

    :param name: name of the data set.
    :param vocabulary: its letters.
    :param length: letters of a sequence.
    :param order: letters of a word.
    :param rows: number of held-out sequences.
    :param families: independent ones among them.
    :param halves: word counts of each half, as frequencies.
    :param entropy: mean entropy of the letters of a sequence, nats.
    :param floors: noise floor and its standard deviation per number of sequences.
    """

    name: str
    vocabulary: str
    length: int
    order: int
    rows: int
    families: int
    halves: tuple[Mapping[str, float], Mapping[str, float]]
    entropy: float
    floors: Mapping[int, tuple[float, float]]

    def spelt(self, text: str) -> str:
        """Return a sequence as its words are taken from it.

        :param text: as it is decoded.
        """
        return spelt(text) if PADDING in self.vocabulary else text

    def divergence(self, texts: Sequence[str]) -> tuple[float, float]:
        """Return the Jensen-Shannon divergence of word frequencies to held-out text, nats.

        :param texts: independent sequences, at least two.
        :returns: the mean over both halves of the held-out text, and its standard error, by
            leaving out one sequence at a time (jackknife).
        """
        found = [Counter(_cut(self.spelt(text), self.order)) for text in texts]
        keys = sorted(set().union(*self.halves, *found))
        counts = np.array([[row[key] for key in keys] for row in found], dtype=np.float64)
        halves = [np.array([half.get(key, 0.0) for key in keys]) for half in self.halves]
        whole = counts.sum(0)
        value, without = (
            np.mean([jensen_shannon(c / c.sum(-1, keepdims=True), half) for half in halves], 0)
            for c in (whole, whole - counts)
        )
        return float(value), float(np.std(without) * math.sqrt(len(texts) - 1))


def spelt(text: str) -> str:
    """Return a sequence that was filled up without its filling, between signs for its two ends.

    :param text: as it is decoded.
    """
    return f"^{unpad(text)}$"


def words(
    texts: Sequence[str], order: int, weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the frequencies of the words in some sequences.

    :param texts: sequences; words overlap but do not cross their ends.
    :param order: letters of a word.
    :param weights: how much each sequence counts.
    """
    counts: dict[str, float] = {}
    for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
        for word in _cut(text, order):
            counts[word] = counts.get(word, 0.0) + weight
    total = sum(counts.values())
    return {word: count / total for word, count in sorted(counts.items())}


def _cut(text: str, order: int) -> list[str]:
    return [text[start : start + order] for start in range(len(text) - order + 1)]


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence of two laws, nats.

    :param p: frequencies, ``(..., n)``.
    :param q: frequencies, ``(n,)``.
    :returns: ``(...)``.
    """
    middle = (p + q) / 2
    found: np.ndarray = (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / 2
    return found


def mean_entropy(texts: Sequence[str], weights: Sequence[float] | None = None) -> float:
    """Return the mean over sequences of the entropy of their letters, nats.

    :param texts: sequences.
    :param weights: how much each sequence counts.
    """
    return float(np.average([letter_entropy(text) for text in texts], weights=weights))


def letter_entropy(text: str) -> float:
    """Return the entropy of the letters of a sequence, nats.

    :param text: the sequence.
    """
    p = np.array(list(Counter(text).values())) / len(text)
    return float(-np.sum(p * np.log(p)))


def load_references() -> list[Reference]:
    """Read the committed table."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    for entry in entries:
        entry["halves"] = tuple(entry["halves"])
        entry["floors"] = {int(n): (mean, sd) for n, (mean, sd) in entry["floors"].items()}
    return [Reference(**entry) for entry in entries]


def find_reference(vocabulary: Sequence[str], length: int) -> Reference:
    """Return the held-out statistics for sequences of one kind.

    :param vocabulary: one letter per token id.
    :param length: letters of a sequence.
    :raises ValueError: if there are none.
    """
    for reference in load_references():
        if sorted(reference.vocabulary) == sorted(vocabulary) and reference.length == length:
            return reference
    raise ValueError(
        f"{FILE.name} has no held-out statistics for sequences of {length} letters over "
        f"{len(vocabulary)} symbols; add them with python -m benchmarks._references."
    )


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences of a data set.

    :param texts: the sequences.
    :param family: family of near copies of each, int64 ``(n,)``.
    """

    texts: list[str]
    family: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """Weights with which every family counts once, float64 ``(n,)``."""
        _, inverse, count = np.unique(self.family, return_inverse=True, return_counts=True)
        weights: np.ndarray = 1.0 / count[inverse]
        return weights

    def half(self, which: int) -> HeldOut:
        """Return every other family.

        :param which: 0 or 1.
        """
        chosen = np.isin(self.family, np.unique(self.family)[which::2])
        texts = [text for text, keep in zip(self.texts, chosen, strict=True) if keep]
        return HeldOut(texts, self.family[chosen])

    def words(self, order: int) -> dict[str, float]:
        """Return the word frequencies, every family counting once.

        :param order: letters of a word.
        """
        return words(self.texts, order, self.weights.tolist())

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """Draw sequences, every family as often.

        :param count: how many; as many as in :data:`SHORT_SIZES` are drawn without replacement, as
            repeated ones would be taken for low entropy.
        :param rng: source of randomness.
        """
        p, again = self.weights / self.weights.sum(), count not in SHORT_SIZES
        return [self.texts[i] for i in rng.choice(len(self.texts), count, replace=again, p=p)]


def held_out(name: str, folder: Path) -> tuple[HeldOut, Sequences]:
    """Read the validation and test rows of a data set.

    :param name: its name.
    :param folder: the data folder.
    """
    data = load_sequences(name, folder)
    rows = [*data.valid.tolist(), *data.test.tolist()]
    texts = ["".join(data.vocabulary[i] for i in row) for row in rows]
    if PADDING in data.vocabulary:
        # The rows are in alphabetical order: every other one would halve them too evenly.
        order = np.random.default_rng(0).permutation(len(texts))
        return HeldOut(list(map(spelt, texts)), order), data
    return HeldOut(texts, np.array(near_copies(texts))), data


def near_copies(texts: Sequence[str]) -> list[int]:
    """Number the families of near copies among some sequences.

    :param texts: sequences of one length; two that differ in less than a third of their letters
        are of one family.
    """
    letters = np.array([list(text) for text in texts])
    family = np.arange(len(texts))
    for index, row in enumerate(letters):
        close = (letters != row).mean(1) < 1 / 3
        family[np.isin(family, family[close])] = family[index]
    return np.unique(family, return_inverse=True)[1].tolist()


def make_reference(name: str, folder: Path) -> Reference:
    """Compute the held-out statistics of a data set.

    :param name: its name.
    :param folder: the data folder.
    """
    whole, data = held_out(name, folder)
    halves = (whole.half(0), whole.half(1))
    laws = tuple(half.words(ORDERS[name]) for half in halves)
    sizes = SHORT_SIZES if PADDING in data.vocabulary else SIZES
    return Reference(
        name,
        data.vocabulary,
        data.length,
        ORDERS[name],
        len(whole.texts),
        len(np.unique(whole.family)),
        (laws[0], laws[1]),
        mean_entropy(whole.texts, whole.weights.tolist()),
        {count: _floor(halves, laws, ORDERS[name], count) for count in sizes},
    )


def _floor(
    halves: tuple[HeldOut, HeldOut], laws: Sequence[Mapping[str, float]], order: int, count: int
) -> tuple[float, float]:
    """Return mean and standard deviation of the divergence of real sequences."""
    rng = np.random.default_rng(0)
    keys = sorted(laws[0].keys() | laws[1].keys())
    tables = [np.array([law.get(key, 0.0) for key in keys]) for law in laws]
    found = []
    for k in range(_DRAWS):
        drawn = words(halves[k % 2].draw(count, rng), order)
        p = np.array([drawn.get(key, 0.0) for key in keys])
        found.append(jensen_shannon(p, tables[1 - k % 2]))
    return float(np.mean(found)), float(np.std(found))


def main(data: Annotated[Path, typer.Option(help="Folder that holds dna/, text/, ...")]) -> None:
    """Write the table of held-out statistics."""
    entries = [asdict(make_reference(name, data)) for name in ORDERS]
    text = json.dumps(_rounded(entries), separators=(",", ":"))
    FILE.write_text(text + "\n", encoding="utf-8")


def _rounded(value: object) -> object:
    """Keep six significant digits: the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    typer.run(main)
