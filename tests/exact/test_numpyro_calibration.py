"""Tokens and parameters in one MCMC are calibrated, and broken twins are found out.

Simulation-based calibration by `benchmarks.calibration_joint`, in one compiled program. Ten
p-values, each held against 1e-4: a false alarm in 1,000.
"""

import jax
import pytest
from bench import module
from rich.console import Console


@pytest.fixture(scope="module")
def bench():
    return module("calibration_joint")


def smallest(bench, sampler, statistic=None):
    """Return the smallest p-value of 300 replicates."""
    ranks = bench.ranks(sampler, 300, jax.random.key(0))
    chosen = ranks.values() if statistic is None else [ranks[statistic]]
    return min(min(bench.p_values(rank)) for rank in chosen)


def test_joint_inference_is_calibrated(bench):
    assert smallest(bench, "as it is") > 1e-4


@pytest.mark.parametrize(
    ("twin", "statistic"), [("noise times 1.5", "noise"), ("sweeps at gain 1", "zeros")]
)
def test_a_broken_twin_is_found_out(bench, twin, statistic):
    assert smallest(bench, twin, statistic) < 1e-4


@pytest.mark.slow
def test_calibration_over_many_replicates(bench, tmp_path):
    rows = bench.measure(2000, Console(quiet=True), tmp_path / "ranks.png")
    assert {row.ok for row in rows} == {True, None}
    assert (tmp_path / "ranks.png").stat().st_size > 0
    for twin in list(bench.SAMPLERS)[1:]:
        assert max(row.value for row in rows if row.coordinates["sampler"] == twin) > 20
