"""Evaluate a denoiser once per distinct row, and count what was paid.

After resampling most particles coincide, and between reveals most masked rows do not change: the
wrapper sends each distinct row to the network once and keeps the last call's outputs, which it
reuses for every row it has just seen at the same time (at any time, if the denoiser is
``time_free``). Costs are counted in network rows.
"""

import torch
from torch import Tensor

from ppl_diffusion.denoisers.base import Denoiser, Kind, forward_parameters
from ppl_diffusion.denoisers.checks import require_rows
from ppl_diffusion.denoisers.filters import forward_optional
from ppl_diffusion.denoisers.prediction import prefers_head
from ppl_diffusion.rows import RowTable, distinct_rows


class EvaluatedDenoiser:
    """A denoiser with row deduplication, reuse and counters.

    Outputs are those of the wrapped denoiser; reuse is skipped while gradients are recorded.

    :param denoiser: the denoiser to evaluate.
    :param reuse: keep the last call's outputs; switched off, only deduplication remains.
    :param max_rows: largest number of rows sent to the network at once (bounds its memory).

    :ivar rows_requested: rows asked for so far.
    :ivar rows_evaluated: rows the network saw.
    :ivar num_calls: calls of the network.
    """

    def __init__(
        self, denoiser: Denoiser, *, reuse: bool = True, max_rows: int | None = 4096
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be >= 1 or None, got {max_rows}.")
        self.denoiser = denoiser
        self.reuse = reuse
        self.max_rows = max_rows
        self.vocab_size: int = denoiser.vocab_size
        self.kind: Kind = denoiser.kind
        self.time_free: bool = denoiser.time_free
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
        self._last: tuple[Tensor, int, float, Tensor] | None = None
        forward_parameters(self, denoiser)
        forward_optional(
            self, denoiser, "changes", "excludes_tokens", "output_size", "network_rows"
        )

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return log-probabilities, shape ``(*batch, L, V)``.

        :param tokens: states, int64 ``(*batch, L)``.
        :param t: time in ``[0, 1]``, a number or one per row; rows with times of their own are
            neither deduplicated nor reused, unless the denoiser is time-free.
        """
        output = self._hidden(tokens, t)
        return self.denoiser.head(output) if self._sparse else output  # type: ignore[attr-defined]

    def _hidden(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return the hidden states where those are kept, the log-probabilities otherwise."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        self.rows_requested += len(rows) * self._network_rows
        if isinstance(t, Tensor) and t.numel() > 1 and not self.time_free:
            return self._evaluate(rows, t.expand(tokens.shape[:-1]).reshape(-1)).reshape(
                *tokens.shape, -1
            )
        t = float(t if not isinstance(t, Tensor) else t.flatten()[0])
        if (known := self._recall_last(tokens, t)) is not None:
            return known
        first, inverse = distinct_rows(rows)
        values = self._values(rows[first], t)
        output = values[inverse].reshape(*tokens.shape, -1)
        # An inference tensor can be edited without leaving a trace.
        if self.reuse and not torch.is_grad_enabled() and not tokens.is_inference():
            self._last = (tokens, tokens._version, t, output)
        return output

    def _recall_last(self, tokens: Tensor, t: float) -> Tensor | None:
        """Return the last output where the very same tensor comes again (a twist, then a move)."""
        if self._last is None or torch.is_grad_enabled() or tokens.is_inference():
            return None
        last, version, time, output = self._last
        same = last is tokens and version == tokens._version and (self.time_free or t == time)
        return output if same else None

    def _values(self, rows: Tensor, t: float) -> Tensor:
        if torch.is_grad_enabled() or not self.reuse:
            return self._evaluate(rows, t)
        known = self._recall(rows, t)
        values = self._evaluate(rows, t) if known is None else self._complete(rows, t, *known)
        self._memory = (t, RowTable.build(rows, values))
        return values

    def _recall(self, rows: Tensor, t: float) -> tuple[Tensor, Tensor] | None:
        """Return ``(index, remembered values)``, or None where nothing can be reused."""
        if self._memory is None or not (self.time_free or self._memory[0] == t):
            return None
        table = self._memory[1]
        if table.rows.shape[-1] != rows.shape[-1]:
            return None
        index = table.find(rows)
        return (index, table.values) if bool((index >= 0).any()) else None

    def _complete(self, rows: Tensor, t: float, index: Tensor, remembered: Tensor) -> Tensor:
        values = remembered[index.clamp_min(0)]
        new = index < 0
        if bool(new.any()):
            values[new] = self._evaluate(rows[new], t)
        return values

    def _evaluate(self, rows: Tensor, t: float | Tensor) -> Tensor:
        size = len(rows) if self.max_rows is None else self.max_rows
        chunks = rows.split(max(size, 1))
        times = t.split(max(size, 1)) if isinstance(t, Tensor) else [t] * len(chunks)
        self.num_calls += len(chunks)
        before = self._counted_inside
        ask = self.denoiser.hidden if self._sparse else self.denoiser  # type: ignore[attr-defined]
        outputs = [ask(chunk, time) for chunk, time in zip(chunks, times, strict=True)]
        inside = self._counted_inside - before
        self.rows_evaluated += inside if self._is_counter else len(rows) * self._network_rows
        for output, chunk in zip(outputs, chunks, strict=True):
            require_rows(output, chunk, self.vocab_size)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @property
    def _counted_inside(self) -> int:
        """Network rows that the wrapped denoiser has counted itself."""
        return getattr(self.denoiser, "rows_evaluated", 0)

    def __repr__(self) -> str:
        rows = f"{self.rows_evaluated} of {self.rows_requested} rows"
        return f"EvaluatedDenoiser({self.denoiser!r}, {rows})"
