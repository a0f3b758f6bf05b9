"""The lines of pages about text and images run, from top to bottom, without data."""

import re
from pathlib import Path

import pytest
import torch
from tiny_bert import SPECIAL, save_tiny_bert, tiny_bert

PAGES = Path(__file__).parents[2] / "docs" / "howto"
OTHERS = re.compile(r"## Models of other people\n.*?(?=\n## )", flags=re.DOTALL)
WORDS = [*SPECIAL, "the", "food", "was", "good", "bad", "really", "."]
HUB = {
    '"bert-base-uncased"': "BertForMaskedLM",
    '"textattack/bert-base-uncased-SST-2"': "BertForSequenceClassification",
}


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("PPL_DIFFUSION_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def text_of(page):
    return (PAGES / f"{page}.md").read_text(encoding="utf-8")


def run_lines(text, name, **known):
    lines = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(lines, f"{name}.md", "exec"), known | {"__name__": name})


def test_the_lines_about_models_of_other_people_run(tmp_path, capsys):
    """Models of the hub are tiny random ones here."""
    transformers = pytest.importorskip("transformers")
    from ppl_diffusion.inference import SMC

    text = OTHERS.search(text_of("text")).group()
    for name, kind in HUB.items():
        model = tiny_bert(transformers, kind, vocab_size=len(WORDS))
        folder = save_tiny_bert(transformers, tmp_path / kind, model, WORDS)
        assert name in text
        text = text.replace(name, repr(str(folder)))
    run_lines(text, "text", SMC=SMC)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the ")]
    assert len(said) == 8
    assert all(line.startswith("the food was ") and line.endswith(" .") for line in said)
