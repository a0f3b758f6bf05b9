"""Evaluate a denoiser once per distinct row, and count what was paid.

After resampling most particles coincide, and between reveals most masked rows do not change: the
wrapper sends each distinct row to the network once and keeps the last call's outputs, which it
reuses for every row it has just seen at the same time (at any time, if the denoiser is
``time_free``). Costs are counted in network rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, Wrapper
from ppl_diffusion.denoisers.batching import row_limit, rows_per_call
from ppl_diffusion.denoisers.checks import require_rows
from ppl_diffusion.denoisers.latent import LatentDenoiser
from ppl_diffusion.denoisers.prediction import prefers_head
from ppl_diffusion.denoisers.times import MOST_PROBES, require_time_per_row
from ppl_diffusion.distributed import shared_rows
from ppl_diffusion.rows import DistinctRows, RowTable

LITTLE = 7 / 8
"""Share of distinct rows above which it does not pay to compare them."""


class Rows(NamedTuple):
    """States ``(B, L)`` with the conditions of each, ``(B, *event)``, and its time, or one for all.

    A time is None where the network does not read it.
    """

    tokens: Tensor
    given: dict[str, Tensor]
    t: float | Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, given: dict[str, Tensor], t: float | Tensor | None = None) -> Rows:
        batch = tokens.ndim - 1
        flat = {n: x.reshape(-1, *x.shape[batch:]) for n, x in given.items()}
        times = t.expand(tokens.shape[:-1]).reshape(-1) if isinstance(t, Tensor) else t
        return cls(tokens.reshape(-1, tokens.shape[-1]), flat, times)

    @property
    def key(self) -> Tensor:
        """What the output depends on, as integers: never the tokens alone."""
        own = [self.t] if isinstance(self.t, Tensor) else []
        parts = [_bits(x).reshape(len(self.tokens), -1) for x in (*self.given.values(), *own)]
        return torch.cat([self.tokens, *parts], -1) if parts else self.tokens

    def take(self, index: Tensor | slice) -> Rows:
        t = self.t[index] if isinstance(self.t, Tensor) else self.t
        return Rows(self.tokens[index], {n: x[index] for n, x in self.given.items()}, t)

    def split(self, size: int) -> list[Rows]:
        if len(self.tokens) <= size:
            return [self]
        parts = torch.arange(len(self.tokens), device=self.tokens.device).split(size)
        return [self.take(part) for part in parts]


class LastCall(NamedTuple):
    """The last call; tensors are known by identity and version, which costs nothing to compare."""

    tokens: Tensor
    given: dict[str, Tensor]
    versions: list[int]
    t: float | Tensor | None
    output: Tensor


class Remembered:
    """The rows of the last call and what came back; nobody hashes them before they are missed."""

    def __init__(self, rows: Rows, values: Tensor, table: RowTable | None = None) -> None:
        self.rows, self._values, self._table = rows, values, table

    def serves(self, rows: Rows) -> bool:
        """Return whether these rows may be among those remembered."""
        mine, own = self.rows.t, rows.t
        each = isinstance(mine, Tensor), isinstance(own, Tensor)
        same = all(each) or (not any(each) and mine == own)
        return same and self.rows.tokens.device == rows.tokens.device

    @property
    def table(self) -> RowTable:
        """The same by row."""
        if self._table is None:
            key = self.rows.key
            first, _, hashes = DistinctRows.of(key)
            self._table = RowTable.build(key[first], self._values[first], hashes)
        return self._table


class EvaluatedDenoiser(Wrapper):
    """A denoiser with row deduplication, reuse and counters.

    Outputs are those of the wrapped denoiser; reuse is skipped while gradients are recorded. Rows
    are the same where tokens *and* conditions are, bit by bit.

    :param reuse: keep the last call's outputs; switched off, only deduplication remains.
    :param max_rows: largest number of rows sent to the network at once; None for what suits it:
        its ``rows_per_call``, else 4096.

    :ivar all_new: a hint for the next call: every row has moved since the last one, so that it is
        another row, and equal to its neighbours by chance only. Once such calls spare next to
        nothing, rows are no longer compared in them.
    :ivar rows_requested: rows asked for so far.
    :ivar rows_evaluated: rows the network saw.
    :ivar num_calls: calls of the network.
    """

    def __init__(
        self, denoiser: Denoiser, *, reuse: bool = True, max_rows: int | None = None
    ) -> None:
        self.denoiser = denoiser
        self.reuse = reuse
        self.max_rows = row_limit(max_rows)
        self._network_rows: int = getattr(denoiser, "network_rows", 1)
        # A denoiser made of several knows better than its caller what a row cost.
        self._is_counter = hasattr(denoiser, "rows_evaluated")
        self.rows_requested = self.rows_evaluated = self.num_calls = 0
        # With a large vocabulary hidden states are what is deduplicated and kept, and with a latent
        # the rows that both heads read.
        self._joint = isinstance(denoiser, LatentDenoiser)
        self._sparse = self._joint or prefers_head(denoiser)
        self._ask: Callable[..., Tensor] = denoiser
        self._beside = 0
        if isinstance(denoiser, LatentDenoiser):
            self._ask, self._beside = denoiser.joint, denoiser.latent.num_slots
            vars(self)["joint"] = self._hidden
            self.adopt(denoiser, "latent", "latent_head", "head")
        elif self._sparse:
            self._ask = denoiser.hidden  # type: ignore[attr-defined]
            vars(self)["hidden"] = self._hidden
            self.adopt(denoiser, "head", "hidden_size")
        self.all_new, self._all_differ, self._sent, self._time = False, False, 0, 1.0
        self._probes = 0
        self._memory: Remembered | None = None
        self._last: LastCall | None = None
        optional = ("changes", "conditions", "excludes_tokens", "output_size", "network_rows")
        self.adopt(denoiser, *optional)

    def __call__(self, tokens: Tensor, t: float | Tensor, /, **given: Tensor) -> Tensor:
        """Return log-probabilities, shape ``(*batch, L, V)``."""
        output = self._hidden(tokens, t, **given)
        if not self._sparse:
            return output
        return self.denoiser.head(output[..., : tokens.shape[-1], :])  # type: ignore[attr-defined]

    def _hidden(self, tokens: Tensor, t: float | Tensor, **given: Tensor) -> Tensor:
        """Return the rows where those are kept, the log-probabilities otherwise."""
        if isinstance(t, Tensor) and t.numel() > 1 and not self.time_free:
            self._check_times(tokens, t, given)
            time: float | Tensor | None = t
        else:
            number = float(t if not isinstance(t, Tensor) else t.flatten()[0])
            time, self._time = None if self.time_free else number, number
        rows = Rows.of(tokens, given, time)
        self.rows_requested += len(rows.tokens) * self._network_rows
        all_new, self.all_new = self.all_new, False
        if (known := self._recall_last(tokens, time, given)) is not None:
            return known
        # An inference tensor can be edited without leaving a trace.
        tensors = (tokens, *given.values())
        traced = not any(x.is_inference() for x in tensors)
        keep = self.reuse and not torch.is_grad_enabled()
        if all_new and self._all_differ and keep:
            values = self._evaluate(rows)
            self._memory = Remembered(rows, values)
        else:
            values = self._compared(rows, keep)
            self._all_differ = all_new and self._sent > LITTLE * len(rows.tokens)
        output = values.reshape(*tokens.shape[:-1], tokens.shape[-1] + self._beside, -1)
        if keep and traced:
            self._last = LastCall(tokens, given, [x._version for x in tensors], time, output)
        return output

    def _check_times(self, tokens: Tensor, t: Tensor, given: dict[str, Tensor]) -> None:
        # A state may not show the time, the fully masked one for instance: later ones are tried.
        if self._probes < MOST_PROBES:
            settled = require_time_per_row(self.denoiser, tokens, t, given)
            self._probes = MOST_PROBES if settled else self._probes + 1

    def _recall_last(
        self, tokens: Tensor, t: float | Tensor | None, given: dict[str, Tensor]
    ) -> Tensor | None:
        """Return the last output where the very same tensors come again (a twist, then a move)."""
        last = self._last
        if last is None or torch.is_grad_enabled() or last.tokens is not tokens:
            return None
        timed = isinstance(t, Tensor) or isinstance(last.t, Tensor)
        if given.keys() != last.given.keys() or (t is not last.t if timed else t != last.t):
            return None
        same = all(x is last.given[name] for name, x in given.items())
        unmoved = [x._version for x in (tokens, *last.given.values())] == last.versions
        return last.output if same and unmoved else None

    def _compared(self, rows: Rows, keep: bool) -> Tensor:
        """Return the outputs of rows, of which each distinct and unknown one is evaluated."""
        key, self._sent = rows.key, 0
        first, inverse, hashes = DistinctRows.of(key)
        distinct, own = rows.take(first), key.index_select(0, first)
        memory = self._memory if keep else None
        known = memory is not None and memory.serves(rows)
        if known and memory is not None and memory.table.rows.shape[-1] == key.shape[-1]:
            values = self._complete(memory.table, distinct, own, hashes)
        else:
            values = self._evaluate(distinct)
        if keep:
            self._memory = Remembered(distinct, values, RowTable.build(own, values, hashes))
        return values.index_select(0, inverse)

    def _complete(self, table: RowTable, rows: Rows, key: Tensor, hashes: Tensor) -> Tensor:
        index = table.find(key, hashes)
        (new,) = torch.where(index < 0)  # the one read of the device: how many there are
        if len(new) == len(index):
            return self._evaluate(rows)
        values = table.values.index_select(0, index.clamp_min_(0))
        if len(new):
            values[new] = self._evaluate(rows.take(new))
        return values

    def _evaluate(self, rows: Rows) -> Tensor:
        count = self._sent = len(rows.tokens)

        def ask(part: slice) -> Tensor:
            whole = part.stop - part.start == count
            return self._asked(rows if whole else rows.take(part))

        device = rows.tokens.device
        values, inside = shared_rows(count, ask, device, lambda: self._counted_inside)
        self.rows_evaluated += inside if self._is_counter else count * self._network_rows
        return values

    def _asked(self, rows: Rows) -> Tensor:
        size = self.max_rows or rows_per_call(self.denoiser, rows.tokens.shape[-1])
        chunks = rows.split(size)
        self.num_calls += len(chunks)
        outputs = [
            self._ask(c.tokens, self._time if c.t is None else c.t, **c.given) for c in chunks
        ]
        for output, chunk in zip(outputs, chunks, strict=True):
            require_rows(output, chunk.tokens, self.vocab_size, self._beside)
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
