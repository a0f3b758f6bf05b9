"""The sequences that the shipped priors are trained on, read from the external data folder."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.models import arithmetic, reviews, sudoku
from ppl_diffusion.models.image_sequences import image_sequences
from ppl_diffusion.models.markov_baseline import MarkovBaseline
from ppl_diffusion.models.sequences import BASES as BASES
from ppl_diffusion.models.sequences import PADDING as PADDING
from ppl_diffusion.models.sequences import Sequences as Sequences
from ppl_diffusion.models.sequences import check_sequences as check_sequences
from ppl_diffusion.models.sequences import find_data as find_data
from ppl_diffusion.models.sequences import unpad as unpad
from ppl_diffusion.models.sequences import unrelated

YEAST_FILE = "dna/yeast_promoters_80bp.npz"
_HUMAN = "dna/human_core_promoters_70bp.csv.gz"
NATIVE = 1  # the kind of native promoter fragments in the yeast file
_DRAWN_ORDER, _DRAWN_ROWS = 3, 50_000
_PROMOTER = "1"  # the label of promoters in the human file
_TEXT = "text/tinyshakespeare.{}.txt.gz"
_WINDOW = 128  # characters of a sequence of text
_FIRST_NAMES, _NAME_LENGTH = "text/names.csv.gz", 15
_QM9, _SMILES_LENGTH = "molecules/qm9.csv.gz", 24


def load_sequences(name: str, folder: str | Path | None = None) -> Sequences:
    if name not in READERS:
        raise ValueError(f"There is no data set {name!r}: choose one of {', '.join(READERS)}.")
    return READERS[name](folder)


def _yeast_promoters(folder: str | Path | None) -> Sequences:
    """Native yeast promoter fragments, 80 bases."""
    with np.load(find_data(folder, YEAST_FILE), allow_pickle=False) as z:
        x, kind, split, family = (z[key] for key in ("x", "kind", "split", "family"))
    rows = torch.from_numpy(x.astype(np.int64))
    train, valid, test = (rows[(kind == NATIVE) & (split == part)] for part in range(3))
    related, once = rows[split == 0], _once_per_family(family[split == 0])
    drawn = _markov_draws(train, _once_per_family(family[(kind == NATIVE) & (split == 0)]))
    return Sequences(
        train=train,
        valid=valid,
        test=test,
        test_family=torch.from_numpy(family[(kind == NATIVE) & (split == 2)].astype(np.int64)),
        related=torch.cat([related, drawn]),
        related_weights=torch.cat([once / once.sum(), torch.full((len(drawn),), 1.0 / len(drawn))]),
        licence="Data: MIT (repository 1edv/evolution).",
        source="Gigantic parallel reporter assay of Vaishnav et al. (Nature 603, 2022), "
        "native 80-base fragments; all training rows for pretraining.",
    )


def _human_promoters(folder: str | Path | None) -> Sequences:
    """Human core promoters around EPDnew start sites, 70 bases; non-promoters are related rows."""
    with gzip.open(find_data(folder, _HUMAN), "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = torch.tensor([[BASES.index(base) for base in row["sequence"]] for row in rows])
    positive = np.array([row["label"] == _PROMOTER for row in rows])
    split = np.array([row["split"] for row in rows])
    train, valid, test = (tokens[positive & (split == s)] for s in ("train", "valid", "test"))
    related = tokens[split == "train"]
    return Sequences(
        train=train,
        valid=valid,
        test=test,
        test_family=torch.arange(len(test)),
        related=related,
        related_weights=torch.ones(len(related), dtype=torch.float64),
        licence="Data: repository wds-seu/DeepGene is Apache-2.0 (as DNABERT-2); "
        "the data's own licence is not stated.",
        source="Core promoters of the GUE benchmark (Zhou et al. 2023, DNABERT-2), label 1; "
        "training rows of both labels for pretraining.",
    )


def _tiny_shakespeare(folder: str | Path | None) -> Sequences:
    """Windows of 128 characters of Shakespeare's plays."""
    files = (find_data(folder, _TEXT.format(part)) for part in ("train", "valid", "test"))
    train, valid, test = (gzip.decompress(file.read_bytes()).decode("utf-8") for file in files)
    vocabulary = "".join(sorted(set(train)))
    strides = [(train, _WINDOW // 8), (valid, _WINDOW), (test, _WINDOW)]
    return unrelated(
        [_windows(part, vocabulary, stride) for part, stride in strides],
        licence="Data: public domain (repository karpathy/char-rnn: MIT).",
        source="Plays of Shakespeare as one text (karpathy/char-rnn, tinyshakespeare), cut into "
        f"windows of {_WINDOW} characters.",
        vocabulary=vocabulary,
        noun=f"windows of {_WINDOW} characters of text",
        unit="character",
    )


def _names(folder: str | Path | None) -> Sequences:
    """First names of at most 15 letters, filled up with :data:`PADDING`."""
    return _padded(
        find_data(folder, _FIRST_NAMES),
        "name",
        _NAME_LENGTH,
        licence="Data: MIT (repository karpathy/makemore), from public United States statistics.",
        source="First names in lower case (karpathy/makemore)",
        noun="first names",
        unit="letter",
    )


def _qm9(folder: str | Path | None) -> Sequences:
    """SMILES of molecules of at most nine heavy atoms, one token per character.

    The atoms are C, N, O, F, aromatic c, n, o, and hydrogens and charges in brackets: no atom has
    a symbol of two characters, so that a character is an atom, a bond, a branch or a ring.
    """
    return _padded(
        find_data(folder, _QM9),
        "smiles",
        _SMILES_LENGTH,
        licence="Data: repository aspuru-guzik-group/selfies is Apache-2.0; the data's own licence "
        "is not stated.",
        source="Canonical SMILES of QM9 (Ramakrishnan et al. 2014)",
        noun="SMILES of small molecules",
        unit="character",
    )


def _padded(file: Path, column: str, length: int, *, source: str, **words: str) -> Sequences:
    """Read the texts of a table that fit into a length; the card says how many do not."""
    with gzip.open(file, "rt", newline="", encoding="utf-8") as lines:
        rows = [(row[column], row["split"]) for row in csv.DictReader(lines)]
    fitting = [(text, split) for text, split in rows if len(text) <= length]
    vocabulary = "".join(sorted({letter for text, _ in fitting for letter in text})) + PADDING
    codes = {letter: code for code, letter in enumerate(vocabulary)}
    ids = torch.tensor([[codes[x] for x in text.ljust(length, PADDING)] for text, _ in fitting])
    return unrelated(
        [
            ids[torch.tensor([split == part for _, split in fitting])]
            for part in ("train", "valid", "test")
        ],
        source=f"{source}, filled up to {length} with {PADDING!r}; {len(rows) - len(fitting)} of "
        f"{len(rows)} are longer and left out.",
        vocabulary=vocabulary,
        **words,
    )


def reverse_complement(rows: Tensor) -> Tensor:
    """Return the other strand of rows ``(n, L)``; the ids of a base and its partner add to 3."""
    return 3 - rows.flip(-1)


def _windows(text: str, vocabulary: str, stride: int) -> Tensor:
    """Cut a text into windows; what is left at its end is dropped."""
    if strange := sorted(set(text) - set(vocabulary)):
        raise ValueError(
            f"tinyshakespeare: the characters {strange} of a held-out part do not occur in the "
            "training part; restore the three files of one split."
        )
    codes = {symbol: code for code, symbol in enumerate(vocabulary)}
    ids = torch.tensor([codes[symbol] for symbol in text], dtype=torch.int64)
    return ids.unfold(0, _WINDOW, stride).contiguous()


def _once_per_family(family: np.ndarray) -> Tensor:
    _, inverse, count = np.unique(family, return_inverse=True, return_counts=True)
    return torch.from_numpy(1.0 / count[inverse])


def _markov_draws(rows: Tensor, weights: Tensor) -> Tensor:
    both = torch.cat([rows, reverse_complement(rows)])
    chain = MarkovBaseline(both, _DRAWN_ORDER, len(BASES), weights=weights.repeat(2))
    return chain.sample(_DRAWN_ROWS, rows.shape[1], torch.Generator().manual_seed(0))


READERS: dict[str, Callable[[str | Path | None], Sequences]] = {
    "yeast": _yeast_promoters,
    "human": _human_promoters,
    "tinyshakespeare": _tiny_shakespeare,
    "names": _names,
    "qm9": _qm9,
    "arithmetic": arithmetic.sequences,
    "sudoku": sudoku.sequences,
    "yelp": reviews.sequences,
    "digits": partial(image_sequences, "digits", shift=1),
    "mnist": partial(image_sequences, "mnist"),
    "faces": partial(image_sequences, "faces", shift=1),
}
