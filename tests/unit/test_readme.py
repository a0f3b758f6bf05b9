"""The README and the pages: Python runs, commands are understood, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from pages import HUB

from ppl_diffusion import cli
from ppl_diffusion.commands import actions, designing, listing, restoring, training

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXTEND = [page for page in PAGES if page.parent.name == "extend"]
README, METHODS = ROOT / "README.md", ROOT / "docs" / "concepts" / "methods.md"
LONGEST_README = 900


def named(pages):
    return {"argvalues": pages, "ids": [str(page.relative_to(ROOT)) for page in pages]}


def blocks(page, language="python"):
    text = HUB.sub("", page.read_text(encoding="utf-8"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(page):
    """The commands of a page, word by word, continued lines joined and comments left out."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["ppl-diffusion"]]


def run_blocks(page):
    """Run the Python of a page and return its names."""
    names = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", **named([p for p in PAGES if blocks(p) and p not in (*EXTEND, README, METHODS)])
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    run_blocks(page)


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(README)
    assert torch.isfinite(names["posterior"].log_evidence).all()


def test_the_methods_of_their_page_have_one_law():
    names = run_blocks(METHODS)
    assert names["twisted"].target == names["steered"].target == names["guided"].target
    assert not names["published"].run(seed=0).exact


def test_what_the_pages_add_keeps_its_contracts(tmp_path):
    """Each page is a test file, run as its reader would, whose registry is not ours."""
    for page in EXTEND:
        (tmp_path / f"test_{page.stem}.py").write_text("\n\n".join(blocks(page)), encoding="utf-8")
    words = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run([*words, "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    for contract in ("KernelContract", "PotentialContract", "ModelContract"):
        assert any(f"({contract}):" in block for page in EXTEND for block in blocks(page))


@pytest.mark.parametrize("page", **named([page for page in PAGES if commands(page)]))
def test_the_commands_of_a_page_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jaspar.meme").touch()  # that a motif's file is there is looked at early
    asked = []
    bodies = ("draw_samples", "diagnose_run")
    for body in (*bodies, "compare_runs"):
        monkeypatch.setattr(actions, body, lambda *given, **options: asked.append(given))
    monkeypatch.setattr(listing, "list_models", lambda: asked.append(()))
    monkeypatch.setattr(designing, "run_design", lambda *given, **options: asked.append(given))
    for body in ("train_prior", "train_file"):
        monkeypatch.setattr(training, body, lambda *given, **options: asked.append(given))
    monkeypatch.setattr(restoring, "run_restore", lambda *given, **options: asked.append(given))
    # Modules of a reader's own are not here.
    known = [words for words in commands(page) if "--import" not in words]
    for words in known:
        assert cli.run(words) == 0, words
    assert len(asked) == len(known)


@pytest.mark.parametrize("page", **named(PAGES))
def test_links_of_a_page_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [p.relative_to(ROOT / "docs").with_suffix("") for p in PAGES if p != README]
    rooms = (ROOT / "docs" / "reference" / "index.md").read_text()
    for page in pages:
        text, name = (rooms, page.name) if page.parent.name == "reference" else (index, str(page))
        assert page.name == "index" or f"\n{name}\n" in text, page


def test_the_readme_is_read_in_five_minutes():
    assert len(README.read_text(encoding="utf-8").split()) <= LONGEST_README


def test_the_readme_names_the_test_command():
    assert "make test" in README.read_text()
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", ["demo", "figures", "test", "lint", "docs", "bench", "slow"])
def test_the_makefile_has_every_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
