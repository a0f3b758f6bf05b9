"""A small classifier of sentences: whether they praise, read off the embeddings of their letters.

``logits = W max_i h_i + b`` with ``h`` three convolutions over letters (Kim 2014, arXiv 1408.5882,
has one over words). It reads embeddings, not letters, so that its log-probability is an
:class:`~ppl_diffusion.potentials.EmbeddedPotential` with a gradient between letters. Two are
shipped, trained on disjoint halves of the sentences: design with ``yelp-reward``, let
``yelp-judge`` judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.files import read_network, write_network
from ppl_diffusion.models.cards import CLASSIFIER_FILE, find_folder, list_text_classifiers
from ppl_diffusion.models.reviews import LENGTH, LETTERS
from ppl_diffusion.potentials.text import ClassifierReward

CLASSES = ("complaint", "praise")


@dataclass(frozen=True)
class TextConfig:
    """Everything but the weights.

    :param letters: one for each token id.
    :param length: letters of a sentence, filled up behind its end.
    :param dim: coordinates of an embedding.
    :param channels: width of the convolutions.
    :param kernel: letters under one filter.
    :param dropout: share of the units left out in training.
    """

    name: str = "text-classifier"
    letters: str = LETTERS
    length: int = LENGTH
    dim: int = 24
    channels: int = 96
    kernel: int = 5
    depth: int = 3
    dropout: float = 0.4


class TextClassifier(nn.Module):
    """Says of a sentence, or of embeddings between sentences, how likely each class is.

    :param config: shape and letters.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(len(config.letters), config.dim)
        widths = [config.dim, *(config.channels for _ in range(config.depth))]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, config.kernel, padding=config.kernel // 2) for a, b in pairwise(widths)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.channels, len(CLASSES))

    @property
    def codebook(self) -> Tensor:
        """The embeddings of the letters, ``(K, b)``."""
        return self.embedding.weight

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits of the classes at embeddings, ``(*batch, classes)``.

        :param embeddings: ``(*batch, L, b)``.
        """
        state = embeddings.reshape(-1, *embeddings.shape[-2:]).float().mT
        for convolution in self.convolutions:
            state = F.gelu(convolution(self.dropout(state)))
        logits: Tensor = self.head(self.dropout(state.amax(-1)))
        return logits.reshape(*embeddings.shape[:-2], len(CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the classes of sentences, ``(*batch, classes)``.

        :param tokens: int64 ``(*batch, L)``.
        """
        return self.logits(self.embedding(tokens))

    @torch.no_grad()
    def probability(self, tokens: Tensor, label: int = 1) -> Tensor:
        """Return the probability of a class, float32 ``(*batch,)``.

        :param tokens: int64 ``(*batch, L)``.
        """
        rows = tokens.reshape(-1, tokens.shape[-1])
        parts = [self(part).softmax(-1)[:, label] for part in rows.split(1024)]
        return torch.cat(parts).reshape(tokens.shape[:-1])

    def reward(self, label: int = 1, *, temperature: float = 1.0) -> ClassifierReward:
        """Return ``log p(label | sentence) / temperature`` as a potential.

        :param label: 1 for praise, 0 for a complaint.
        """
        return ClassifierReward(
            self.logits, self.codebook, label, temperature=temperature, name=self.config.name
        )

    def save(self, directory: str | Path) -> None:
        """Write the weights and the configuration into a folder, made if it is absent."""
        write_network(self, self.config, directory, CLASSIFIER_FILE)

    @classmethod
    def load(cls, directory: str | Path) -> TextClassifier:
        """Read the folder that :meth:`save` wrote.

        :raises ValueError: if a file is absent, or the files do not fit together.
        """
        try:
            classifier = read_network(cls, TextConfig, directory, CLASSIFIER_FILE)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The folder {str(directory)!r} holds no classifier of text that can be read: "
                f"{error}"
            ) from error
        return classifier.requires_grad_(False)


def load_text_classifier(name_or_dir: str | Path) -> TextClassifier:
    """Load a shipped classifier of text by name, or any from its folder.

    :raises ValueError: if neither a shipped one nor a folder has that name.
    """
    folder = find_folder(name_or_dir, list_text_classifiers(), "classifier of text")
    return TextClassifier.load(folder)
