"""Checks of tensors whose answers are read back together, when somebody has to read anyway.

Asking a tensor a question waits for the device that computes it. Inside of a step of a sampler
nobody waits: checks are noted, and whoever runs the steps reads them beside what decides the next
one. Outside they raise where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Complaint = Callable[[], Exception]


class Deferred:
    """Checks that were noted and not read yet."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Complaint]] = []

    def note(self, bad: Tensor, complaint: Complaint) -> None:
        """Note a check.

        :param bad: bool scalar.
        :param complaint: makes the error.
        """
        self._noted.append((bad, complaint))

    def read(self, *questions: Tensor) -> list[bool]:
        """Read all checks together with other questions, and raise the first complaint.

        :param questions: bool scalars.
        :returns: their answers.
        """
        noted, self._noted = self._noted, []
        asked = [*questions, *(bad for bad, _ in noted)]
        if not asked:
            return []
        device = asked[0].device
        answers: list[bool] = torch.stack([question.to(device) for question in asked]).tolist()
        for answer, (_, complaint) in zip(answers[len(questions) :], noted, strict=True):
            if answer:
                raise complaint()
        return answers[: len(questions)]


_COLLECTING: ContextVar[Deferred | None] = ContextVar("collecting", default=None)


@contextmanager
def deferred_checks() -> Iterator[Deferred]:
    """Collect the checks inside; those that nobody has read are read at the end."""
    deferred = Deferred()
    token = _COLLECTING.set(deferred)
    try:
        yield deferred
    except Exception as error:
        # What was noted first may be why something else failed since.
        try:
            deferred.read()
        except Exception as cause:
            raise cause from error
        raise
    finally:
        _COLLECTING.reset(token)
    deferred.read()


def refuse_if(bad: Tensor, complaint: Complaint) -> None:
    """Raise an error where a tensor says so: now, or when collected checks are read.

    :param bad: bool scalar.
    :param complaint: makes the error.
    """
    deferred = _COLLECTING.get()
    if deferred is not None:
        deferred.note(bad, complaint)
    elif bool(bad):
        raise complaint()
