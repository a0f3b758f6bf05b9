"""The benchmarks' exact answers are exact, and their rows are what outside checks read."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from bench import module
from rich.console import Console

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.kernels import Absorbing
from ppl_diffusion.testing import all_states


def problem(name, **changes):
    return replace(module("_problems").Problem.load(name), **changes)


def log_joint(given):
    sequences = all_states(given.vocab_size, given.length)
    log_p = given.chain(1).kernel.denoiser.log_prob(sequences)
    return sequences, log_p + given.log_potential(sequences)


@pytest.mark.parametrize("name", ["B0", "B1"])
def test_log_z_is_the_published_one(name):
    given = problem(name)
    assert given.posterior.log_z == pytest.approx(given.log_z, abs=1e-10)


def test_potentials_count_what_they_say():
    b0, b1 = problem("B0"), problem("B1")
    assert float(b0.log_potential(torch.tensor([0, 1, 0, 1, 0]))) == 2 * 2 + 1.5
    assert float(b0.log_potential(torch.tensor([0, 1, 1, 0, 2]))) == 2
    x0 = torch.zeros(40, dtype=torch.int64)
    x0[3:7] = torch.tensor([1, 2, 1, 2])
    assert float(b1.log_potential(x0)) == 3.0


def test_messages_agree_with_enumeration():
    short = problem("B1", length=5)
    sequences, joint = log_joint(short)
    weights = torch.softmax(joint, 0)
    marginals = torch.stack([weights[sequences[:, 2] == v].sum() for v in range(4)])
    assert short.posterior.table is None
    assert short.posterior.log_z == pytest.approx(float(torch.logsumexp(joint, 0)), abs=1e-12)
    torch.testing.assert_close(short.posterior.marginals[2], marginals, rtol=0, atol=1e-12)


def test_exact_draws_follow_the_marginals():
    """Each of 160 frequencies within 5.5 standard errors: false alarm below 1e-5."""
    posterior = problem("B1").posterior
    draws = posterior.draw(4000, torch.Generator().manual_seed(0))
    hits = torch.nn.functional.one_hot(draws, 4).to(torch.float64).mean(0)
    error = (posterior.marginals * (1 - posterior.marginals) / 4000).sqrt()
    assert bool(((hits - posterior.marginals).abs() < 5.5 * error + 1e-3).all())


@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_the_law_of_the_finite_chain_is_its_marginal(num_steps):
    problems = module("_problems")
    short = problem("B0", length=3)
    sequences = all_states(3, 3)
    exact = short.chain(num_steps).marginal().log_prob(sequences).exp()
    law = problems.chain_table(short, num_steps)
    torch.testing.assert_close(law, exact, rtol=0, atol=1e-13)
    assert float(law.sum()) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_gaps_agree_with_enumeration(num_steps):
    problems = module("_problems")
    short = problem("B1", length=4)
    law = problems.chain_table(short, num_steps)
    log_g = short.log_potential(all_states(4, 4))
    expected = float(torch.log((law * log_g.exp()).sum()))
    assert problems.declared_log_z(short, num_steps) == pytest.approx(expected, abs=1e-12)


def test_the_declared_target_approaches_the_ideal_one():
    problems = module("_problems")
    given = problem("B0")
    gaps = [given.log_z - problems.declared_log_z(given, steps) for steps in (32, 64, 128)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[2] == pytest.approx(4, rel=0.05)  # falls like 1 / T


def test_the_denoiser_of_a_problem_is_exact():
    given = problem("B0")
    sequences = all_states(3, 5)
    denoiser = given.chain(1).kernel.denoiser
    table = TableDenoiser(denoiser.log_prob(sequences).exp().reshape(3, 3, 3, 3, 3), Absorbing(3))
    state = torch.tensor([[3, 1, 3, 3, 0], [3, 3, 3, 3, 3]])
    hidden = state == 3
    torch.testing.assert_close(denoiser(state, 0.5)[hidden], table(state, 0.5)[hidden])


def test_overhead_rows():
    overhead = module("overhead")
    chain = overhead.random_chain(2, dim=8, depth=1, heads=2)
    setting = overhead.Setting("random transformer", chain, num_particles=4)
    timings = overhead.measure_timings(setting, 1, list(overhead.METHODS))
    rows = [row.flat() for row in overhead.summarise(setting, timings)]
    names = ["smc_over_network", "smc_over_network", "chain_over_network"]
    assert [row["name"] for row in rows] == names
    assert all(row["value"] > 1 and row["rows_requested"] == 8 for row in rows)
    assert rows[0]["goal"] == 1.05
    assert rows[2]["evaluations"] == 8
    assert rows[0]["evaluations"] == 5  # all particles share the fully masked first state


def test_overhead_states_the_networks_own_speed():
    overhead = module("overhead")
    chain = overhead.random_chain(2, dim=8, depth=1, heads=2)
    setting = overhead.Setting("random transformer", chain, num_particles=4)
    timings = overhead.measure_timings(setting, 1, ["SMC, no twist"])
    found = list(overhead.summarise(setting, timings))
    rows = {row.name: row for row in overhead.network_rows(setting, found, 2)}
    assert rows["rows_per_call"].value == chain.kernel.denoiser.rows_per_call(80)
    assert rows["network_ms_per_row"].value > 0
    assert rows["share_of_peak"].value > 0
    assert rows["share_of_peak"].coordinates["rows"] == 4


def test_network_rows():
    bench, overhead = module("network"), module("overhead")
    network = overhead.random_chain(1, dim=16, depth=1, heads=2).kernel.denoiser
    chosen = network.rows_per_call(80)
    with torch.no_grad():
        rows = [row.flat() for row in bench.rows_rows(network, (2, 4, 2 * chosen), 1)]
        layer, state = network.blocks[0].branches[0], torch.randn(3, 80, 16)
        plain = bench.plain_attention(layer, state, network.rotation)
        torch.testing.assert_close(layer(state, network.rotation), plain, rtol=1e-5, atol=1e-5)
        parts = {row.name: row for row in bench.part_rows(network, 2, 2)}
    *times, choice = rows
    assert [row["rows"] for row in times] == [2, 4, chosen, 2 * chosen]
    assert [row["chosen"] for row in times] == [False, False, True, False]
    assert choice["rows"] == chosen
    assert choice["value"] >= 1
    assert parts["rotation_over_plain"].goal == bench.ROTATION_GOAL
    products = 80 * 16 * (4 * 16 + 2 * 32 + 2 * 80) + 80 * 16 * 4
    assert bench.flops(network) == 2 * products


def test_memory_is_that_of_this_process():
    memory = module("memory")
    peak, seconds, evaluations = memory.smc_usage(20, 3, "argmax")
    assert 0.05 < peak < 100
    assert seconds > 0
    assert 1 < evaluations <= 1 + 2 * 20


def test_rows_say_whether_a_goal_is_met():
    report = module("_report")
    row = report.Row("ratio", 1.0, "ratio", 5, goal=1.05, coordinates={"extra": float("nan")})
    assert row.flat() == {
        "name": "ratio",
        "value": 1.0,
        "unit": "ratio",
        "n": 5,
        "goal": 1.05,
        "ok": True,
        "extra": None,
    }
    assert not replace(row, value=1.06).ok
    assert replace(row, goal=None).ok is None


def test_a_missing_prior_is_replaced_and_said(monkeypatch):
    overhead = module("overhead")

    def missing(name):
        raise ValueError(f"There is no prior {name!r}.")

    monkeypatch.setattr(overhead.models, "load", missing)
    console = Console(record=True, width=200)
    setting = overhead.load_setting(console, num_steps=2, num_particles=3)
    assert setting.prior == "random transformer"
    assert "There is no prior 'yeast-promoter'." in console.export_text()


def test_command_line(tmp_path, monkeypatch, capsys):
    report = module("_report")

    def measure(quick, console):
        """Measure nothing."""
        return [report.Row("quick", float(quick), "bool", 1)]

    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--json", str(out)])
    with pytest.raises(SystemExit) as finished:
        report.run(measure)
    assert finished.value.code == 0
    assert json.loads(out.read_text()) == [{"name": "quick", "value": 1.0, "unit": "bool", "n": 1}]

    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "no" / "rows.json")])
    with pytest.raises(SystemExit) as refused:
        report.run(measure)
    assert refused.value.code == 2
    framed = capsys.readouterr().err  # words wrap inside a box whose width the path decides
    assert "does not exist" in " ".join(framed.replace("│", " ").split())


def test_look_aheads_are_measured_on_the_published_problems():
    lookahead = module("lookahead")
    case = lookahead.steep("D1", 8, 8)
    assert case.log_z == pytest.approx(10.807, abs=1e-3)
    rows = list(lookahead.measure_case(case, 8, 20, "none", "defensive"))
    assert [row.coordinates["method"] for row in rows] == ["none", "defensive"]
    assert rows[0].coordinates["mass"] == 1.0
    assert {"problem", "mean", "median", "num_particles"} <= rows[0].flat().keys()
