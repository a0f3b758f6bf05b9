"""The gallery of restorations, with methods that take no time."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import restore_gallery
from benchmarks.restore_gallery import draw, restored, rows_of


@pytest.fixture
def lines(monkeypatch):
    quick = {"one": ("smc", {}), "APS-SMC, mean": ("smc", {})}
    monkeypatch.setattr(restore_gallery, "METHODS", quick)
    return list(restored("digits", ["rinp", "phase"], noise=0.1, seed=5, particles=4))


def test_a_row_is_an_operator_and_an_image(lines):
    first, second = (line.results["one"].target for line in lines)
    assert first.measurement.operator.name == "rinp"
    assert second.job.question.image == "digits:6"
    assert lines[0].results["APS-SMC, mean"].summary["num_particles"] == 4
    rows = rows_of(lines)
    assert [row.coordinates["task"] for row in rows] == ["rinp", "rinp", "phase", "phase"]
    means = [line.results["APS-SMC, mean"].summary["metrics"]["mean"]["psnr"] for line in lines]
    assert [row.value for row in rows[1::2]] == means


def test_it_is_a_picture(lines, tmp_path):
    draw(lines, tmp_path / "gallery.png")
    pixels = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"))
    assert pixels.shape[1] < 800
    assert pixels.std() > 20
