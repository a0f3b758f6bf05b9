"""Modules of ``benchmarks``, which is not installed."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])


def module(name):
    """Import one; those that it imports later are found beside it."""
    with pytest.MonkeyPatch.context() as patch:
        if ROOT not in sys.path:
            patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.{name}")
