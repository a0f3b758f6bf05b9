"""Programs that read sequences and answer numbers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from ppl_diffusion.potentials.answers import WrongAnswer
from ppl_diffusion.potentials.causes import GaveUp, ending
from ppl_diffusion.potentials.crew import check_timeout
from ppl_diffusion.potentials.strings import Decode, decoded

VERSION = 1
_SHOWN = 200


class CommandError(RuntimeError):
    """A program failed, or its answer cannot be read."""


class CommandReward:
    """A program that reads sequences, one a line, and answers JSON on standard output.

    ``{"version": 1, "payload": {"score": [1.5, -0.2]}}`` holds a number for each line, under one
    name or several. The program is started for each call, without a shell, in a process group of
    its own, which is killed whole at the timeout.

    :param command: the program and its arguments, or a line to be split like those of a shell.
    :param decode: makes strings of tokens.
    :param property: which name is read; None where there is one only.
    :param timeout: seconds that a call may take, None for ever.
    :raises ValueError: if the command is empty or cannot be split, or the timeout is none.

    Example::

        dock = CommandReward("python dock.py --fast", prior.decode, property="score", timeout=600)
        Reward(dock, 0.4, maximise=False, on_error="reject")
    """

    def __init__(
        self,
        command: str | Sequence[str],
        decode: Decode,
        property: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.command = _split(command)
        self.decode, self.property, self.timeout = decode, property, timeout
        self.__name__ = property or os.path.basename(self.command[0])
        check_timeout(self.__name__, timeout)

    def __call__(self, rows: Tensor) -> list[Any]:
        """Return the program's numbers.

        :param rows: int64 ``(B, L)``.
        :raises CommandError: if it fails, or its answer cannot be read.
        :raises GaveUp: if it takes too long.
        """
        lines = decoded(self.decode, rows, self.__name__)
        if any("\n" in line or "\r" in line for line in lines):
            raise ValueError(f"{self.__name__}: a sequence holds a line break; encode it.")
        return self._read(self._run("".join(f"{line}\n" for line in lines)), len(lines))

    def _run(self, text: str) -> str:
        try:
            program = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise CommandError(
                f"{self.command[0]} cannot be started ({error.strerror}); give a program that "
                "exists and may be executed"
            ) from error
        with program:
            try:
                out, err = program.communicate(text, self.timeout)
            except subprocess.TimeoutExpired:
                _kill(program)
                raise GaveUp(f"no answer within {self.timeout:g} s") from None
            except BaseException:  # Ctrl-C: it does not see that itself
                _kill(program)
                raise
        if program.returncode:
            raise CommandError(f"it ended with {ending(program.returncode)}{_last_line(err)}")
        return str(out)

    def _read(self, out: str, count: int) -> list[Any]:
        try:
            answer = json.loads(out)
        except ValueError as error:
            raise CommandError(f"it wrote no JSON, but {_short(out)}") from error
        version = answer.get("version") if isinstance(answer, dict) else None
        payload = answer.get("payload") if isinstance(answer, dict) else None
        if version != VERSION or not isinstance(payload, dict):
            raise CommandError(
                f'it wrote JSON without "version": {VERSION} and a "payload", but {_short(out)}'
            )
        name = self._name(payload)
        values = payload[name]
        if not isinstance(values, list) or len(values) != count:
            found = len(values) if isinstance(values, list) else "no list of"
            raise WrongAnswer(f"it wrote {found} values of {name!r} for {count} sequences")
        return values

    def _name(self, payload: dict[str, Any]) -> str:
        names = ", ".join(map(repr, payload)) or "nothing"
        if self.property is None and len(payload) != 1:
            raise CommandError(f"its payload holds {names}; say with property= which is meant")
        name = self.property or next(iter(payload))
        if name not in payload:
            raise CommandError(f"its payload holds {names} and not {name!r}")
        return name


def _split(command: str | Sequence[str]) -> list[str]:
    try:
        words = shlex.split(command) if isinstance(command, str) else [*command]
    except ValueError as error:
        raise ValueError(
            f"the command {command!r} cannot be split into words ({error}); mend its quotes."
        ) from error
    if not words:
        raise ValueError("the command is empty; give a program and its arguments.")
    return words


def _kill(program: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(program.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1][:_SHOWN]}" if lines else ""


def _short(text: str) -> str:
    found = " ".join(text.split())
    return "nothing" if not found else repr(found if len(found) <= 60 else f"{found[:60]}...")
