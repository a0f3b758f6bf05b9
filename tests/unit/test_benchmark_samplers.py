"""The dense baseline has the law it claims, and the benchmark of samplers counts what it says."""

import json
from dataclasses import replace

import pytest
import torch
from bench import module
from rich.console import Console

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.testing import chi_square_p_value


def table_kernel(num_steps=3):
    process = Absorbing(2)
    joint = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)
    return InterpolatingKernel(process, TableDenoiser(joint, process), num_steps=num_steps)


def setting(**changes):
    return replace(module("samplers").Setting(7, 12, 6, 3, repeats=1, dense_steps=6), **changes)


def network():
    return module("samplers").backbone(7, 12, dim=8, depth=1)


def test_the_dense_sampler_has_the_law_of_the_chain():
    """False alarm 1e-6: one chi-square test over all four sequences."""
    kernel = table_kernel()
    sampler = module("_dense_baseline").DenseSampler(kernel)
    path, _ = sampler.sample(20_000, 2, torch.Generator().manual_seed(0))
    sequences = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    law = ReverseChain(kernel, 2).marginal().log_prob(sequences).exp()
    counts = torch.bincount(path[:, -1] @ torch.tensor([2, 1]), minlength=4)
    assert chi_square_p_value(counts, law) > 1e-6
    assert chi_square_p_value(counts, law.flip(0)) < 1e-6  # it has power


def test_calls_are_counted_on_the_trajectory():
    dense = module("_dense_baseline")
    sampler = dense.DenseSampler(table_kernel(num_steps=40))
    for batch in (1, 3):
        path, calls = sampler.sample(batch, 2, torch.Generator().manual_seed(batch))
        assert calls == dense.cached_calls(path)
        assert calls <= 1 + 2 * batch
        cost = dense.dense_cost(sampler, path, 4)
        assert (cost.calls, cost.num_steps, cost.num_measured) == (calls, 40, 4)
        assert cost.seconds > 0


def test_a_scaled_cost_is_calls_and_steps(monkeypatch):
    """With a clock that advances by one at each reading a call and a step both take one second."""
    dense = module("_dense_baseline")
    ticks = iter(range(1000))
    monkeypatch.setattr(dense.time, "perf_counter", lambda: next(ticks))
    sampler = dense.DenseSampler(table_kernel(num_steps=40))
    path, calls = sampler.sample(1, 2, torch.Generator().manual_seed(0))
    assert dense.dense_cost(sampler, path, 5).seconds == calls + 40


def test_goals_from_below():
    row = module("samplers").AtLeast("ratio", 12.0, "ratio", 1, 10.0)
    assert row.flat()["ok"] is True
    assert replace(row, value=9.0).ok is False
    assert replace(row, goal=None).ok is None


def test_rows_of_a_setting():
    samplers = module("samplers")
    above, ratio = samplers.measure_setting(setting(goals=True), network())
    assert above.name == "above_network_v7_l12_n6_b3"
    assert ratio.name == "wall_ratio_v7_l12_n6_b3"
    assert above.goal == 0.05
    assert ratio.goal == 10
    c = above.coordinates
    assert c["head_rows"] == 36  # every position once
    assert c["network_calls"] <= 6
    assert c["evaluations"] <= c["network_calls"] * 3
    assert ratio.coordinates["extrapolated"] is False
    (scaled,) = list(samplers.measure_setting(setting(dense_steps=2), network()))[1:]
    assert scaled.coordinates["extrapolated"] is True
    assert ratio.value == pytest.approx(
        ratio.coordinates["dense_seconds"] / ratio.coordinates["seconds"]
    )


@pytest.mark.parametrize(("method", "calls"), [("first hitting", 12), ("psi", 6)])
def test_other_samplers_are_timed_too(method, calls):
    samplers = module("samplers")
    (row,) = samplers.measure_setting(setting(method=method, dense_steps=0), network())
    assert row.name.startswith("above_network_other")
    assert row.coordinates["network_calls"] == calls
    assert row.coordinates["head_rows"] >= 36


def test_names_that_outside_checks_read():
    plan = module("samplers").plan
    names = {f"wall_ratio_{s.suffix}" for s in plan(True) if s.dense_steps and s.goals}
    assert names == {"wall_ratio_v50257_l1024_n64", "wall_ratio_v50257_l1024_n1024"}
    everywhere = {s.suffix for s in plan(False) if s.dense_steps}
    assert {f"v5_l200_n{n}_b{b}" for n in (64, 1024) for b in (1, 16, 256)} <= everywhere


def test_tables_print():
    samplers = module("samplers")
    rows = [*samplers.measure_setting(setting(goals=True), network())]
    memory = {**rows[1].coordinates, "ours_gb": 0.1, "dense_gb": 1.0}
    rows.append(samplers.Row("memory_ratio_v7", 10.0, "ratio", 1, None, memory))
    console = Console(record=True, width=200)
    samplers.print_tables(rows, console)
    text = console.export_text()
    assert "7, 12, 3, 6, memory" in text
    assert ">= 10" in text
    json.dumps([row.flat() for row in rows], allow_nan=False)


def test_memory_is_what_a_run_adds():
    samplers = module("samplers")
    assert 0 <= samplers.our_memory(setting(length=8)) < 10
    assert 0 <= samplers.dense_memory(setting(length=8)) < 10
    assert 0.05 < samplers.resident_gb() <= samplers.peak_gb() * 1.001


def test_rows_add_no_operations_to_a_round_of_reveals():
    """A loop over rows, or a value read back to the host, would show in the counts."""
    profiling = module("_sampler_profile")
    one, many = profiling.event_rounds(1), profiling.event_rounds(8)
    assert one == many
    assert one[1] == 0


def test_the_profile_sees_loops_and_reads():
    profiling = module("_sampler_profile")

    def loop(steps):
        for value in torch.ones(steps):
            value.item()

    operations, reads = profiling.per_step(loop, 5, 10)
    assert operations >= 2
    assert reads == 1
