"""What a verdict is: a sentence about what is wrong with a result, with what it was judged by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Level = Literal["broken", "weak", "note"]
LEVELS: tuple[Level, ...] = ("broken", "weak", "note")
"""Do not use it; it says less than it seems to; mind what it is."""
SAID: dict[Level, str] = {"broken": "Do not use this", "weak": "Warning", "note": "Note"}
"""What stands before a verdict where it is printed."""


class Verdict(str):
    """A sentence about what is wrong, with what it was judged by.

    :param kind: which rule found it, such as ``"apart"``.
    :param level: ``"broken"`` (do not use the result), ``"weak"`` or ``"note"``.
    :param where: what it is about: a run, a latent, a reward.
    :param value: what was found.
    :param limit: what it was held against.
    """

    kind: str
    level: Level
    where: str
    value: float
    limit: float

    def __new__(
        cls, text: str, *, kind: str, level: Level, where: str, value: float, limit: float
    ) -> Verdict:
        self = super().__new__(cls, text)
        self.kind, self.level, self.where = kind, level, where
        self.value, self.limit = float(value), float(limit)
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str(self),), dict(self.__dict__)


def by_level(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return verdicts, the worst first, those of one level as they come."""
    return sorted(verdicts, key=lambda verdict: LEVELS.index(verdict.level))
