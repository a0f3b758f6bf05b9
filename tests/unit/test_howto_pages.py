"""The lines of a page that ask the hub for models run, with tiny random ones in their place."""

import re
from pathlib import Path

import pytest
import torch
from pages import HUB
from tiny_bert import SPECIAL, save_tiny_bert, tiny_bert

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "text.md"
WORDS = [*SPECIAL, "the", "food", "was", "good", "bad", "really", "."]
MODELS = {
    '"bert-base-uncased"': "BertForMaskedLM",
    '"textattack/bert-base-uncased-SST-2"': "BertForSequenceClassification",
}


def test_the_lines_about_models_of_other_people_run(tmp_path, capsys):
    """Models of the hub are tiny random ones here."""
    transformers = pytest.importorskip("transformers")
    from ppl_diffusion.inference import SMC

    text = HUB.search(PAGE.read_text(encoding="utf-8")).group()
    for name, kind in MODELS.items():
        model = tiny_bert(transformers, kind, vocab_size=len(WORDS))
        folder = save_tiny_bert(transformers, tmp_path / kind, model, WORDS)
        assert name in text
        text = text.replace(name, repr(str(folder)))
    lines = "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(lines, PAGE.name, "exec"), {"__name__": "text", "SMC": SMC})
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the ")]
    assert len(said) == 8
    assert all(line.startswith("the food was ") and line.endswith(" .") for line in said)


def test_the_run_of_the_page_about_jobs_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.with_name("batch.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(lines, "batch.md", "exec"), {"__name__": "batch"})
    assert (tmp_path / "kept" / "particles" / "particles.json").is_file()
