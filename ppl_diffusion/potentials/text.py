"""What a classifier says of a text, as a potential of the embeddings that the classifier reads.

The codebook is the classifier's own table of embeddings, so that a gradient reaches the tokens::

    log G(x) = log p(label | C[x]) / T

At ``T = 1`` this is the likelihood of the label; below, a reward that was sharpened. It is bounded:
where the classifier is certain there is nothing more to be gained.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppl_diffusion.denoisers.pretrained import (
    check_ids,
    check_length,
    frame,
    load_model,
    load_tokenizer,
    positions,
    token_id,
    transformers_library,
)
from ppl_diffusion.potentials.embedded import EmbeddedPotential


class ClassifierReward(EmbeddedPotential):
    """The log-probability that a classifier gives a label, over a temperature.

    :param logits: ``e (*batch, L, b) -> (*batch, classes)``, differentiable.
    :param codebook: the embeddings that it reads, one for each of our tokens, ``(K, b)``.
    :param label: the class that is wanted.
    :param temperature: the lower, the stronger the tilt; 1 is Bayes' rule.
    :raises ValueError: if the temperature is not positive, or the label no class.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        codebook: Tensor,
        label: int,
        *,
        temperature: float = 1.0,
        name: str = "classifier",
    ) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
        self.logits, self.label, self.temperature = logits, _class(label, name), float(temperature)
        law = f"log p({self.label} | {name})"
        super().__init__(self._log_p, codebook, name=f"{law} / {temperature:g}")

    def _log_p(self, embeddings: Tensor) -> Tensor:
        logits = self.logits(embeddings)
        if not self.label < logits.shape[-1]:
            raise ValueError(
                f"{self.name}: the classifier has {logits.shape[-1]} classes and the label is "
                f"{self.label}; give one from 0 to {logits.shape[-1] - 1}."
            )
        return logits.log_softmax(-1)[..., self.label] / self.temperature


class PretrainedClassifier(nn.Module):
    """A sequence classifier of ``transformers`` that is asked at embeddings of our tokens.

    :param model: a model whose output has ``logits``, ``(n, classes)``, and that takes
        ``inputs_embeds``.
    :param ids: id of each of our tokens in its vocabulary.
    :param before: ids it wants before a sequence, such as that of ``[CLS]``; ``after`` behind it.
    :param padding: our token for no letter: from the first position that is nearest to it on,
        nothing is seen, and what comes ``after`` stands behind the hidden rest.
    :raises ValueError: if an id is none of the model's, or two tokens have one id.

    :ivar codebook: the model's embeddings of our tokens, ``(K, b)``.

    Example::

        judge = PretrainedClassifier.from_pretrained("name/of-a-model", prior.vocabulary)
        reward = judge.reward(1, temperature=0.5)
    """

    codebook: Tensor

    def __init__(
        self,
        model: nn.Module,
        ids: Sequence[int],
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        padding: int | None = None,
    ) -> None:
        super().__init__()
        check_ids(type(self).__name__, model, ids)
        self.model, self.padding = model.requires_grad_(False).eval(), padding
        self._positions = positions(model)
        table: Any = self.model.get_input_embeddings().weight  # type: ignore[operator]
        self.register_buffer("codebook", table[torch.tensor(ids)].detach(), persistent=False)
        for name, part in (("before", before), ("after", after)):
            self.register_buffer(name, table[list(part)].detach(), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        vocabulary: Sequence[str],
        *,
        padding: str | None = None,
        **options: Any,
    ) -> PretrainedClassifier:
        """Load a classifier and its tokeniser through ``transformers``.

        :param name_or_dir: name of a model on the hub, or its folder.
        :param vocabulary: our symbols, each a token of the model, but for the padding.
        :param padding: which of them stands for no letter; the model's own padding takes its place.
        :param options: of ``AutoModelForSequenceClassification.from_pretrained``; those that say
            where files are, such as ``revision``, hold for the tokeniser, too.
        :raises ModuleNotFoundError: if ``transformers`` is not installed.
        :raises ValueError: if the model does not know a symbol, has no padding where one is asked
            for, or is of another kind.
        """
        library, owner = transformers_library("A pretrained classifier"), cls.__name__
        tokenizer = load_tokenizer(library, name_or_dir, options)
        index = _padding_index(tokenizer, vocabulary, padding, owner)
        model = load_model(library.AutoModelForSequenceClassification, name_or_dir, options, owner)
        ids = [
            tokenizer.pad_token_id if symbol == padding else token_id(tokenizer, symbol, owner)
            for symbol in vocabulary
        ]
        before, after = frame(tokenizer)
        return cls(model, ids, before=before, after=after, padding=index)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits of the classes, ``(*batch, classes)``.

        :param embeddings: ``(*batch, L, b)``, rows of :attr:`codebook` or points between them.
        :raises ValueError: if the model has too few positions.
        """
        added = sum(len(getattr(self, part)) for part in ("before", "after"))
        check_length(type(self).__name__, self._positions, embeddings.shape[-2], added)
        rows = embeddings.reshape(-1, *embeddings.shape[-2:])
        seen = self._seen(rows)
        whole, mask = [], []
        for part, visible in ((self.before, None), (rows, seen), (self.after, None)):
            assert isinstance(part, Tensor)
            wide = part.expand(len(rows), -1, -1)
            whole.append(wide)
            mask.append(wide.new_ones(wide.shape[:2]) if visible is None else visible)
        output = self.model(
            inputs_embeds=torch.cat(whole, 1), attention_mask=torch.cat(mask, 1).long()
        )
        logits: Tensor = output.logits
        return logits.reshape(*embeddings.shape[:-2], logits.shape[-1])

    def reward(self, label: int, *, temperature: float = 1.0) -> ClassifierReward:
        """Return the reward of a label.

        :param label: a class of the model.
        :param temperature: of :class:`ClassifierReward`.
        """
        name = str(getattr(self.model, "name_or_path", "")) or type(self.model).__name__
        return ClassifierReward(self, self.codebook, label, temperature=temperature, name=name)

    def train(self, mode: bool = True) -> PretrainedClassifier:
        """Stay in evaluation mode: what is frozen must say the same every time."""
        return super().train(False)

    def _seen(self, rows: Tensor) -> Tensor:
        """Return which positions stand before the first that is nearest to padding."""
        if self.padding is None:
            return rows.new_ones(rows.shape[:2])
        nearest = torch.cdist(rows.detach(), self.codebook.expand(len(rows), -1, -1)).argmin(-1)
        return ((nearest == self.padding).cumsum(-1) == 0).to(rows.dtype)


def _class(label: Any, name: str) -> int:
    try:
        value = operator.index(label)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(
            f"{name}: label must be a class from 0 up, got {label!r}; give its number."
        )
    return value


def _padding_index(
    tokenizer: Any, vocabulary: Sequence[str], padding: str | None, owner: str
) -> int | None:
    if padding is None:
        return None
    if padding not in list(vocabulary):
        raise ValueError(
            f"{owner}: the padding {padding!r} is not in the vocabulary; add it, or leave it out."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{owner}: the model has no padding; choose another, or leave it out.")
    return list(vocabulary).index(padding)
