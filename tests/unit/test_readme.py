"""The Python of the README and of the page on programs runs, block after block."""

import re
from pathlib import Path

import matplotlib
import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_blocks(page):
    """Run the Python of a page and return its names."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = run_blocks("README.md")
    assert torch.isfinite(names["posterior"].log_evidence).all()


def test_the_page_on_programs_runs():
    names = run_blocks("docs/programs.md")
    assert not names["published"].exact
    assert names["twisted"].target == names["steered"].target == names["guided"].target


def test_the_readme_names_the_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "bench", "slow"])
def test_the_makefile_has_every_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
