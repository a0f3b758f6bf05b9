"""The shipped priors load, are distributions, generate sequences, and their cards are honest."""

import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.models.cards import WEIGHTS

NAMES = ("human-promoter", "yeast-promoter", "yeast-promoter-uniform")


def test_names_and_descriptions():
    assert set(NAMES) <= set(models.names())
    entries = {entry["name"]: entry for entry in models.available()}
    assert entries["yeast-promoter"]["length"] == 80
    assert entries["human-promoter"]["length"] == 70
    assert entries["yeast-promoter-uniform"]["family"] == "uniform"


def test_they_are_small():
    size = sum(p.stat().st_size for name in NAMES for p in (WEIGHTS / name).iterdir())
    assert size < 10_000_000


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_normalises_and_generates(name):
    prior = models.load(name)
    assert prior.name == name
    states = torch.randint(0, prior.process.num_states, (2, prior.length))
    total = prior.denoiser(states, 0.5).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, prior.length))
    chain = prior.chain(num_steps=8)
    texts = prior.decode(chain.x0(chain.sample((2,))))
    assert all(len(text) == prior.length and set(text) <= set("ACGT") for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_masked_priors_are_time_free(name):
    prior = models.load(name)
    assert prior.denoiser.time_free == (prior.family == "masked")
    assert prior.denoiser.kind == "cavity"


@pytest.mark.parametrize("name", NAMES)
def test_it_prefers_its_kind_to_random_letters(name):
    """Random letters cost two bits a base under any law; the prior's own draws must cost less.

    The difference is above ten standard errors, so that false alarms do not happen.
    """
    prior = models.load(name)
    chain = prior.chain(num_steps=32)
    own = chain.x0(chain.sample((48,)))
    random = torch.randint(0, 4, own.shape)
    bounds = [prior.bound_terms(rows, num_times=8).mean(0) for rows in (own, random)]
    assert float(bounds[0].mean()) < float(bounds[1].mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_it_must(name):
    card = models.read_card(name)
    metrics = card["metrics"]
    assert "Apache-2.0" in card["licence"]
    assert name in card["training"]
    assert name in card["evaluation"]
    assert metrics["times"] >= 64
    assert metrics["gain"] == pytest.approx(metrics["markov"] - metrics["bound"], abs=2e-4)
    assert 1.0 < metrics["bound"] < 2.0


@pytest.mark.parametrize("name", NAMES)
def test_both_cards_agree(name):
    card = models.read_card(name)
    text = (WEIGHTS / name / "card.md").read_text(encoding="utf-8")
    for key in ("data", "licence", "training", "evaluation"):
        assert card[key] in text
    for key in ("bound", "bound_error", "markov", "gain", "gain_error"):
        assert f"{card['metrics'][key]:.4f}" in text
