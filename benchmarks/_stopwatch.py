"""A clock and counters around the two halves of a transformer."""

from __future__ import annotations

import time

from torch import Tensor

from ppl_diffusion.denoisers.transformer import Transformer


class Stopwatch:
    """A transformer with a clock around each of its halves.

    :param network: what is timed.

    :ivar seconds: time spent inside.
    :ivar calls: calls of :meth:`hidden`.
    :ivar rows: rows these saw.
    :ivar head_rows: positions whose vocabulary was computed.
    """

    def __init__(self, network: Transformer) -> None:
        self.network, self.kind, self.time_free = network, network.kind, network.time_free
        self.vocab_size, self.hidden_size = network.vocab_size, network.hidden_size
        self.rows_per_call = network.rows_per_call
        self.seconds, self.calls, self.rows, self.head_rows = 0.0, 0, 0, 0

    def __call__(self, tokens: Tensor, t: float | Tensor, /) -> Tensor:
        """Return the network's output."""
        return self.head(self.hidden(tokens, t))

    def hidden(self, tokens: Tensor, t: float | Tensor) -> Tensor:
        """Return hidden states, see :meth:`Transformer.hidden`."""
        started = time.perf_counter()
        output = self.network.hidden(tokens, t)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        self.rows += tokens[..., 0].numel()
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Return log-probabilities, see :meth:`Transformer.head`."""
        started = time.perf_counter()
        output = self.network.head(hidden)
        self.seconds += time.perf_counter() - started
        self.head_rows += hidden[..., 0].numel()
        return output
