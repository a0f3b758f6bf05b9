"""Every failure a user can cause ends as one sentence on standard error."""

import os
import sys
from collections.abc import Callable

import typer

from ppl_diffusion.errors import ParticleCollapse, PotentialError
from ppl_diffusion.jobs.checks import DiskFull, InputError, JobStopped

OK = 0
USAGE = 2
FAILED = 1
STOPPED = 130
DEBUG = "PPL_DIFFUSION_DEBUG"


class NoAnswer(Exception):
    """A run ended without an answer through no fault of the command line; the text says why."""


class Stopped(Exception):
    """A command was stopped by Ctrl-C; the text says what is left of it.

    The command line's own library swallows a ``KeyboardInterrupt`` together with its text.
    """


def exit_code(command: Callable[[], object]) -> int:
    """Run a command and turn what it raises into a sentence and an exit code.

    Bad input gives 2, a run that could not give an answer gives 1, Ctrl-C gives 130. Errors that
    are no user's fault pass through with their traceback, and so does everything when the
    environment variable ``PPL_DIFFUSION_DEBUG`` is set.
    """
    if os.environ.get(DEBUG):
        return _code(command())
    try:
        code = _code(command())
        # What the command line's library makes of a KeyboardInterrupt.
        return complain("Stopped: no run folder was written.", code) if code == STOPPED else code
    except BrokenPipeError:
        # The reader (head, less) has gone; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (typer.TyperException, InputError, PotentialError) as error:
        return complain(error, USAGE)
    except OSError as error:
        return complain(f"{error.strerror or error}: {error.filename}", USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return complain("Stopped: no run folder was written.", STOPPED)
    except Stopped as error:
        return complain(error, STOPPED)
    except JobStopped as error:
        return complain(error, error.code)
    except (ParticleCollapse, NoAnswer, DiskFull) as error:
        return complain(error, FAILED)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        return complain("There is not enough memory for so many particles: ask for fewer.", FAILED)


def complain(error: object, code: int) -> int:
    """Print an exception or a text as one sentence on standard error, and return the code."""
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    print(f"ppl-diffusion: {' '.join(text.split())}", file=sys.stderr)
    return code


def note(text: str, *, quiet: bool) -> None:
    """Print a sentence that is no complaint on standard error."""
    if not quiet:
        complain(text, OK)


def _code(result: object) -> int:
    return result if isinstance(result, int) else 0
