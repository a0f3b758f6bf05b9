"""The shipped prior over text: it is small, it generates, and its card is honest."""

import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.models.cards import WEIGHTS

NAME = "tinyshakespeare-uniform"


@pytest.fixture(scope="module")
def prior():
    return models.load(NAME)


def test_its_letters_are_the_characters_of_a_text(prior):
    assert (prior.length, prior.family) == (128, "uniform")
    assert len(prior.vocabulary) == 65
    assert {"\n", " ", ",", "a", "Z"} <= set(prior.vocabulary)
    assert prior.denoiser.kind == "cavity"
    assert not prior.denoiser.time_free


def test_it_is_small():
    assert sum(path.stat().st_size for path in (WEIGHTS / NAME).iterdir()) < 8_000_000


def test_it_normalises_and_generates(prior):
    states = torch.randint(65, (2, prior.length))
    total = prior.denoiser(states, 0.5).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, prior.length))
    chain = prior.chain(num_steps=4)
    texts = prior.decode(chain.x0(chain.sample((2,))))
    assert all(set(text) <= set(prior.vocabulary) for text in texts)
    assert torch.equal(prior.encode(texts), prior.encode(prior.decode(prior.encode(texts))))


def test_it_prefers_english_to_its_letters_in_another_order(prior):
    """Same characters, shuffled. The bounds are 2.1 and 6.7 bits: no false alarms."""
    lines = "The king is come to speak with thee, my lord,\nAnd all the men of England with him.\n"
    english = prior.encode((lines + lines)[: prior.length])
    shuffled = english[torch.randperm(prior.length)]
    generator = torch.Generator().manual_seed(0)
    bounds = prior.bound_terms(
        torch.stack([english, shuffled]), num_times=16, generator=generator
    ).mean(0)
    assert float(bounds[1]) > 2.0 * float(bounds[0])


def test_the_card_says_what_it_must():
    card, text = models.read_card(NAME), (WEIGHTS / NAME / "card.md").read_text(encoding="utf-8")
    metrics = card["metrics"]
    assert "Apache-2.0" in card["licence"]
    for key in ("data", "licence", "training", "evaluation"):
        assert card[key] in text
    for key in ("bound", "bound_error", "markov", "gain", "gain_error"):
        assert f"{metrics[key]:.4f}" in text
    assert "bits per character" in text
    assert metrics["times"] >= 64
    assert metrics["gain"] == pytest.approx(metrics["markov"] - metrics["bound"], abs=2e-4)
    # A uniform guess costs log2(65) = 6.02 bits, the frequencies of the letters 4.8.
    assert 1.0 < metrics["bound"] < 3.0
