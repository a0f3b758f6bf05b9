"""Hidden states of a pretrained encoder as the latent of a sequence (LADD, arXiv 2510.18114)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.pretrained import token_id, transformers_library


class HiddenStatesEncoder(nn.Module):
    """Last hidden states of a frozen Hugging Face encoder, averaged over contiguous chunks.

    A sequence is cut into ``N`` chunks of nearly equal size; a slot is the mean of the first ``d``
    coordinates over its chunk, with norm ``sqrt(d)``, so that a coordinate has unit variance like
    the noise. Tokens that are left out (padding, what is hidden) count in no chunk. Of a sequence
    with fewer tokens than slots, neighbouring slots share a token; of an empty one all are 0.

    :param model: a ``transformers`` model whose output has ``last_hidden_state``.
    :param ids: ids of our tokens in its vocabulary, -1 for one that is left out.
    :param num_slots: number ``N`` of slots.
    :param dim: number ``d`` of coordinates.
    :raises ValueError: if the model has fewer coordinates.

    :cvar learns: whether training moves it.
    """

    learns = False
    ids: Tensor

    def __init__(self, model: nn.Module, ids: Sequence[int], num_slots: int, dim: int) -> None:
        super().__init__()
        settings: Any = model.config
        if settings.hidden_size < dim:
            raise ValueError(
                f"HiddenStatesEncoder: the model has {settings.hidden_size} hidden coordinates, "
                f"fewer than the {dim} asked for; lower latent_dim."
            )
        self.model = model.requires_grad_(False).eval()
        self.num_slots, self.dim = num_slots, dim
        self.register_buffer("ids", torch.tensor([*ids, -1]), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        vocabulary: Sequence[str],
        *,
        num_slots: int,
        dim: int,
        left_out: Collection[str] = (),
        **options: Any,
    ) -> Self:
        """Load a model and its tokeniser through ``transformers``.

        :param name_or_dir: name of a model on the hub, or its folder.
        :param vocabulary: our symbols, each a token of the model.
        :param left_out: symbols that the model does not see, such as padding.
        :param options: of ``AutoModel.from_pretrained``.
        :raises ModuleNotFoundError: if ``transformers`` is not installed.
        :raises ValueError: if the model does not know a symbol.
        """
        library, owner = transformers_library("A pretrained encoder"), cls.__name__
        tokenizer = library.AutoTokenizer.from_pretrained(name_or_dir)
        model = library.AutoModel.from_pretrained(name_or_dir, **options)
        remedy = "name it in left_out, or "
        ids = [
            -1 if symbol in left_out else token_id(tokenizer, symbol, owner, remedy)
            for symbol in vocabulary
        ]
        return cls(model, ids, num_slots, dim)

    @property
    def description(self) -> dict[str, Any]:
        """What :meth:`restore` needs besides the weights, as JSON knows it."""
        settings: Any = self.model.config
        return {"model": json.loads(settings.to_json_string()), "ids": self.ids[:-1].tolist()}

    @classmethod
    def restore(cls, description: Mapping[str, Any], num_slots: int, dim: int) -> Self:
        """Return an encoder of a given shape whose weights are still to be read."""
        library = transformers_library("A pretrained encoder")
        model = library.AutoModel.from_config(library.AutoConfig.for_model(**description["model"]))
        return cls(model, description["ids"], num_slots, dim)

    def forward(
        self, tokens: Tensor, visible: Tensor | None = None, *, learn: bool = False
    ) -> Tensor:
        """Return ``N`` vectors per sequence, float32 ``(n, N, d)``.

        :param tokens: clean tokens, int64 ``(n, L)``.
        :param visible: bool ``(n, L)``, which tokens are seen; all if None.
        :param learn: without effect: nothing learns.
        """
        return self.raw(tokens, visible)

    @torch.no_grad()
    def raw(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the same as :meth:`forward`."""
        ids = self.ids[tokens]
        seen = ids >= 0 if visible is None else (ids >= 0) & visible
        output = self.model(input_ids=ids.clamp(min=0), attention_mask=seen.long())
        chunks = pooled(output.last_hidden_state[..., : self.dim].float(), seen, self.num_slots)
        return math.sqrt(self.dim) * F.normalize(chunks, dim=-1)

    def scale(self, vectors: Tensor, *, learn: bool = False) -> Tensor:
        """Return vectors as they are: their norm is fixed."""
        return vectors

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: what is frozen must say the same every time."""
        return super().train(False)


def pooled(states: Tensor, seen: Tensor, num_slots: int) -> Tensor:
    """Return means over contiguous chunks of what is seen, ``(n, N, d)``.

    Of ``m`` seen positions slot ``j`` takes those from ``floor(j m / N)`` to
    ``ceil((j + 1) m / N)``: all of the same size where ``N`` divides ``m``, and never none.

    :param states: ``(n, L, d)``.
    :param seen: bool ``(n, L)``.
    """
    count, slot = seen.sum(1)[:, None], torch.arange(num_slots, device=seen.device)
    first = slot * count // num_slots
    end = -(-(slot + 1) * count // num_slots)
    rank = (seen.cumsum(1) - 1)[:, None]  # among what is seen
    inside = (rank >= first[..., None]) & (rank < end[..., None]) & seen[:, None]
    return inside.to(states.dtype) @ states / inside.sum(-1, keepdim=True).clamp(min=1)
