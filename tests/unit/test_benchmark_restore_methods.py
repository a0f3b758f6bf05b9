"""Restorers of the benchmark: one shape of result, honest counts, and no look at the truth."""

from dataclasses import replace

import pytest
import torch
from bench import module as imported

import ppl_diffusion as ppd
from ppl_diffusion.imaging.codec_error import CodecError
from ppl_diffusion.imaging.measurement import measure
from ppl_diffusion.imaging.operators import make_operator
from ppl_diffusion.models.image_data import load_images

TINY = {"num_samples": 3, "num_steps": 2, "num_iterations": 2, "num_particles": 4}
NAMES = (
    "aps mean-field aps-smc relaxed-dps-smc smc g2d2-star g2d2-markov split-gibbs "
    "d-cbg relaxed-dps svdd-pm prior pseudo-inverse codec-ceiling aps+error aps-smc+error"
)
SINGLE = ("pseudo-inverse", "codec-ceiling")


@pytest.fixture(scope="module")
def parts():
    prior, codec = ppd.models.load("digits"), ppd.models.load_codec("digits-codec")
    truth = load_images("digits", None).test[0]
    measurement = measure(make_operator("sr4", codec.image_shape, seed=0), truth, 0.05, 0)
    return prior, ppd.models.load("digits-uniform"), codec, measurement, truth


@pytest.fixture
def made():
    module = imported("_restore_methods")
    shape = (256,)
    error = CodecError(torch.zeros(shape), torch.zeros(256, 1), torch.full(shape, 0.01))
    found = module.restorers(**TINY, error=error)
    long = found["split-gibbs"]
    short = replace(long, method=replace(long.method, num_sweeps=2, num_moves=3))
    found = {**found, "split-gibbs": short}

    def asked(restorer):
        return lambda *parts_and_seed: restorer(
            module.Problem(*parts_and_seed[:-1]), parts_and_seed[-1]
        )

    return {name: asked(restorer) for name, restorer in found.items()}


@pytest.mark.parametrize("name", NAMES.split())
def test_a_restorer_returns_images_weights_and_costs(name, made, parts):
    restored = made[name](*parts, 0)
    count = len(restored.images)
    assert restored.images.shape[1:] == parts[-1].shape
    if not name.endswith("+error"):  # draws of the error are many, whatever the particles
        assert count == 1 if name in SINGLE else count in (3, 4)
    assert float(restored.weights.sum()) == pytest.approx(1, abs=1e-5)
    assert restored.seconds >= 0
    assert restored.mean.shape == parts[-1].shape
    assert (restored.denoiser_rows > 0) == (name not in SINGLE)
    assert restored.exact == ("smc" in name)
    assert (restored.log_evidence is not None) == restored.exact


@pytest.mark.parametrize("name", ["aps", "g2d2-star", "mean-field"])
def test_gradients_are_counted(name, made, parts):
    restored = made[name](*parts, 0)
    assert restored.decoder_backward > 0
    assert restored.decoder_forward > 0


@pytest.mark.parametrize("name", ["svdd-pm", "prior", "smc"])
def test_methods_without_gradients_count_none(name, made, parts):
    assert made[name](*parts, 0).decoder_backward == 0


def test_g2d2_decodes_each_particle_once_for_each_iteration(made, parts):
    """Two steps of two iterations with three particles, and the distinct ends."""
    restored = made["g2d2-star"](*parts, 0)
    assert restored.decoder_backward == 2 * 2 * 3
    assert 12 < restored.decoder_forward <= 12 + 3


def test_the_truth_is_for_the_ceiling_alone(made, parts):
    other = torch.zeros_like(parts[-1])
    for name in ("aps", "svdd-pm", "pseudo-inverse"):
        seen = made[name](*parts[:-1], parts[-1], 1).images
        unseen = made[name](*parts[:-1], other, 1).images
        assert torch.equal(seen, unseen)


def test_images_with_an_error_of_their_own_are_no_decoded_tokens(made, parts):
    for name in ("aps+error", "aps-smc+error"):
        restored = made[name](*parts, 0)
        assert not torch.allclose(restored.images, parts[2].decode(restored.tokens), atol=0.05)


def test_the_mean_is_that_of_the_draws_with_their_error(parts):
    """Of an error that is half a grey level everywhere: without it every pixel is off by that."""
    module = imported("_restore_methods")
    prior, uniform, codec, measurement, truth = parts
    lacking = CodecError(torch.full((256,), 0.5), torch.zeros(256, 1), torch.full((256,), 1e-3))
    restorer = module.restorers(**TINY, error=lacking)["svdd-pm+error"]
    restored = restorer(module.Problem(prior, uniform, codec, measurement, truth), 0)
    drawn, spread = restored.images.mean(0), restored.images.std(0)
    error = (spread / module.NUM_DRAWS**0.5).clamp_min(1e-4)
    # 256 pixels, and three particles that are drawn 256 times: 6 standard errors.
    assert float(((drawn - restored.mean) / error).abs().max()) < 6


def test_scores_are_of_intervals_that_hold_nine_in_ten(parts, made):
    scores = imported("_restore_scores")
    measurement, truth = parts[-2:]
    restored = made["svdd-pm+error"](*parts, 0)
    network = ppd.models.load_classifier("digits-classifier")
    found = scores.score(restored, truth, measurement, network)
    draws = (restored.images.clamp(-1, 1) + 1) / 2
    low, high = (torch.quantile(draws, q, dim=0, interpolation="nearest") for q in (0.05, 0.95))
    held = ((low <= (truth + 1) / 2) & ((truth + 1) / 2 <= high)).double().mean()
    assert found.coverage == pytest.approx(float(held), abs=0.02)
    narrow = [torch.quantile(draws, q, dim=0) for q in (0.1, 0.9)]
    fewer = ((narrow[0] <= (truth + 1) / 2) & ((truth + 1) / 2 <= narrow[1])).double().mean()
    assert float(fewer) < float(held) - 0.04  # or eight in ten would pass as well


def test_larger_images_are_scored_in_the_size_of_the_network():
    module = imported("_restore_methods")
    truth = load_images("digits").test[1].repeat_interleave(2, -1).repeat_interleave(2, -2)
    measurement = measure(make_operator("sr4", (1, 32, 32), seed=0), truth, 0.05, 0)
    network = ppd.models.load_classifier("digits-classifier")
    found = [
        imported("_restore_scores").score(
            module.Restored(image[None], torch.ones(1), 0, 0, 0, 0.0), truth, measurement, network
        )
        for image in (truth, -truth)
    ]
    assert found[0].perceptual == pytest.approx(0, abs=1e-6)
    assert found[1].perceptual > 0.1


def test_split_gibbs_asks_for_its_prior(made, parts):
    prior, _, *rest = parts
    with pytest.raises(ValueError, match="needs the prior of the uniform process"):
        made["split-gibbs"](prior, None, *rest, 0)
