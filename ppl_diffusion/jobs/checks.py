"""How bad input is told: one error, and the checks that raise it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ppl_diffusion.errors import CapabilityError

if TYPE_CHECKING:
    import torch

MAX_COUNT = 10**7
"""Largest number of particles, runs, steps or samples that is taken seriously."""
MAX_SEED = 2**48 - 1


class InputError(ValueError):
    """An option, a file or a number cannot be used; the text is one sentence that says why."""


class JobStopped(Exception):
    """A signal ended a job; the text says what is left of it.

    :param text: one sentence.
    :param code: exit code, 128 and the number of the signal.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class DiskFull(Exception):
    """A job could not be written; the text says what was kept, and where."""


@contextmanager
def user_input() -> Iterator[None]:
    """Treat what the library raises in this block as the user's input being wrong.

    :raises InputError: in place of ``ValueError``, ``KeyError``, ``OSError``, a missing capability
        or optional library, with their text.
    """
    try:
        yield
    except InputError:
        raise
    except (CapabilityError, ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            text = f"Cannot use {str(error.filename)!r}: {error.strerror}."
            raise InputError(text) from error
        # The text of a KeyError is the repr of its key.
        quoted = isinstance(error, KeyError) and error.args
        raise InputError(str(error.args[0] if quoted else error)) from error


def at_least(what: str, value: int, low: int) -> None:
    """:raises InputError: if ``value`` is below ``low`` or larger than anything that can be run."""
    if value < low:
        raise InputError(f"{what.capitalize()} must be at least {low}, not {value}.")
    high = MAX_SEED if what == "seed" else MAX_COUNT
    if value > high:
        raise InputError(f"{what.capitalize()} must be at most {high}, not {value}.")


def one_of(what: str, value: str, known: Iterable[str]) -> None:
    """:raises InputError: if ``value`` is not a known word."""
    words = tuple(known)
    if value not in words:
        raise InputError(f"There is no {what} called {value!r}: choose one of {', '.join(words)}.")


def finite(what: str, value: float | None) -> None:
    """:raises InputError: if ``value`` is a number that is not finite."""
    if value is not None and not math.isfinite(value):
        raise InputError(f"{what[0].upper()}{what[1:]} must be a finite number, not {value}.")


def positive(what: str, value: float | None) -> None:
    """:raises InputError: if ``value`` is a number that is not finite and above 0."""
    finite(what, value)
    if value is not None and value <= 0:
        raise InputError(f"{what[0].upper()}{what[1:]} must be above 0, not {value}.")


def usable_device(name: str) -> "torch.device":
    """Return a device on which tensors can be made.

    :raises InputError: if there is none of that name here.
    """
    import torch  # the command line asks for help without it

    try:
        return torch.zeros(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        (why, *_) = str(error).splitlines()
        raise InputError(
            f"The device {name!r} cannot be used here ({why}): choose another --device."
        ) from error
