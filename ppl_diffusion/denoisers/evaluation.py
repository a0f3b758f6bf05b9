"""Evaluate a denoiser once per distinct row, and count what was paid.

After resampling most particles coincide, and between reveals most masked rows do not change: the
wrapper sends each distinct row to the network once and keeps the last call's outputs, which it
reuses for every row it has just seen at the same time (at any time, if the denoiser is
``time_free``). Costs are counted in network rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, Wrapper
from ppl_diffusion.denoisers.batching import rows_per_call
from ppl_diffusion.denoisers.checks import require_rows
from ppl_diffusion.denoisers.prediction import prefers_head
from ppl_diffusion.denoisers.times import require_time_per_row
from ppl_diffusion.rows import DistinctRows, RowTable


class Rows(NamedTuple):
    """States ``(B, L)`` with the conditions of each, ``(B, *event)``."""

    tokens: Tensor
    given: dict[str, Tensor]

    @classmethod
    def of(cls, tokens: Tensor, given: dict[str, Tensor]) -> Rows:
        batch = tokens.ndim - 1
        flat = {n: x.reshape(-1, *x.shape[batch:]) for n, x in given.items()}
        return cls(tokens.reshape(-1, tokens.shape[-1]), flat)

    @property
    def key(self) -> Tensor:
        """What the output depends on, as integers: never the tokens alone."""
        parts = [_bits(x).reshape(len(self.tokens), -1) for x in self.given.values()]
        return torch.cat([self.tokens, *parts], -1) if parts else self.tokens

    def take(self, index: Tensor) -> Rows:
        given = {n: x.index_select(0, index) for n, x in self.given.items()}
        return Rows(self.tokens.index_select(0, index), given)

    def split(self, size: int) -> list[Rows]:
        names, columns = list(self.given), [x.split(size) for x in self.given.values()]
        chunks = zip(self.tokens.split(size), *columns, strict=True)
        return [Rows(z, dict(zip(names, own, strict=True))) for z, *own in chunks]


class _Last(NamedTuple):
    """The last call; tensors are known by identity and version, which costs nothing to compare."""

    tokens: Tensor
    given: dict[str, Tensor]
    versions: list[int]
    t: float
    output: Tensor


class EvaluatedDenoiser(Wrapper):
    """A denoiser with row deduplication, reuse and counters.

    Outputs are those of the wrapped denoiser; reuse is skipped while gradients are recorded. Rows
    are the same where tokens *and* conditions are, bit by bit.

    :param reuse: keep the last call's outputs; switched off, only deduplication remains.
    :param max_rows: largest number of rows sent to the network at once; None for what suits it:
        its ``rows_per_call``, else 4096.

    :ivar rows_requested: rows asked for so far.
    :ivar rows_evaluated: rows the network saw.
    :ivar num_calls: calls of the network.
    """

    def __init__(
        self, denoiser: Denoiser, *, reuse: bool = True, max_rows: int | None = None
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be >= 1 or None, got {max_rows}.")
        self.denoiser = denoiser
        self.reuse = reuse
        self.max_rows = max_rows
        self._network_rows: int = getattr(denoiser, "network_rows", 1)
        # A denoiser made of several knows better than its caller what a row cost.
        self._is_counter = hasattr(denoiser, "rows_evaluated")
        self.rows_requested = self.rows_evaluated = self.num_calls = 0
        # With a large vocabulary hidden states are what is deduplicated and kept.
        self._sparse = prefers_head(denoiser)
        if self._sparse:
            vars(self)["head"] = denoiser.head  # type: ignore[attr-defined]
            vars(self)["hidden"] = self._hidden
            vars(self)["hidden_size"] = denoiser.hidden_size  # type: ignore[attr-defined]
        self._memory: tuple[float, RowTable] | None = None
        self._last: _Last | None = None
        optional = ("changes", "conditions", "excludes_tokens", "output_size", "network_rows")
        self.adopt(denoiser, *optional)

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return log-probabilities, shape ``(*batch, L, V)``."""
        output = self._hidden(tokens, t, **given)
        return self.denoiser.head(output) if self._sparse else output  # type: ignore[attr-defined]

    def _hidden(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        """Return the hidden states where those are kept, the log-probabilities otherwise."""
        rows = Rows.of(tokens, given)
        self.rows_requested += len(rows.tokens) * self._network_rows
        if isinstance(t, Tensor) and t.numel() > 1 and not self.time_free:
            require_time_per_row(self.denoiser, tokens, t, given)
            return self._evaluate(rows, t.expand(tokens.shape[:-1]).reshape(-1)).reshape(
                *tokens.shape, -1
            )
        t = float(t if not isinstance(t, Tensor) else t.flatten()[0])
        if (known := self._recall_last(tokens, t, given)) is not None:
            return known
        key = rows.key
        distinct = DistinctRows.of(key)
        first = distinct.first
        values = self._values(rows.take(first), key.index_select(0, first), distinct.hashes, t)
        output = values.index_select(0, distinct.inverse).reshape(*tokens.shape, -1)
        # An inference tensor can be edited without leaving a trace.
        tensors = (tokens, *given.values())
        traced = not any(x.is_inference() for x in tensors)
        if self.reuse and not torch.is_grad_enabled() and traced:
            self._last = _Last(tokens, given, [x._version for x in tensors], t, output)
        return output

    def _recall_last(self, tokens: Tensor, t: float, given: dict[str, Tensor]) -> Tensor | None:
        """Return the last output where the very same tensors come again (a twist, then a move)."""
        last = self._last
        if last is None or torch.is_grad_enabled() or last.tokens is not tokens:
            return None
        if given.keys() != last.given.keys() or not (self.time_free or t == last.t):
            return None
        same = all(x is last.given[name] for name, x in given.items())
        unmoved = [x._version for x in (tokens, *last.given.values())] == last.versions
        return last.output if same and unmoved else None

    def _values(self, rows: Rows, key: Tensor, hashes: Tensor, t: float) -> Tensor:
        if torch.is_grad_enabled() or not self.reuse:
            return self._evaluate(rows, t)
        table = self._table(key, t)
        if table is None:
            values = self._evaluate(rows, t)
        else:
            values = self._complete(table, rows, key, hashes, t)
        self._memory = (t, RowTable.build(key, values, hashes))
        return values

    def _table(self, key: Tensor, t: float) -> RowTable | None:
        """Return what is remembered, or None where it cannot be of use."""
        if self._memory is None or not (self.time_free or self._memory[0] == t):
            return None
        table = self._memory[1]
        fits = table.rows.shape[-1] == key.shape[-1] and table.rows.device == key.device
        return table if fits else None

    def _complete(
        self, table: RowTable, rows: Rows, key: Tensor, hashes: Tensor, t: float
    ) -> Tensor:
        index = table.find(key, hashes)
        (new,) = torch.where(index < 0)  # the one read of the device: how many there are
        if len(new) == len(index):
            return self._evaluate(rows, t)
        values = table.values.index_select(0, index.clamp_min_(0))
        if len(new):
            values[new] = self._evaluate(rows.take(new), t)
        return values

    def _evaluate(self, rows: Rows, t: float | Tensor) -> Tensor:
        count = len(rows.tokens)
        size = self.max_rows or rows_per_call(self.denoiser, rows.tokens.shape[-1])
        chunks = rows.split(size)
        times = t.split(size) if isinstance(t, Tensor) else [t] * len(chunks)
        self.num_calls += len(chunks)
        before = self._counted_inside
        ask = self.denoiser.hidden if self._sparse else self.denoiser  # type: ignore[attr-defined]
        pairs = zip(chunks, times, strict=True)
        outputs = [ask(chunk.tokens, time, **chunk.given) for chunk, time in pairs]
        inside = self._counted_inside - before
        self.rows_evaluated += inside if self._is_counter else count * self._network_rows
        for output, chunk in zip(outputs, chunks, strict=True):
            require_rows(output, chunk.tokens, self.vocab_size)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @property
    def _counted_inside(self) -> int:
        """Network rows that the wrapped denoiser has counted itself."""
        return getattr(self.denoiser, "rows_evaluated", 0)

    def __repr__(self) -> str:
        rows = f"{self.rows_evaluated} of {self.rows_requested} rows"
        return f"EvaluatedDenoiser({self.denoiser!r}, {rows})"


def _bits(values: Tensor) -> Tensor:
    """Return values as int64 that are equal where the values are the same bits."""
    if values.is_floating_point():
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        values = values.contiguous().view(whole)
    return values.to(torch.int64)
