"""Functions of strings as functions of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Decode = Callable[[Tensor], Sequence[str]]
"""``rows (B, L) int64 -> B`` strings, such as ``prior.decode``."""


def decoded(decode: Decode, rows: Tensor, owner: str) -> list[str]:
    """Return the string of each row.

    :param rows: int64 ``(B, L)``.
    :param owner: what errors name.
    :raises ValueError: if ``decode`` does not return a string for each.
    """
    found = decode(rows)
    strings = [found] if isinstance(found, str) else list(found)
    odd = next((type(one).__name__ for one in strings if not isinstance(one, str)), None)
    if odd is not None or len(strings) != len(rows):
        what = f"{len(strings)} strings" if odd is None else f"an object of type {odd}"
        raise ValueError(
            f"{owner}: decode returned {what} for {len(rows)} sequences; return one string each."
        )
    return strings


class TextReward:
    """A function of strings, to be given to a :class:`~ppl_diffusion.potentials.Reward`.

    :param fn: ``list[str] -> numbers``, one for each.
    :param decode: makes strings of tokens.
    :raises TypeError: if one of them cannot be called.

    Example::

        Reward(TextReward(score, prior.decode), temperature=0.5)
    """

    def __init__(self, fn: Callable[[list[str]], Any], decode: Decode) -> None:
        for what, given in (("fn", fn), ("decode", decode)):
            if not callable(given):
                raise TypeError(f"TextReward: {what} must be callable, got {type(given).__name__}.")
        self.fn, self.decode = fn, decode
        self.__name__ = str(getattr(fn, "__name__", type(fn).__name__))

    def __call__(self, rows: Tensor) -> Any:
        """Return what the function says of the strings.

        :param rows: int64 ``(B, L)``.
        """
        return self.fn(decoded(self.decode, rows, self.__name__))
