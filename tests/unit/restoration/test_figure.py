"""The figure of a restoration: what it says, and what it says where there is nothing to say."""

import dataclasses

import pytest
from matplotlib.text import Text

from ppl_diffusion.jobs.search import Search
from ppl_diffusion.restoration.figure import restoration_figure
from ppl_diffusion.restoration.question import Job, Question
from ppl_diffusion.restoration.run import restore
from ppl_diffusion.restoration.target import build_target


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
