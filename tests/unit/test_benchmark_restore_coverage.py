"""The benchmark that asks why intervals miss: whose truths they are, and what is counted."""

import pytest
import torch
from bench import module


@pytest.fixture
def coverage():
    return module("restore_coverage")


def test_the_model_draws_truths_of_its_own_law(coverage, monkeypatch):
    """What is added to decoded tokens has mean and variances of the error, within 5 s.e. each."""
    parts = coverage._parts()
    codec, error = parts["codec"], parts["error"]
    seen = []

    class Blank:
        codebook = codec.codebook

        def decode(self, tokens):
            seen.append(tokens)
            return torch.zeros_like(codec.decode(tokens))

    monkeypatch.setitem(parts, "codec", Blank())
    lacking = torch.stack([coverage.draw_truth(seed) for seed in range(400)]).flatten(1).double()
    variance = error.covariance.diagonal()
    z = (lacking.mean(0) - error.mean) / (variance / 400).sqrt()
    assert float(z.abs().max()) < 5
    assert float((lacking.var(0) / variance - 1).abs().max()) < 5 * (2 / 399) ** 0.5
    assert seen[0].shape == (16,)
    assert len({tuple(tokens.tolist()) for tokens in seen}) > 350
    again = coverage.draw_truth(0).flatten()
    assert torch.equal(again.double(), lacking[0])


def test_shares_are_told_by_origin_and_particles(coverage):
    found = {
        "the model": [{8: (0.8, 0.9, 5.0), 32: (0.9, 0.95, 9.0), 128: (0.9, 0.95, 9.0)}] * 2,
        "test images": [
            {8: (0.5, 0.6, 1.0), 32: (0.7, 0.8, 2.0), 128: (0.8, 0.9, 3.0)},
            {8: (0.7, 0.8, 3.0), 32: (0.9, 1.0, 4.0), 128: (1.0, 1.0, 5.0)},
        ],
    }
    rows = list(coverage.rows_of(found, "sr4", 0.05))
    assert len(rows) == 2 * len(coverage.PARTICLES)
    (row,) = [r for r in rows if r.coordinates["truth"] == "test images" and r.value < 0.7]
    assert row.coordinates["particles"] == 8
    assert (row.value, row.coordinates["clipped"]) == pytest.approx((0.6, 0.7))
    assert row.coordinates["se"] == pytest.approx(0.1)
    assert row.coordinates["sequences"] == 2.0
