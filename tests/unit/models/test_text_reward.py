"""Classifiers of sentences: data read, training, files, and the two that are shipped."""

import csv
import gzip
import json

import pytest
import torch
from typer.testing import CliRunner

from ppl_diffusion import models
from ppl_diffusion.models.cards import CLASSIFIER_FILE, WEIGHTS
from ppl_diffusion.models.reviews import FILE, LENGTH, LETTERS, read_reviews, sequences, spell
from ppl_diffusion.models.text_reward import TextClassifier, TextConfig, load_text_classifier
from ppl_diffusion.models.text_training import HALVES, app, fit, metrics, rows_of_half

SMALL = TextConfig(dim=8, channels=8, depth=1, dropout=0.0)
PRAISE = ["the food was great !", "i love this place .", "friendly staff and delicious meals ."]
COMPLAINT = ["the food was terrible .", "worst service ever .", "rude staff and cold fries ."]


@pytest.fixture
def folder(tmp_path):
    """Return a data folder whose sentences praise if they say so."""
    words = ["food", "staff", "place", "table", "price", "bread", "wine", "soup"]
    rows = [
        {"text": f"the {first} and {second} {say}", "label": label, "split": part}
        for label, say in ((1, "good !"), (0, "bad ."))
        for first in words
        for second in words
        for part in ("train", "valid", "test")
    ]
    rows += [
        {"text": "_num_ stars for _num_ of us .", "label": 1, "split": "train"},
        {"text": "x" * (LENGTH + 1), "label": 0, "split": "train"},
        {"text": "a ~ b", "label": 0, "split": "test"},
    ]
    path = tmp_path / FILE
    path.parent.mkdir()
    with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["text", "label", "split"])
        table.writeheader()
        table.writerows(rows)
    return tmp_path


def test_sentences_are_read_and_what_does_not_fit_is_counted(folder):
    reviews = read_reviews(folder)
    assert reviews.left_out == 2
    assert reviews.tokens.shape == (3 * 128 + 1, LENGTH)
    assert torch.equal(reviews.tokens[-1], spell("0 stars for 0 of us ."))
    data = sequences(folder)
    assert (len(data.train), len(data.valid), len(data.test)) == (129, 128, 128)
    assert "2 of 387 are longer or hold rare characters" in data.source


def test_the_halves_share_no_sentence(folder):
    reviews = read_reviews(folder)
    (first, _), (second, _) = (rows_of_half(reviews, name) for name in HALVES)
    assert len(first) + len(second) == 129
    assert len(torch.cat([first, second]).unique(dim=0)) == 129
    with pytest.raises(ValueError, match="no recipe 'x': give --name yelp-reward or --name yelp-j"):
        rows_of_half(reviews, "x")


def test_training_learns_and_is_reproducible(folder):
    reviews = read_reviews(folder)
    rows = rows_of_half(reviews, HALVES[0])
    one, same = (fit(*rows, SMALL, epochs=60, seed=0) for _ in range(2))
    assert metrics(one, reviews)["accuracy"] > 0.9
    assert torch.equal(one(reviews.tokens), same(reviews.tokens))


def test_the_command_writes_a_classifier_with_a_card(folder, tmp_path):
    out = tmp_path / "out"
    line = ["train", "--name", "yelp-judge", "--data", str(folder), "--out", str(out)]
    result = CliRunner().invoke(app, [*line, "--epochs", "1"])
    assert result.exit_code == 0, result.output
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    assert "second of two halves" in card["data"]
    assert card["metrics"]["sentences"] == 128
    assert load_text_classifier(out).config.name == "yelp-judge"
    line[2] = "other"
    assert CliRunner().invoke(app, line).exit_code == 2


def test_a_reward_is_the_log_probability_of_its_label():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = TextClassifier(SMALL).requires_grad_(False).eval()
    rows = torch.stack([spell(text) for text in PRAISE])
    for label in (0, 1):
        found = classifier.reward(label, temperature=0.5)(rows)
        wanted = 2 * classifier.probability(rows, label).double().log()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert classifier.reward().codebook.shape == (len(LETTERS), SMALL.dim)


def test_damaged_folders_are_refused(tmp_path):
    TextClassifier(SMALL).save(tmp_path)
    assert load_text_classifier(tmp_path).config == SMALL
    (tmp_path / CLASSIFIER_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no classifier of text that can be read"):
        load_text_classifier(tmp_path)
    with pytest.raises(ValueError, match="There is no classifier of text 'x'"):
        load_text_classifier("x")


@pytest.mark.parametrize("name", HALVES)
def test_shipped_classifiers_tell_praise_from_complaint(name):
    classifier = load_text_classifier(name)
    praise, complaint = (
        classifier.probability(torch.stack([spell(text) for text in texts]))
        for texts in (PRAISE, COMPLAINT)
    )
    assert float(praise.min()) > 0.5 > float(complaint.max())


@pytest.mark.parametrize("name", HALVES)
def test_their_cards_are_honest(name):
    card = models.read_card(name)
    text = (WEIGHTS / name / "card.md").read_text(encoding="utf-8")
    for key in ("data", "licence", "training", "evaluation", "limits"):
        assert card[key] in text
    assert f"{card['metrics']['accuracy']:.4f}" in text
    assert card["metrics"]["accuracy"] > 0.85
    assert "not stated" in card["licence"]
    assert name in models.list_text_classifiers()
    assert sum(path.stat().st_size for path in (WEIGHTS / name).iterdir()) < 500_000
