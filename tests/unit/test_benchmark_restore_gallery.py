"""The gallery of restorations, with methods that take no time."""

import numpy as np
import pytest
from bench import module as imported
from PIL import Image

from ppl_diffusion.imaging.metrics import psnr


@pytest.fixture
def gallery(monkeypatch):
    module = imported("restore_gallery")
    quick = {"one": ("smc", {}), "APS-SMC, mean": ("smc", {})}
    monkeypatch.setattr(module, "METHODS", quick)
    return module


@pytest.fixture
def lines(gallery):
    return list(gallery.restored("digits", ["rinp", "phase"], noise=0.1, seed=5, particles=4))


def test_a_row_is_an_operator_and_an_image(lines, gallery):
    first, second = (line.results["one"].target for line in lines)
    assert first.measurement.operator.name == "rinp"
    assert second.job.question.image == "digits:6"
    assert lines[0].results["APS-SMC, mean"].summary["num_particles"] == 4
    rows = gallery.rows_of(lines)
    assert [row.coordinates["task"] for row in rows] == ["rinp", "rinp", "phase", "phase"]
    means = [line.results["APS-SMC, mean"].summary["metrics"]["mean"]["psnr"] for line in lines]
    assert [row.value for row in rows[1::2]] == pytest.approx(means)
    one = lines[1].results["one"]
    first = one.target.codec.decode(one.posterior.x0[0, 0]).clamp(-1, 1)
    assert rows[2].value == pytest.approx(float(psnr(first, one.target.truth)))


def test_it_is_a_picture(lines, gallery, tmp_path):
    gallery.draw(lines, tmp_path / "gallery.png")
    pixels = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"))
    assert pixels.shape[1] < 800
    assert pixels.std() > 20
