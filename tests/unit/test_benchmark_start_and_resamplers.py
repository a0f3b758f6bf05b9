"""What the benchmarks of start-up and of resamplers write down, without timing anything."""

from types import SimpleNamespace

import pytest
from bench import module
from rich.console import Console


@pytest.fixture
def bench():
    return module


def measured(bench, particles):
    made, console = bench("resamplers"), Console(record=True, width=150)
    small = made.Population(16, num_runs=2)
    rows = [
        row for name in ("ssp", "killing") for row in made.measure_one(name, small, particles, 2)
    ]
    made._print(rows, particles is not None, console)
    return [row.flat() for row in rows], console.export_text()


def test_resamplers_beside_particles(bench):
    asked = []
    theirs = SimpleNamespace(
        resampling=lambda name, weights: asked.append((name, len(weights))),
        exp_and_normalise=lambda log_weights: log_weights,
    )
    rows, text = measured(bench, theirs)
    ratios = [row for row in rows if row["name"] == "resampler_over_particles"]
    assert [row["resampler"] for row in ratios] == ["ssp", "killing"]
    assert {(row["num_particles"], row["num_runs"]) for row in ratios} == {(16, 2)}
    assert set(asked) == {("ssp", 16), ("killing", 16)}
    assert "not installed" not in text


def test_resamplers_without_particles(bench):
    rows, text = measured(bench, None)
    assert {row["name"] for row in rows} == {"resampling_time", "resampler_over_plain"}
    assert "particles is not installed" in text


def test_the_goal_stands_where_it_was_set(bench):
    made = bench("resamplers")
    theirs = SimpleNamespace(resampling=lambda *_: None, exp_and_normalise=lambda log_w: log_w)
    for size, goals in ((made.GOAL_PARTICLES, [3.0]), (64, [None])):
        rows = made.measure_one("systematic", made.Population(size), theirs, 1)
        assert [row.goal for row in rows if row.name == "resampler_over_particles"] == goals


def test_start(bench, monkeypatch):
    made, console = bench("startup"), Console(record=True, width=150)
    cost = {made.NOTHING: 0.1, made.BASE: 2.0, made.METHODS: 2.5}
    monkeypatch.setattr(made, "spent", lambda words: (cost.get(words[0], 0.3),) * 2)
    rows = [row.flat() for row in made.measure(True, console)]
    assert rows[0]["name"] == "import_over_torch_pyro"
    assert (rows[0]["value"], rows[0]["ok"]) == (1.25, False)
    jobs = [row["job"] for row in rows if row["name"] == "start_over_python"]
    assert jobs == list(made.COMMANDS)
    assert "missed" in console.export_text()
