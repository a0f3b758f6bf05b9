"""What a user's function says about sequences: numbers, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

_TEXT = (str, bytes, bytearray)
_TIMES = (np.datetime64, np.timedelta64)
_SHOWN = 40


class WrongAnswer(ValueError):
    """A function did not return one value per sequence."""


def read_answer(answer: Any, count: int) -> list[float | str]:
    """Return one number per sequence, or the reason why there is none.

    Tensors, arrays, series, lists, tuples and generators are read; a value in them that is no
    number (None, text, an object) spoils its own sequence only.

    :param answer: what the function returned for ``count`` sequences.
    :raises WrongAnswer: if it does not hold one value per sequence.
    """
    answer = answer.detach().cpu() if isinstance(answer, Tensor) else answer
    shape = getattr(answer, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        raise WrongAnswer(f"it returned shape {tuple(shape)} for {_sequences(count)}")
    unordered = isinstance(answer, (*_TEXT, Mapping, Set))
    times = getattr(getattr(answer, "dtype", None), "kind", "") in ("M", "m")
    if unordered or times or not isinstance(answer, Iterable):
        raise WrongAnswer(f"{_say(answer)} for {_sequences(count)}")
    # One more than there should be: a generator may never end.
    values = answer.tolist() if hasattr(answer, "tolist") else list(islice(answer, count + 1))
    if len(values) != count:
        found = f"more than {count}" if len(values) > count else len(values)
        raise WrongAnswer(f"it returned {found} values for {_sequences(count)}")
    return [_read(value) for value in values]


def _read(value: Any) -> float | str:
    value = value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value
    number = hasattr(type(value), "__float__") and not getattr(value, "ndim", 0)
    if isinstance(value, (*_TEXT, *_TIMES)) or not number:
        return _say(value)
    try:
        return float(value)
    except Exception as error:
        return f"{_say(value)}, which is no number: {error}"


def _say(value: Any) -> str:
    if value is None:
        return "it returned None"
    if isinstance(value, str):
        text = repr(value)
        return f"it returned the text {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
    return f"it returned an object of type {type(value).__name__}"


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' * (count != 1)}"
