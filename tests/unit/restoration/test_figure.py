"""The figure of a restoration: what it says, and what it says where there is nothing to say."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text

from ppl_diffusion.jobs.search import Search
from ppl_diffusion.restoration.figure import restoration_figure
from ppl_diffusion.restoration.images import EXPECTED
from ppl_diffusion.restoration.question import Job, Question
from ppl_diffusion.restoration.run import restore
from ppl_diffusion.restoration.target import build_target
from ppl_diffusion.smc.verdict import Verdict


@pytest.fixture(scope="module")
def result(places):
    search = Search(method="smc", num_particles=6, num_runs=2, num_steps=2)
    question = Question(str(places / "truth.png"), noise=0.3)
    return restore(
        build_target(Job(str(places / "masked"), question, search, str(places / "codec")))
    )


def words(result):
    figure = restoration_figure(result)
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_figures_that_are_not_finite_are_not_told(result):
    metrics = {name: dict.fromkeys(row) for name, row in result.summary["metrics"].items()}
    odd = dataclasses.replace(result, summary={**result.summary, "metrics": metrics})
    assert "residual of mean: n/a" in words(odd)
    assert "PSNR of restored: n/a" in words(odd)
    assert "residual of mean: n/a" not in words(result)


def verdict(kind, level):
    return Verdict("wrong", kind=kind, level=level, where="", value=0.0, limit=0.0)


def judged(result, *verdicts):
    return dataclasses.replace(result, posterior=SimpleNamespace(warnings=verdicts, exact=True))


def test_it_says_what_is_not_to_be_trusted(result):
    two = verdict("apart", "broken"), verdict("mass", "broken"), verdict("mass", "broken")
    said = words(judged(result, *two, verdict("roots", "weak"), verdict("steps", "note")))
    assert "not to be trusted: apart, mass; to be doubted: roots" in said
    assert "steps" not in said
    assert "posterior" not in said
    assert "to be doubted: roots" in words(judged(result, verdict("roots", "weak")))


def test_a_result_without_doubts_says_nothing_of_them(result):
    said = words(judged(result))
    assert "posterior mean" in said
    assert "posterior draws" in said
    assert "trusted" not in said
    assert "doubted" not in said


def test_uncertainty_is_on_the_scale_of_the_noise(result):
    figure = restoration_figure(result)
    (axes,) = (ax for ax in figure.axes if ax.get_title() == "s.d. of pixels in [-1, 1]")
    np.testing.assert_allclose(axes.images[0].get_array(), result.images.sd[0].numpy())


def test_the_restored_image_is_called_what_it_is(result):
    assert "restored\n(heaviest draw)" in words(result)
    images = dataclasses.replace(result.images, kind=EXPECTED)
    assert f"restored\n({EXPECTED})" in words(dataclasses.replace(result, images=images))
