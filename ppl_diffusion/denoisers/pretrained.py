"""Models of other people through ``transformers``: their tokens, and masked ones as denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Kind

_HERE = -1  # no id, so that it is found among those that a tokeniser adds


class MaskedLanguageModel(nn.Module):
    """A masked language model as the denoiser of an absorbing process, without training.

    Its answer at a mask is the law of our tokens there: its logits at their ids, normalised anew,
    so that no mass is on what we have no token for. It was trained on a fixed share of masks, and
    need not be good where most is hidden; nor are its answers those of one joint law.

    :param model: a ``transformers`` model whose output has ``logits``, ``(n, L, ids)``.
    :param ids: id of each of our tokens in its vocabulary.
    :param mask_id: its id of the mask.
    :param before: ids it wants before a sequence, such as that of ``[CLS]``; ``after`` behind it.
    :raises ValueError: if an id is none of the model's, or two tokens have one id.

    :ivar vocab_size: number ``V`` of our tokens; ``V`` is our mask.
    """

    kind: Kind = "posterior"
    time_free = True
    ids: Tensor

    def __init__(
        self,
        model: nn.Module,
        ids: Sequence[int],
        mask_id: int,
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        check_ids(type(self).__name__, model, [*ids, mask_id])
        self.vocab_size = len(ids)
        self.before, self.after = tuple(before), tuple(after)
        self.register_buffer("ids", torch.tensor([*ids, mask_id]), persistent=False)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, vocabulary: Sequence[str], **options: Any
    ) -> Self:
        """Load a model and its tokeniser through ``transformers``.

        :param name_or_dir: name of a model on the hub, or its folder.
        :param vocabulary: our symbols, each a token of the model.
        :param options: of ``AutoModelForMaskedLM.from_pretrained``.
        :raises ModuleNotFoundError: if ``transformers`` is not installed.
        :raises ValueError: if the model does not know a symbol, or has no mask.
        """
        library, owner = transformers_library("A masked language model"), cls.__name__
        tokenizer = library.AutoTokenizer.from_pretrained(name_or_dir)
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{owner}: the model {str(name_or_dir)!r} has no mask; choose another."
            )
        model = library.AutoModelForMaskedLM.from_pretrained(name_or_dir, **options)
        ids = [token_id(tokenizer, symbol, owner) for symbol in vocabulary]
        before, after = frame(tokenizer)
        return cls(model, ids, tokenizer.mask_token_id, before=before, after=after)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return log-probabilities, float32 ``(*batch, L, V)``; the time is not read.

        :param tokens: int64 ``(*batch, L)``, the mask is ``V``.
        :param t: ignored.
        """
        rows = self.ids[tokens].reshape(-1, tokens.shape[-1])
        first, last = (
            torch.tensor(part, dtype=rows.dtype, device=rows.device).expand(len(rows), -1)
            for part in (self.before, self.after)
        )
        whole = torch.cat([first, rows, last], -1)
        logits = self.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        start = len(self.before)
        inside = logits[:, start : start + rows.shape[1], self.ids[:-1]]
        return F.log_softmax(inside.float(), -1).reshape(*tokens.shape, self.vocab_size)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: what is frozen must say the same every time."""
        return super().train(False)


def token_id(tokenizer: Any, symbol: str, owner: str, remedy: str = "") -> int:
    """Return the id of one of our symbols in another vocabulary.

    :param owner: who asks, for the error.
    :param remedy: what else than another model would help, for the same.
    :raises ValueError: if it is no token there.
    """
    found = tokenizer.convert_tokens_to_ids(symbol)
    if found is None or (found == tokenizer.unk_token_id and symbol != tokenizer.unk_token):
        raise ValueError(
            f"{owner}: {symbol!r} is no token of the model; {remedy}choose a model that has it."
        )
    return int(found)


def check_ids(owner: str, model: Any, ids: Sequence[int]) -> None:
    """Refuse ids that a model does not have, or that stand for two tokens at once."""
    size = int(model.config.vocab_size)
    if outside := [i for i in ids if not 0 <= i < size]:
        raise ValueError(
            f"{owner}: the model has the ids 0 to {size - 1}, but ours include {outside[0]}; give "
            "the ids of its own tokeniser."
        )
    if len(set(ids)) < len(ids):
        double = next(i for i in ids if list(ids).count(i) > 1)
        raise ValueError(
            f"{owner}: two of our tokens, or one and the mask, have the id {double} of the model; "
            "give each token an id of its own."
        )


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokeniser puts before and behind a sequence."""
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer("a", return_special_tokens_mask=True)
        added = [bool(one) for one in coded["special_tokens_mask"]]
        if False in added:
            first, last = added.index(False), added[::-1].index(False)
            ids = list(coded["input_ids"])
            return ids[:first], ids[len(ids) - last :]
    elif hasattr(tokenizer, "build_inputs_with_special_tokens"):
        whole = list(tokenizer.build_inputs_with_special_tokens([_HERE]))
        return whole[: whole.index(_HERE)], whole[whole.index(_HERE) + 1 :]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    end = tokenizer.eos_token_id if end is None else end
    return ([] if start is None else [start]), ([] if end is None else [end])


def transformers_library(what: str) -> Any:
    """Return the module ``transformers``.

    :param what: what needs it, for the error.
    :raises ModuleNotFoundError: if it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs transformers, but {error.name} is not installed; "
            "run `pip install 'ppl-diffusion[adapters]'`."
        ) from error
    return transformers
