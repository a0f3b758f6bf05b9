"""Networks that read one-hot sequences, in the convention of DNA models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TorchReward:
    """A network on one-hot sequences, to be given to a :class:`~ppl_diffusion.potentials.Reward`.

    It reads float32 ``(n, alphabet, L)``: a row for each symbol in the order of the tokens (A, C,
    G, T), a column for each position; columns of tokens beyond the alphabet, such as padding, are
    zero. It answers ``(n,)``, ``(n, 1)`` or ``(n, heads)``. It is asked in evaluation mode and
    without gradients, where its parameters lie.

    :param module: the network.
    :param num_symbols: size of the alphabet.
    :param head: which of several outputs is read.
    :param batch_size: sequences at once.
    :raises TypeError: if the network is none.
    :raises ValueError: if a number cannot be used.

    Example::

        Reward(TorchReward(expression, 4, head=1), temperature=0.2)
    """

    def __init__(
        self,
        module: nn.Module,
        num_symbols: int,
        *,
        head: int | None = None,
        batch_size: int = 256,
    ) -> None:
        self.__name__ = type(module).__name__
        if not isinstance(module, nn.Module):
            raise TypeError(f"TorchReward: a torch.nn.Module is needed, got {self.__name__}.")
        least = {"num_symbols": 1, "batch_size": 1, "head": 0}
        given = {"num_symbols": num_symbols, "batch_size": batch_size, "head": head or 0}
        for name, number in given.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < least[name]:
                raise ValueError(
                    f"{self.__name__}: {name} must be a whole number, at least {least[name]}, "
                    f"got {number!r}."
                )
        self.module, self.num_symbols = module.eval(), num_symbols
        self.head, self.batch_size = head, batch_size

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the network's answers, ``(B,)``.

        :param rows: int64 ``(B, L)``.
        :raises ValueError: if it cannot read the sequences, or answers in another shape.
        """
        self.module.eval()  # whoever trains it meanwhile has switched it back
        device = next((p.device for p in self.module.parameters()), rows.device)
        with torch.no_grad():
            parts = [self._ask(self._one_hot(part).to(device)) for part in self._batches(rows)]
        return torch.cat(parts).to("cpu", torch.float64)

    def _batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.batch_size)

    def _one_hot(self, rows: Tensor) -> Tensor:
        """Return float32 ``(n, alphabet, L)``, zero where a token is none of the alphabet."""
        symbols = torch.arange(self.num_symbols, device=rows.device)
        return (rows[:, None] == symbols[:, None]).to(torch.float32)

    def _ask(self, one_hot: Tensor) -> Tensor:
        shape = tuple(one_hot.shape)
        try:
            answer: Any = self.module(one_hot)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"{self.__name__} cannot read one-hot sequences of shape {shape} "
                f"(n, alphabet, L): {reason}"
            ) from error
        return self._read(answer, shape)

    def _read(self, answer: Any, shape: tuple[int, ...]) -> Tensor:
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        if found == shape[:1] and not self.head:
            column: Tensor = answer
            return column
        table = isinstance(found, tuple) and len(found) == 2 and found[0] == shape[0]
        if not table:
            raise ValueError(
                f"{self.__name__} answered {found} to one-hot sequences of shape {shape}; it must "
                f"answer ({shape[0]},) or ({shape[0]}, heads)."
            )
        return self._column(answer)

    def _column(self, answer: Tensor) -> Tensor:
        heads = answer.shape[1]
        if (heads > 1 and self.head is None) or (self.head or 0) >= heads:
            raise ValueError(
                f"{self.__name__} answered shape {tuple(answer.shape)}, and head is {self.head}; "
                f"give one from 0 to {heads - 1}."
            )
        return answer[:, self.head or 0]
