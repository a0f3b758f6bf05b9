"""The lines of pages about text and images run, from top to bottom, without data."""

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parents[2] / "docs" / "howto"


@pytest.mark.parametrize("page", ["codecs", "text", "edit"])
def test_its_lines_run(page, monkeypatch, tmp_path):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(lines, f"{page}.md", "exec"), {"__name__": page})
