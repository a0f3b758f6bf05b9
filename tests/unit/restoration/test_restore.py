"""Restorations against the posterior of all 256 sequences."""

import dataclasses
import shutil

import pytest
import torch

from ppl_diffusion.imaging import weighted
from ppl_diffusion.imaging.codec_error import CodecError
from ppl_diffusion.imaging.measurement import Measurement
from ppl_diffusion.imaging.metrics import psnr, unit
from ppl_diffusion.inference import methods
from ppl_diffusion.jobs.checks import InputError
from ppl_diffusion.jobs.search import Search
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.restoration.images import EXPECTED, decoded
from ppl_diffusion.restoration.question import Job, Question
from ppl_diffusion.restoration.run import restore
from ppl_diffusion.restoration.target import build_target
from ppl_diffusion.testing import ExactChain

SEARCH = Search(method="smc", num_particles=24, num_runs=2)


def job(places, prior="masked", search=SEARCH, **asked):
    question = Question(str(places / "truth.png"), **{"noise": 0.3, **asked})
    return Job(str(places / prior), question, search, str(places / "codec"))


@pytest.fixture(scope="module")
def result(places):
    return restore(build_target(job(places)))


def test_the_target_is_what_was_asked_for(places):
    target = build_target(job(places, operator="sr2", noise=0.2))
    assert target.truth.shape == (1, 8, 8)
    assert target.measurement.operator.label == "sr2"
    assert target.measurement.sigma == 0.2
    assert target.job.search.num_steps == 2
    ordered, plain = target.chains()
    assert isinstance(ordered.kernel, OrderedKernel)
    assert ordered.num_steps == plain.num_steps == 2


def test_a_prior_of_uniform_noise_has_one_chain(places):
    search = dataclasses.replace(SEARCH, num_steps=3)
    target = build_target(job(places, "uniform", search))
    (chain,) = target.chains()
    assert chain.num_steps == 3
    assert restore(target).summary["exact"]


def test_mean_and_uncertainty_are_those_of_the_enumerated_posterior(places):
    search = Search(method="smc", num_particles=400, num_runs=8, num_steps=3)
    target = build_target(job(places, "uniform", search))
    result = restore(target)
    exact = ExactChain.of(target.chains()[0])
    weights = exact.posterior(target.potential)
    images = decoded(target, exact.states).double()
    mean, sd = weighted.mean(images, weights), weighted.sd(images, weights)
    assert float(sd.max()) > 0.2  # or there is nothing to find out
    runs = zip(result.posterior.x0, result.posterior.weights, strict=True)
    means = torch.stack([weighted.mean(decoded(target, x).double(), w) for x, w in runs])
    # 64 pixels, seven degrees of freedom: beyond 8 standard errors with probability 64 * 9e-5.
    error = means.std(0) / 8**0.5 + 1e-4
    assert float(((result.images.mean - mean).abs() / error).max()) < 8
    torch.testing.assert_close(result.images.sd.double(), sd, rtol=0, atol=0.04)


def test_images_are_weighed_by_all_their_copies(result):
    images, posterior = result.images, result.posterior
    assert float(images.weights.sum()) == pytest.approx(1)
    assert images.weights.tolist() == sorted(images.weights.tolist(), reverse=True)
    joint = posterior.pooled_log_weights.exp().flatten()
    same = (posterior.x0.flatten(0, 1) == images.tokens[0]).all(-1)
    assert float(images.weights[0]) == pytest.approx(float(joint[same].sum()))
    assert torch.equal(images.restored, images.images[0])
    for end, wanted in zip(
        images.interval, weighted.interval(images.draws, images.draw_weights, 0.9), strict=True
    ):
        assert torch.equal(end, wanted)


def test_the_summary_says_how_good_it_is(result):
    summary, images, target = result.summary, result.images, result.target
    figures = summary["metrics"]
    assert figures.keys() == {"restored", "mean", "pseudo_inverse", "codec"}
    assert figures["mean"]["psnr"] == pytest.approx(float(psnr(images.mean, target.truth)))
    assert figures["restored"]["residual"] == pytest.approx(
        float(target.measurement.residual(images.restored))
    )
    crps = weighted.crps(unit(target.truth), unit(images.images), images.weights)
    assert summary["posterior"]["crps"] == pytest.approx(float(crps.mean()))
    share = weighted.coverage(unit(target.truth), unit(images.draws), images.draw_weights, 0.9)
    assert summary["posterior"]["coverage_90"] == pytest.approx(share)
    assert summary["exact"] is True
    assert summary["denoiser_rows"] == result.posterior.num_evaluations > 0
    assert summary["decoder_calls"] > 0
    assert "the measurement by sr4" in summary["target"]
    assert summary["settings"]["question"]["operator"] is None


def test_equally_heavy_draws_are_ordered_by_their_likelihood(places):
    search = Search(method="best-of-n", num_particles=24, num_runs=1, options={"keep": 5})
    images = restore(build_target(job(places, search=search))).images
    assert images.weights.tolist() == pytest.approx([0.2] * 5)
    log_g = images.log_likelihood.tolist()
    assert log_g == sorted(log_g, reverse=True)


def test_a_saved_measurement_has_no_truth_and_the_same_posterior(places, tmp_path, result):
    result.target.measurement.save(tmp_path / "m.npz")
    question = Question(str(tmp_path / "m.npz"), measured=True)
    target = build_target(dataclasses.replace(job(places), question=question))
    assert target.truth is None
    again = restore(target)
    assert torch.equal(again.images.images, result.images.images)
    assert again.summary["metrics"].keys() == {"restored", "mean", "pseudo_inverse"}
    assert list(again.summary["metrics"]["mean"]) == ["residual"]
    assert list(again.summary["posterior"]) == ["diversity"]


@pytest.mark.parametrize("prior", ["digits", "digits-uniform"])
def test_shipped_priors_know_their_codec_and_classifier(prior):
    search = Search(method="smc", num_particles=2, num_runs=1, num_steps=2)
    target = build_target(Job(prior, Question("digits:1", noise=0.5), search))
    assert target.job.codec == "digits-codec"
    assert restore(target).summary["metrics"]["codec"].keys() == {
        "residual",
        "psnr",
        "ssim",
        "perceptual",
    }


def test_seeds_decide_operator_noise_and_draws(places):
    def measured(seed):
        search = dataclasses.replace(SEARCH, seed=seed)
        return build_target(job(places, operator="rinp", search=search)).measurement

    first, same, other = measured(1), measured(1), measured(2)
    assert first.operator == same.operator != other.operator
    assert torch.equal(first.y, same.y)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"operator": "blur"}, "There is no operator 'blur'"),
        ({"operator": "sr3"}, "choose one of sr1, sr2, sr4, sr8"),
        ({"noise": 0.0}, "The noise must be above 0"),
        ({"noise": None, "operator": "hdr", "measured": True}, "drop --operator, or --measured"),
    ],
)
def test_questions_without_an_answer_are_refused(asked, sentence, places):
    with pytest.raises(InputError, match=sentence):
        build_target(job(places, **asked))


def test_parts_that_do_not_belong_together_are_refused(places, tmp_path):
    asked = job(places)
    with pytest.raises(InputError, match=r"digits-codec.*reads 16 of 64.*--codec"):
        build_target(dataclasses.replace(asked, codec="digits-codec"))
    with pytest.raises(InputError, match=r"There is no codec 'masked-codec'.*may be none of"):
        build_target(dataclasses.replace(asked, codec=None))
    with pytest.raises(InputError, match="test images 0 to 296, not 999"):
        build_target(dataclasses.replace(asked, question=Question("digits:999")))
    with pytest.raises(InputError, match="Images of digits are 16 x 16 pixels, grey"):
        build_target(dataclasses.replace(asked, question=Question("digits:0")))
    digits = build_target(job(places, operator="hdr")).measurement
    other = Measurement(type(digits.operator).draw((1, 4, 4)), torch.zeros(16), 0.1)
    other.save(tmp_path / "m.npz")
    question = Question(str(tmp_path / "m.npz"), measured=True)
    with pytest.raises(InputError, match="one of an image of 4 x 4 pixels, grey"):
        build_target(dataclasses.replace(asked, question=question))


@pytest.mark.parametrize("method", methods())
def test_every_method_restores_with_one_of_the_priors(method, places):
    search = Search(method=method, num_particles=8, num_runs=1, num_steps=2)
    prior = "uniform" if method == "split-gibbs" else "masked"
    result = restore(build_target(job(places, prior, search)))
    assert result.summary["method"] == method
    assert result.summary["decoder_calls"] > 0
    assert float(result.images.weights.sum()) == pytest.approx(1)


def test_a_method_without_a_chain_to_move_is_refused(places):
    search = Search(method="split-gibbs", num_particles=2, num_runs=1, num_steps=2)
    with pytest.raises(InputError, match=r"[Uu]niform"):
        restore(build_target(job(places, "masked", search)))


@pytest.fixture(scope="module")
def with_error(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_error") / "places"
    shutil.copytree(places, folder)
    generator = torch.Generator().manual_seed(5)
    factor = 0.1 * torch.randn(64, 2, generator=generator)
    CodecError(torch.zeros(64), factor, torch.full((64,), 0.04)).save(folder / "codec")
    return folder


def test_what_the_codec_leaves_out_counts_where_it_is_known(places, with_error):
    search = Search(method="smc", num_particles=400, num_runs=4, num_steps=3)
    target = build_target(job(with_error, "uniform", search))
    result = restore(target)
    exact = ExactChain.of(target.chains()[0])
    weights = exact.posterior(target.potential)
    assert target.error is not None
    images = target.error.expected(decoded(target, exact.states)).clamp(-1, 1).double()
    left = target.error.error.covariance - (
        target.error.gain @ target.error.jacobian @ target.error.error.covariance
    )
    mean = weighted.mean(images, weights)
    spread = weighted.sd(images, weights).square() + left.diagonal().reshape(1, 8, 8)
    inside = mean.abs() < 0.5  # where nothing is clipped
    assert int(inside.sum()) > 20
    torch.testing.assert_close(result.images.mean.double(), mean, rtol=0, atol=0.08)
    ratio = result.images.sd.double()[inside] / spread.sqrt()[inside]
    low, high = result.images.interval
    drawn = result.images.draws.mean(0)  # the mean is of the law of the ends
    torch.testing.assert_close(result.images.mean, drawn)
    assert bool(((low <= drawn) & (drawn <= high) | (low == high)).all())
    assert result.images.kind == EXPECTED
    # 512 draws: a standard deviation is within a third of itself but for one in 1e9.
    assert bool(((ratio - 1).abs() < 0.33).all())
    plain = build_target(job(with_error, "uniform", search, codec_error=False))
    assert plain.error is None
    rows = exact.states[:4]
    known = plain.measurement.potential(plain.codec)(rows)
    torch.testing.assert_close(plain.potential(rows), known)
    assert build_target(job(places)).error is None


def test_an_error_that_nobody_knows_is_refused(places):
    with pytest.raises(InputError, match=r"has no error\.safetensors"):
        build_target(job(places, codec_error=True))


@pytest.mark.parametrize("noise", [1e-30, 1e-7, 2e3, 1e30])
def test_noise_that_no_image_can_have_is_refused(noise):
    with pytest.raises(InputError, match=r"between 1e-06 and 1000, not at .*--noise"):
        Question("digits:3", noise=noise)
