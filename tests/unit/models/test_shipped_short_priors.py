"""Shipped priors over names and molecules: masked, with a latent, with learned noise."""

import pytest
import torch

from ppl_diffusion import models
from ppl_diffusion.models.cards import WEIGHTS
from ppl_diffusion.models.datasets import PADDING, unpad
from ppl_diffusion.models.evaluate import describe_path
from ppl_diffusion.models.latent import LatentDiffusion

NAMES = (
    "masked-names",
    "masked-qm9",
    "latent-names",
    "latent-qm9",
    "latent-names-co",
    "latent-qm9-co",
    "learned-names-2",
    "learned-names-4",
    "learned-names-10",
)
LATENT = [name for name in NAMES if name.startswith("latent")]
TEXTS = {"names": ["olivia", "jameson", "annabel"], "qm9": ["CC1CC1O", "OC1CC2OC12", "CCC(C)C#N"]}


def known(prior):
    """Return sequences of the kind that a prior was trained on."""
    texts = TEXTS["qm9" if "qm9" in prior.name else "names"]
    return prior.encode([text.ljust(prior.length, PADDING) for text in texts])


@pytest.fixture(scope="module", params=NAMES)
def prior(request):
    return models.load(request.param)


def test_it_is_small(prior):
    assert sum(path.stat().st_size for path in (WEIGHTS / prior.name).iterdir()) < 2_000_000


def test_it_generates(prior):
    chain = prior.chain(num_steps=prior.fixed_steps or 8)
    source = torch.Generator().manual_seed(0)
    texts = prior.decode(chain.x0(chain.sample((16,), generator=source)))
    filled = [text for text in texts if PADDING in unpad(text)]
    assert len(filled) < 8, texts  # the filling is at the end


def test_it_prefers_its_kind_to_its_letters_in_another_order(prior):
    """The bounds of the two are tens of nats apart: no false alarms."""
    source = torch.Generator().manual_seed(0)
    rows = known(prior)
    shuffled = rows[:, torch.randperm(prior.length, generator=source)]
    bounds = [prior.bound_terms(r, num_times=32, generator=source).mean() for r in (rows, shuffled)]
    assert float(bounds[1]) > float(bounds[0]) + 10.0


def test_both_cards_agree(prior):
    card = models.read_card(prior.name)
    text = (WEIGHTS / prior.name / "card.md").read_text(encoding="utf-8")
    metrics = card["metrics"]
    assert "Apache-2.0" in card["licence"]
    for key in ("data", "licence", "training", "evaluation"):
        assert card[key] in text
    for key in ("bound", "bound_error", "markov", "gain", "gain_error"):
        assert f"{metrics[key]:.4f}" in text
    assert metrics["times"] >= 16
    assert metrics["gain"] == pytest.approx(metrics["markov"] - metrics["bound"], abs=2e-4)
    # Vectors move in few steps: their bound is loose, and the card says that it lies above.
    assert metrics["bound"] < metrics["markov"] or prior.name.endswith("-co")
    assert card.get("path") == describe_path(prior)
    one_path = isinstance(prior, LatentDiffusion) or prior.fixed_steps is not None
    assert ("path" in card) == one_path
    assert card.get("path", "") in text


@pytest.mark.parametrize("name", LATENT)
def test_latents_are_read_off_sequences(name):
    prior = models.load(name)
    latents = prior.encode_latent(known(prior))
    assert latents.shape[1:] == prior.latent.event_shape
    assert len(latents.unique(dim=0)) == len(latents)
