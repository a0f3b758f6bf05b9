"""The page of checks names every check, and only tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "checks.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:exact|unit)/[\w/]+\.py)::(\w+)`", PAGE)))
SECTIONS = {"M": 18, "T3.": 8, "T4.": 8, "T5.": 8, "T6.": 8, "T7.": 7}


@cache
def functions_in(file):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED, ids="::".join)
def test_named_tests_exist(file, test):
    assert test.startswith("test_")
    assert test in functions_in(file)


def test_every_check_has_a_row_with_a_test_and_a_rate():
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            rows[cells[0]] = cells
    expected = [f"{prefix}{k + 1}" for prefix, count in SECTIONS.items() for k in range(count)]
    assert [name for name in rows if name in expected] == expected
    assert all("::test_" in rows[name][2] and rows[name][3] for name in expected)


def test_no_reference_is_misspelt():
    """Whatever looks like a test is one of those above."""
    assert PAGE.count(".py::") == len(re.findall(r"`(?:exact|unit)/[\w/]+\.py::\w+`", PAGE))
