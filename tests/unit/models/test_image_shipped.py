"""Shipped codecs, classifiers and priors of images: small, as able as their cards say."""

import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.models.cards import WEIGHTS
from ppl_diffusion.models.datasets import load_sequences
from ppl_diffusion.models.evaluate import evaluate
from ppl_diffusion.models.image_data import load_images
from ppl_diffusion.models.image_evaluate import evaluate_images
from ppl_diffusion.models.image_recipes import IMAGE_RECIPES
from ppl_diffusion.models.recipes import find_recipe

DIGITS = ("digits", "digits-uniform")


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture(scope="module")
def sequences():
    return load_sequences("digits")


def shipped():
    return [*models.codecs(), *models.list_classifiers()]


def test_every_network_has_a_recipe():
    assert set(shipped()) <= set(IMAGE_RECIPES)


@pytest.mark.parametrize("name", shipped())
def test_both_cards_agree(name):
    card = models.read_card(name)
    text = (WEIGHTS / name / "card.md").read_text(encoding="utf-8")
    metrics = card["metrics"]
    assert "Apache-2.0" in card["licence"]
    for key in ("data", "licence", "training", "evaluation"):
        assert card[key] in text
    assert f"{metrics['score']:.4f} ± {metrics['score_error']:.4f}" in text
    assert str(metrics["images"]) in text


@pytest.mark.parametrize("name", shipped())
def test_networks_are_small(name):
    limit = 1_000_000 if "classifier" in name else 1_700_000
    assert sum(path.stat().st_size for path in (WEIGHTS / name).iterdir()) < limit


@pytest.mark.parametrize("name", ["digits-codec", "digits-classifier"])
def test_networks_reach_the_score_of_their_cards(name, digits):
    load = models.load_codec if "codec" in name else models.load_classifier
    result, metrics = (
        evaluate_images(load(name), digits, IMAGE_RECIPES[name]),
        models.read_card(name)["metrics"],
    )
    assert result.images == metrics["images"] == 297
    assert result.score == pytest.approx(metrics["score"], abs=0.01)
    if name == "digits-codec":
        assert result.score > 25.0
        assert result.codes_used == metrics["codes_used"]
        assert result.entropy == pytest.approx(metrics["entropy"], abs=0.01)
    else:
        assert result.score > 0.95


@pytest.mark.parametrize("name", DIGITS)
def test_priors_reach_the_bounds_of_their_cards(name, sequences):
    """The same rows: what differs is the noise of the times, of 4 s.e. (6e-5)."""
    recipe, metrics = find_recipe(name), models.read_card(name)["metrics"]
    result = evaluate(models.load(name), sequences, recipe, times=8, seed=1)
    noise = (result.noise_error**2 + metrics["noise_error"] ** 2) ** 0.5
    assert result.bound == pytest.approx(metrics["bound"], abs=4 * noise)
    assert result.given_label == pytest.approx(metrics["given_label"], abs=4 * noise)
    assert result.bound < result.markov


@pytest.mark.parametrize("name", DIGITS)
def test_labels_give_laws_of_their_own(name, sequences):
    """The bound of the right label is lower by many bits, so that one of ten can be told."""
    prior, labels = models.load(name), sequences.labels[2][:60]
    bounds = torch.stack(
        [
            prior.labelled((labels + shift) % 10)
            .bound_terms(
                sequences.test[:60], num_times=8, generator=torch.Generator().manual_seed(0)
            )
            .mean(0)
            for shift in range(10)
        ]
    )
    assert (bounds.argmin(0) == 0).float().mean() > 0.8  # chance: .1


@pytest.mark.parametrize("name", DIGITS)
def test_samples_look_like_their_class(name):
    prior, codec, classifier = (
        models.load(name),
        models.load_codec("digits-codec"),
        models.load_classifier("digits-classifier"),
    )
    labels = torch.arange(10)
    chain = prior.labelled(labels).chain(num_steps=16)
    drawn = chain.x0(chain.sample((10,), generator=torch.Generator().manual_seed(0)))
    found = classifier(codec.decode(drawn)).argmax(-1)
    assert (found == labels).float().mean() > 0.6  # chance: .1
    free = prior.chain(num_steps=16)
    assert free.x0(free.sample((3,))).shape == (3, 16)


def test_priors_and_codecs_fit_together():
    for name in DIGITS:
        card = models.read_card(name)
        codec = models.load_codec(card["codec"])
        prior = models.load(name)
        assert (codec.vocab_size, codec.length) == (len(prior.vocabulary), prior.length)
