"""The benchmark of backends runs, its filters are right, and what is missing is said."""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
from bench import module
from rich.console import Console


@pytest.fixture
def small(monkeypatch):
    backends = module("backends")
    monkeypatch.setattr(backends, "NUM_PARTICLES", (4,))
    monkeypatch.setattr(backends, "FILTER_STEPS", 3)
    return backends


def test_jax_filters_estimate_the_evidence():
    """One run of 4,096 particles each, whose standard deviation is below .05, within .25 nats."""
    model = module("_filters").HMM.random(20)
    found = module("_jax_filters").filters(model)
    assert len(found) == 4
    for one in found.values():
        assert one(4096, 0) == pytest.approx(model.log_evidence, abs=0.25)


def test_rows_of_the_filters(small):
    rows = list(small.measure_filters([sys.executable], 1, 2))
    named = {(row.name, row.coordinates["method"], row.coordinates.get("rival")) for row in rows}
    assert ("time_over_scan", "run_particles", None) in named
    assert ("time_over_rival", "smc_scan", "Pyro") in named
    assert {row.goal for row in rows if row.name == "time_over_scan"} == {None, 1.5}
    assert all(row.value > 0 for row in rows)
    terminal = Console(record=True, width=200)
    small._print_filters(rows, terminal)
    text = terminal.export_text()
    assert "run_particles over jitted scan" in text
    missing = set(module("_rival_filters").LIBRARIES) - {name for _, name, _ in named}
    for library in missing:
        assert f"{library} is left out: it is not installed here" in text


def test_rows_of_a_chain(small):
    case = next(small.cases())
    rows = list(small.measure_chain(replace(case, small=True), True))
    assert [row.name for row in rows] == [
        "jax_over_torch",
        "evidence_error",
        "evidence_error",
        "error_over_torch",
    ]
    assert rows[0].goal == pytest.approx(1 / 3)
    assert rows[-1].coordinates["reference"] == "exact"
    assert 0.3 < rows[-1].value < 3
    terminal = Console(record=True, width=200)
    small._print_chains(rows, terminal)
    assert "B0, exact denoiser" in terminal.export_text()
    json.dumps([row.flat() for row in rows], allow_nan=False)


PRETENDER = """
import sys, types

class SMC:
    def __init__(self, fk, N, resampling, ESSrmin):
        self.fk, self.N = fk, N
    def run(self):
        x = self.fk.M0(self.N)
        self.logLt = float(self.fk.logG(0, None, self.fk.M(1, x)).mean())

class FeynmanKac:
    def __init__(self, T):
        self.T = T
"""


def test_a_rival_answers_from_a_process_of_its_own(small, tmp_path, monkeypatch):
    """By a library of that name that stands in for it."""
    (tmp_path / "particles.py").write_text(PRETENDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model = module("_filters").HMM.random(3)
    with ExitStack() as stack:
        found = small.rivals(model, [sys.executable], stack)
        seconds, evidence = found["particles"].run(5, 0)
        assert seconds >= 0
        assert evidence < 0
        assert found["particles"].run(5, 0)[1] == evidence


def test_a_process_that_ends_is_named():
    with (
        module("_worker").Worker([sys.executable, "-c", ""], {}) as worker,
        pytest.raises(RuntimeError, match="-c  failed"),
    ):
        worker.ask(case="a")
