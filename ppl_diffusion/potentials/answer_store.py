"""Answers that outlive a run, in one SQLite file that runs may share."""

from __future__ import annotations

import platform
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ppl_diffusion.errors import PotentialError
from ppl_diffusion.potentials.causes import Failure

Answer = float | Failure
"""What a function said of a sequence."""

WAIT = 60.0
"""Seconds to wait for another run that writes."""

_FORMAT, _OURS = 1, 0x70706472  # "ppdr", in the header of the file
_AT_ONCE = 500
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    name TEXT NOT NULL, version TEXT NOT NULL, key BLOB NOT NULL,
    value REAL, cause TEXT, message TEXT,
    seconds REAL, host TEXT NOT NULL, attempts INTEGER NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (name, version, key)
) WITHOUT ROWID
"""
# Whoever comes first is right, except that a number is better than a failure.
_KEEP = """
INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET value = excluded.value, cause = excluded.cause,
    message = excluded.message, seconds = excluded.seconds, host = excluded.host,
    attempts = attempts + excluded.attempts, time = excluded.time
WHERE answers.value IS NULL
"""


@dataclass(frozen=True)
class Cost:
    """What an answer cost.

    :param seconds: None where that is not known.
    :param attempts: how often the function was asked.
    """

    seconds: float | None = None
    attempts: int = 1


class AnswerStore:
    """The answers of one function, among others in a file.

    :param path: the file, made where there is none; its folder must exist.
    :param name: of the function.
    :param version: of the function; another version knows nothing of this one.
    :raises PotentialError: if the file is damaged, is something else, or cannot be written.
    """

    def __init__(self, path: str | Path, name: str, version: str = "") -> None:
        self.path, self.name, self.version = Path(path), name, version
        with self._errors():
            self._file = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._file.close()
            raise

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """Return what is known, failures included.

        :param keys: of sequences.
        """
        found: dict[bytes, Answer] = {}
        with self._errors():
            for begin in range(0, len(keys), _AT_ONCE):
                some = keys[begin : begin + _AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = self._file.execute(
                    "SELECT key, value, cause, message FROM answers "
                    f"WHERE name = ? AND version = ? AND key IN ({marks})",
                    (self.name, self.version, *some),
                )
                found.update((row[0], _read(*row[1:])) for row in rows)
        return found

    def keep(self, answers: Mapping[bytes, Answer], cost: Cost = Cost()) -> None:
        """Write answers.

        :param answers: by key.
        :param cost: of each.
        """
        tail = (cost.seconds, platform.node(), cost.attempts, time.time())
        rows = [
            (self.name, self.version, key, *_written(answer), *tail)
            for key, answer in answers.items()
        ]
        with self._errors(), self._transaction():
            self._file.executemany(_KEEP, rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _prepare(self) -> None:
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():  # two runs may come here at once
            (owner,) = self._file.execute("PRAGMA application_id").fetchone()
            (tables,) = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if owner not in (0, _OURS) or (owner == 0 and tables):
                raise PotentialError(
                    f"the cache file {self.path} is a database of something else; "
                    "give another file."
                )
            self._check_format(owner)
            self._file.execute(_TABLE)
            self._file.execute(f"PRAGMA application_id = {_OURS}")
            self._file.execute(f"PRAGMA user_version = {_FORMAT}")
        (found,) = self._file.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def _check_format(self, owner: int) -> None:
        (version,) = self._file.execute("PRAGMA user_version").fetchone()
        if owner == _OURS and version != _FORMAT:
            raise PotentialError(
                f"the cache file {self.path} has format {version}, and this release reads "
                f"{_FORMAT}; give another file."
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._file.execute("ROLLBACK")
            raise
        self._file.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say in one sentence what SQLite says in two words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise PotentialError(
                f"the cache file {self.path} cannot be used ({error}); give a file in a folder "
                "that exists, that you may write to and that has room."
            ) from error
        except sqlite3.DatabaseError as error:
            raise PotentialError(
                f"the cache file {self.path} is damaged ({' '.join(str(error).split())}); delete "
                "or rename it, and answers are asked for again."
            ) from error


def _read(value: float | None, cause: str | None, message: str | None) -> Answer:
    return Failure(cause or "", message or "") if value is None else float(value)


def _written(answer: Answer) -> tuple[float | None, str | None, str | None]:
    return (
        (None, answer.cause, answer.message)
        if isinstance(answer, Failure)
        else (answer, None, None)
    )
