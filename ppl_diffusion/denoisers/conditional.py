"""Class-conditional networks as denoisers, and two predictions as one.

A network trained with dropped-out labels is a family of denoisers, one per label and one without:
:class:`Labelled` picks one. Guidance needs two of them at every state; :class:`Guided` and
:class:`Paired` ask for both at once and remain a single denoiser, so that caches, counters and
filters need not know. Where both are :class:`Labelled` over one network (under filters or not) the
two predictions are one network call on twice the rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import (
    Denoiser,
    Wrapper,
    conditions_of,
    move,
)
from ppl_diffusion.denoisers.checks import clean_log_probs, require_rows
from ppl_diffusion.denoisers.filters import peel
from ppl_diffusion.denoisers.guidance import guided_log_probs
from ppl_diffusion.denoisers.prediction import has_head
from ppl_diffusion.errors import CapabilityError


class Labelled(Wrapper):
    """A class-conditional network with its label filled in: a denoiser like any other.

    The network is called as ``network(tokens, t, label=label)``, and so is its ``hidden`` if it has
    one; ``label`` is int64 and broadcasts to the batch, where ``num_classes`` stands for "no label"
    (the null class of label dropout). A label per row is a *condition*, which chains carry along
    with their states: ``Labelled(network, "given")`` reads ``given={"label": ...}``.

    :param network: network with ``vocab_size``, ``kind``, ``time_free`` and a number of classes,
        ``num_classes`` or ``config.num_classes``.
    :param label: the class, ``0..num_classes - 1``; None for no label, ``"given"`` for that of the
        chain.
    :raises CapabilityError: if the network has no classes.
    :raises ValueError: if the label is none of its classes.
    """

    def __init__(self, network: Any, label: int | Literal["given"] | None) -> None:
        self.network, self.num_classes = network, _num_classes(network)
        self.label = label if label == "given" else _check_label(label, self.num_classes)
        self.conditions: Mapping[str, int] = {"label": 0} if label == "given" else {}
        # A class in words: nothing else tells the laws of two labels apart.
        fixed = not (self.conditions or self.unconditional)
        self.changes: tuple[str, ...] = (f"label {self.label}",) if fixed else ()
        self.adopt(network, "process", "rows_per_call")
        if has_head(network):
            self.adopt(network, "head", "hidden_size")
            vars(self)["hidden"] = self._hidden

    @property
    def unconditional(self) -> bool:
        """Whether the label is the null class."""
        return self.label == self.num_classes

    def labels(self, tokens: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return the label that the network is given, a scalar or one per row."""
        if self.label == "given":
            return given["label"]
        return torch.tensor(self.label, device=tokens.device)

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return log-probabilities given the label, shape ``(*batch, L, V)``."""
        log_probs: Tensor = self.network(tokens, t, label=self.labels(tokens, given))
        return log_probs

    def _hidden(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        hidden: Tensor = self.network.hidden(tokens, t, label=self.labels(tokens, given))
        return hidden

    def __repr__(self) -> str:
        label = "no label" if self.unconditional else f"label={self.label}"
        return f"Labelled({type(self.network).__name__}, {label})"


class Paired(Wrapper):
    """A conditional and an unconditional denoiser asked at the same states.

    What they return is checked before the two are put together, by the rules of the kernels.

    :param conditional: ``log p(x0 | x_t, y)``.
    :param unconditional: ``log p(x0 | x_t)``, of the same kind and vocabulary.
    :raises CapabilityError: if the two do not fit together.

    :ivar output_size: ``2 V``: both rows of log-probabilities, the conditional ones first.
    :ivar network_rows: network rows that one state costs.
    :ivar excludes_tokens: whether a filter of either may exclude tokens that its network allows.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser) -> None:
        _check_pair(conditional, unconditional)
        self.conditional, self.unconditional = conditional, unconditional
        self.vocab_size, self.kind = conditional.vocab_size, conditional.kind
        self.output_size = 2 * self.vocab_size
        self.time_free = conditional.time_free and unconditional.time_free
        self.network_rows = sum(getattr(part, "network_rows", 1) for part in self._parts)
        self.num_padding = min(getattr(part, "num_padding", 0) for part in self._parts)
        self.excludes_tokens = any(getattr(p, "excludes_tokens", False) for p in self._parts)
        if all(hasattr(part, "parameters") for part in self._parts):
            vars(self)["parameters"] = self._all_parameters
        if all(hasattr(part, "rows_per_call") for part in self._parts):
            vars(self)["rows_per_call"] = self._rows_per_call
        for part in self._parts:
            if hasattr(part, "process"):
                self.process = part.process

    @property
    def changes(self) -> tuple[str, ...]:
        """What the filters of the two do to their laws."""
        return tuple(dict.fromkeys(c for part in self._parts for c in getattr(part, "changes", ())))

    @property
    def conditions(self) -> Mapping[str, int]:
        """What either of the two reads."""
        return {n: dims for part in self._parts for n, dims in conditions_of(part).items()}

    def predict(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the conditional and the unconditional log-probabilities.

        :param given: conditions; each part gets those that it reads.
        :returns: float64 ``(*batch, L, V)`` each, normalised.
        :raises TypeError: if a denoiser returns no tensor.
        :raises ValueError: if one returns the wrong shape, NaN or unnormalised rows.
        """
        if (network := self._shared_network) is None:
            first, second = (
                clean_log_probs(part(tokens, t, **_own(part, given)), tokens.shape, self.vocab_size)
                for part in self._parts
            )
            return first, second
        both = torch.stack([tokens, tokens])
        output = network(both, t, label=self._labels(both, given))
        rows = clean_log_probs(output, both.shape, self.vocab_size).unbind()
        return self._filter(0, rows[0]), self._filter(1, rows[1])

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return both predictions side by side, shape ``(*batch, L, 2 V)``."""
        return torch.cat(self.predict(tokens, t, **given), -1)

    @property
    def _parts(self) -> tuple[Any, Any]:
        return self.conditional, self.unconditional

    @property
    def _shared_network(self) -> Any:
        """The network below both parts, or None where there are two."""
        first, second = (peel(part)[0] for part in self._parts)
        same = isinstance(first, Labelled) and isinstance(second, Labelled)
        return first.network if same and first.network is second.network else None  # type: ignore[attr-defined]

    def _labels(self, both: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        parts = [peel(part)[0] for part in self._parts]
        labels = [part.labels(both, given) for part in parts]  # type: ignore[attr-defined]
        stacked = torch.stack(torch.broadcast_tensors(*labels))
        return stacked.reshape(2, *[1] * (both.ndim - 1 - stacked.ndim), *stacked.shape[1:])

    def _filter(self, which: int, log_probs: Tensor) -> Tensor:
        for layer in peel(self._parts[which])[1]:
            log_probs = layer.filter_output(log_probs, log_probs.shape[:-1])
        return log_probs

    def to(self, device: torch.device | str) -> None:
        """Move both parts, in place."""
        for part in self._parts:
            move(part, device)

    def _rows_per_call(self, length: int) -> int:
        # A shared network sees every state twice.
        return max(min(part.rows_per_call(length) for part in self._parts) // 2, 1)

    def _all_parameters(self) -> list[Tensor]:
        return [*self.conditional.parameters(), *self.unconditional.parameters()]  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.conditional!r}, {self.unconditional!r})"


class Guided(Paired):
    """Classifier-free guidance of the prediction: ``c_w ~ c_y**w c_0**(1 - w)``, renormalised.

    The exponents sum to one, so what turns a posterior into a cavity prediction is the same factor
    before and after: two ``"posterior"`` denoisers may be mixed as they are. A token that either
    prediction excludes is excluded, whatever the weight (see
    :func:`~ppl_diffusion.denoisers.guidance.guided_log_probs`).

    :param conditional: ``log p(x0 | x_t, y)``.
    :param unconditional: ``log p(x0 | x_t)``.
    :param weight: ``w``; 0 is unconditional, 1 conditional, above 1 overshoots.
    :param mask_id: where given, positions that hold another state need no prediction, and a pair of
        predictions without a common token is an error at masks only.
    :raises CapabilityError: if the two do not fit together.
    """

    def __init__(
        self,
        conditional: Denoiser,
        unconditional: Denoiser,
        weight: float,
        *,
        mask_id: int | None = None,
    ) -> None:
        super().__init__(conditional, unconditional)
        self.weight, self.mask_id = float(weight), mask_id
        self.output_size = self.vocab_size
        if all(has_head(part) for part in self._parts):
            self._split = [*(int(part.hidden_size) for part in self._parts), 1]
            self.hidden_size = sum(self._split)
            vars(self)["hidden"], vars(self)["head"] = self._hidden, self._head

    @property
    def changes(self) -> tuple[str, ...]:
        """What the filters and the guidance do to the law."""
        return (*super().changes, f"classifier-free guidance {self.weight:g} of the denoiser")

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return the guided log-probabilities, float64 ``(*batch, L, V)``.

        :raises TypeError: if a denoiser returns no tensor.
        :raises ValueError: if one misbehaves, or the two predictions of a position have no token in
            common.
        """
        log_c = guided_log_probs(*self.predict(tokens, t, **given), self.weight)
        return require_common_support(log_c, self._unread(tokens))

    def _hidden(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        """Return both hidden states, and a last column that says where nobody reads the head."""
        parts = self._hidden_parts(tokens, t, given)
        unread = self._unread(tokens)
        flag = torch.zeros_like(tokens) if unread is None else unread
        return torch.cat([*parts, flag[..., None].to(parts[0].dtype)], -1)

    def _hidden_parts(
        self, tokens: Tensor, t: float | Tensor, given: Mapping[str, Tensor]
    ) -> list[Tensor]:
        if (network := self._shared_network) is None:
            parts = [part.hidden(tokens, t, **_own(part, given)) for part in self._parts]
            for hidden in parts:
                require_rows(hidden, tokens, self.vocab_size)
            return parts
        both = torch.stack([tokens, tokens])
        hidden = network.hidden(both, t, label=self._labels(both, given))
        require_rows(hidden, both, self.vocab_size)
        return list(hidden.unbind())

    def _head(self, hidden: Tensor) -> Tensor:
        *rows, flag = hidden.split(self._split, -1)
        first, second = (
            clean_log_probs(part.head(row), row.shape[:-1], self.vocab_size)
            for part, row in zip(self._parts, rows, strict=True)
        )
        log_c = guided_log_probs(first, second, self.weight)
        return require_common_support(log_c, flag[..., 0] > 0)

    def _unread(self, tokens: Tensor) -> Tensor | None:
        return None if self.mask_id is None else tokens != self.mask_id

    def __repr__(self) -> str:
        return f"Guided({self.conditional!r}, {self.unconditional!r}, {self.weight:g})"


def require_common_support(log_probs: Tensor, unread: Tensor | None = None) -> Tensor:
    """Refuse guided rows that exclude everything; flatten them where nobody reads them.

    :param log_probs: log-probabilities, ``(..., L, n)``.
    :param unread: bool ``(..., L)``, rows that are not used, or None.
    :raises ValueError: if a row that is used has no finite entry.
    """
    dead = (log_probs == -torch.inf).all(-1)
    if not bool(dead.any()):
        return log_probs
    used = dead if unread is None else dead & ~unread
    if bool(used.any()):
        where = tuple(int(i) for i in used.nonzero()[0])
        raise ValueError(
            f"classifier-free guidance: the conditional and the unconditional law at {where} have "
            "no state in common; soften their filters or use a weight of 0 or 1."
        )
    return log_probs.masked_fill(dead[..., None], -math.log(log_probs.shape[-1]))


def _own(part: Denoiser, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in conditions_of(part)}


def _num_classes(network: Any) -> int:
    config = getattr(network, "config", None)
    count = getattr(network, "num_classes", getattr(config, "num_classes", 0))
    if not isinstance(count, int) or count < 1:
        raise CapabilityError(
            f"Labelled: {type(network).__name__} has no classes; train one with num_classes >= 1."
        )
    return count


def _check_label(label: Any, num_classes: int) -> int:
    if label is None:
        return num_classes
    try:
        value = operator.index(label)
    except TypeError:
        value = -1
    if not 0 <= value < num_classes:
        raise ValueError(
            f"Labelled: label must lie in 0..{num_classes - 1}, or be None for no label, "
            f"got {label!r}."
        )
    return value


def _check_pair(conditional: Denoiser, unconditional: Denoiser) -> None:
    for name in ("vocab_size", "kind"):
        here, there = getattr(conditional, name), getattr(unconditional, name)
        if here != there:
            raise CapabilityError(
                f"classifier-free guidance: the conditional denoiser has {name} {here!r}, the "
                f"unconditional one {there!r}; use two of the same."
            )
