"""Models of other people through ``transformers``: their tokens, and masked ones as denoisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.denoisers.base import Kind

_PLACE_OPTIONS = (
    "revision",
    "cache_dir",
    "trust_remote_code",
    "local_files_only",
    "token",
    "subfolder",
    "force_download",
    "proxies",
)
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
        self.vocab_size, self._positions = len(ids), positions(model)
        self.before, self.after = tuple(before), tuple(after)
        self.register_buffer("ids", torch.tensor([*ids, mask_id]), persistent=False)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, vocabulary: Sequence[str], **options: Any
    ) -> Self:
        """Load a model and its tokeniser through ``transformers``.

        :param name_or_dir: name of a model on the hub, or its folder.
        :param vocabulary: our symbols, each a token of the model.
        :param options: of ``AutoModelForMaskedLM.from_pretrained``; those that say where files
            are, such as ``revision``, hold for the tokeniser, too.
        :raises ModuleNotFoundError: if ``transformers`` is not installed.
        :raises ValueError: if the model does not know a symbol, has no mask, or is of another kind.
        """
        library, owner = transformers_library("A masked language model"), cls.__name__
        tokenizer = load_tokenizer(library, name_or_dir, options)
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{owner}: the model {str(name_or_dir)!r} has no mask; choose another."
            )
        model = load_model(library.AutoModelForMaskedLM, name_or_dir, options, owner)
        ids = [token_id(tokenizer, symbol, owner) for symbol in vocabulary]
        before, after = frame(tokenizer)
        return cls(model, ids, tokenizer.mask_token_id, before=before, after=after)

    def forward(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return log-probabilities, float32 ``(*batch, L, V)``; the time is not read.

        :param tokens: int64 ``(*batch, L)``, the mask is ``V``.
        :param t: ignored.
        :raises ValueError: if the model has too few positions.
        """
        added = len(self.before) + len(self.after)
        check_length(type(self).__name__, self._positions, tokens.shape[-1], added)
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


def load_tokenizer(library: Any, name_or_dir: str | Path, options: Mapping[str, Any]) -> Any:
    """Load the tokeniser of a model.

    :param options: of the model; those that say where files are hold for its tokeniser, too.
    """
    shared = {name: options[name] for name in _PLACE_OPTIONS if name in options}
    return library.AutoTokenizer.from_pretrained(name_or_dir, **shared)


def load_model(
    loader: Any, name_or_dir: str | Path, options: Mapping[str, Any], owner: str
) -> nn.Module:
    """Load a model whose head was saved with it.

    :param loader: class of ``transformers`` for one kind of model.
    :param owner: who asks, for the error.
    :raises ValueError: if weights of the head are missing, which are then random.
    """
    model: nn.Module
    model, found = loader.from_pretrained(name_or_dir, **{**options, "output_loading_info": True})
    if missing := _missing_head(model, found["missing_keys"]):
        raise ValueError(
            f"{owner}: the model {str(name_or_dir)!r} has no weights for {missing[0]!r}, which "
            f"{type(model).__name__} needs; it was saved for another task, so choose one for this."
        )
    return model


def _missing_head(model: Any, missing: Iterable[str]) -> list[str]:
    # Of the body, weights may be missing that are never read; tied ones are those of another.
    body = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sorted(key for key in set(missing) - tied if not key.startswith(body))


def positions(model: Any) -> int | None:
    """Return how many ids a model has positions for, or None if it does not say."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # Models that count from behind their padding leave the first rows unused.
            unused = 0 if part.padding_idx is None else part.padding_idx + 1
            return part.num_embeddings - unused
    return getattr(model.config, "max_position_embeddings", None)


def check_length(owner: str, limit: int | None, count: int, added: int) -> None:
    """Refuse more ids than a model has positions for.

    :param limit: what :func:`positions` said.
    :param count: tokens of ours.
    :param added: ids before and behind them.
    :raises ValueError: if they are too many.
    """
    if limit is not None and count + added > limit:
        raise ValueError(
            f"{owner}: {count} tokens and {added} ids around them, but the model has positions "
            f"for {limit}; give at most {limit - added} tokens."
        )


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
        # Any token would do, but a tokeniser of few letters may refuse what it does not know.
        coded = tokenizer(tokenizer.mask_token or "a", return_special_tokens_mask=True)
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
