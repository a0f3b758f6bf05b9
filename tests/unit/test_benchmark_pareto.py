"""The Pareto benchmark spends what it says, judges weighted draws, and finds the front."""

import json
import math
from dataclasses import replace

import pytest
import torch
from bench import module
from rich.console import Console
from typer.testing import CliRunner

from ppl_diffusion.models.masked import MaskedDiffusion

LENGTH = 6
SEARCHES = {"best of N", "soft value, 4, unweighted", "soft value, best child", "beam"}


def first_base(tokens):
    return tokens[..., 0].to(torch.float64)


def share_of_ts(tokens):
    return (tokens == 3).to(torch.float64).mean(-1)


def tiny_lab():
    torch.manual_seed(0)
    program = MaskedDiffusion.build("ACGT", LENGTH, name="tiny", dim=8, depth=1, heads=2)
    program.denoiser.requires_grad_(False)
    return module("_pareto_methods").Lab(program, designer=first_base, judge=share_of_ts)


def row(kind, judged, bound, hamming):
    coordinates = {"budget_kind": kind, "judged": judged, "bound": bound, "hamming": hamming}
    return module("_report").Row("pareto", judged, "expression", 2, None, coordinates)


def test_the_front_by_hand():
    front = module("_pareto_measure").non_dominated
    assert front([(1, 3), (2, 2), (3, 1), (1, 2), (2, 1)]) == [True, True, True, False, False]
    assert front([(1, 1), (1, 1)]) == [True, True]
    assert front([(1, 1, 0), (1, 1, 1)]) == [False, True]


def test_each_budget_has_a_front_of_its_own():
    rows = [row("evaluations", 1, 1, 0), row("evaluations", 2, 2, 0), row("calls", 1, 1, 0)]
    rows.append(row("evaluations", 0, 0, 9))
    marked = [r.coordinates for r in module("pareto").mark_front(rows)]
    assert [c["on_front"] for c in marked] == [False, True, True, False]
    assert [c["on_front_with_diversity"] for c in marked] == [False, True, True, True]


@pytest.mark.parametrize(("unit", "expected"), [(1, 14), (4, 12)])
def test_budgets_are_met_by_few_pilots(unit, expected):
    asked = []

    def cost(size):
        asked.append(size)
        return 5 + 7 * size

    size = module("_pareto_measure").fit_size(cost, 103, start=3, unit=unit)
    assert size == expected
    assert abs(cost(size) - 103) <= 7 * unit / 2
    assert len(asked) <= 5


def test_one_unit_is_run_where_the_budget_is_too_small():
    fit = module("_pareto_measure").fit_size
    assert fit(lambda size: 100.0 * size, 10, start=8) == 1
    assert fit(lambda size: 100.0 * size, 10, start=8, unit=4) == 4


def test_a_cost_that_jumps_does_not_go_round_in_circles():
    sizes = []

    def cost(size):
        sizes.append(size)
        return 50.0 if size < 10 else 200.0

    assert module("_pareto_measure").fit_size(cost, 100, start=10) == 5
    assert len(sizes) <= module("_pareto_measure").MAX_PILOTS


def test_hamming_distance_by_hand():
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 1]])
    assert module("_pareto_measure").mean_hamming(tokens) == pytest.approx(2 / 3)


def test_a_run_is_judged_by_its_weighted_draws():
    """A quarter of the weight is a quarter of the stratified draws, without any noise."""
    lab, measure = tiny_lab(), module("_pareto_measure")
    setting = next(module("_pareto_methods").Plan("calls", 2, 1).settings())
    two = torch.tensor([[[3, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3]]])
    posterior = setting.build(lab, lab.reward(1.0), 2).run(seed=0)
    posterior = replace(posterior, x0=two, samples={"x0": two})
    posterior = replace(posterior, log_weights=torch.tensor([[0.75, 0.25]]).double().log())
    found = measure.judge_run(lab, posterior, calls=5, seed=0)
    assert found.judged == pytest.approx(0.75 / 6 + 0.25)
    assert found.reward == pytest.approx(3)
    assert found.distinct == 2 / 32
    assert found.hamming == pytest.approx(2 * 24 * 8 * 5 / (32 * 31))
    assert found.entropy == pytest.approx(
        0.75 * -(math.log(1 / 6) / 6 + 5 / 6 * math.log(5 / 6)), rel=1e-6
    )
    assert found.ess == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert (found.eves, found.potential_calls) == (2, 5)
    assert found.spent("calls") == 5
    assert found.spent("evaluations") == posterior.num_evaluations


def test_means_and_errors_over_runs():
    measure = module("_pareto_measure")
    first = measure.Outcome(10, 2, 1.0, 5.0, -9.0, 0.5, 4.0, 1.0, 3.0, 2.0, True)
    found = measure.summarise([first, replace(first, judged=2.0)])
    assert found["judged"] == pytest.approx(1.5)
    assert found["judged_se"] == pytest.approx(0.5)
    assert found["bound_se"] == 0
    assert found["exact"] is True
    assert math.isnan(measure.summarise([first])["judged_se"])


def test_remembered_rows_are_asked_once_and_in_order():
    lab, asked = tiny_lab(), []
    plain = lab.prior.denoiser

    class Spy:
        vocab_size, kind = plain.vocab_size, plain.kind

        def __call__(self, tokens, t):
            asked.append(len(tokens))
            return plain(tokens, t)

    memory = module("_pareto_methods").Remembered(Spy(), size=4)
    rows = torch.randint(0, 5, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(memory(rows[[0, 1, 0]], 0.5), plain(rows[[0, 1, 0]], 0.5))
    both = memory(rows[[2, 1]].reshape(2, 1, LENGTH), 0.5)
    torch.testing.assert_close(both, plain(rows[[2, 1]], 0.5)[:, None])
    assert asked == [2, 1]
    many = torch.randint(0, 5, (9, LENGTH), generator=torch.Generator().manual_seed(1))
    assert memory(many, 0.5).shape == (9, LENGTH, 4)
    asked.clear()
    memory(many[[8, 0]], 0.5)
    assert asked == [1]  # the oldest of the nine was dropped


def test_every_method_is_run_printed_and_drawn(tmp_path, monkeypatch):
    pareto, methods = module("pareto"), module("_pareto_methods")
    monkeypatch.setattr(methods, "NUM_STEPS", 4)
    lab = tiny_lab()
    monkeypatch.setattr(methods.Lab, "load", classmethod(lambda cls: lab))
    plans = [methods.Plan(kind, 60, 2, (0.4,), (4,)) for kind in ("evaluations", "calls")]
    console, saved = Console(record=True, width=200), []
    rows = pareto.measure(plans, console, saved.append)
    module("_pareto_plot").plot([r.coordinates for r in rows], tmp_path / "new" / "pareto.png")
    assert (tmp_path / "new" / "pareto.png").stat().st_size > 10_000
    assert [len(part) for part in saved] == list(range(1, len(rows) + 1))
    assert "corrector, Power 1.5 + Tilt" in console.export_text()
    json.dumps([r.flat() for r in rows], allow_nan=False)
    equal = [r.coordinates for r in rows if r.coordinates["budget_kind"] == "evaluations"]
    assert len(equal) == len(rows) / 2 == 15
    for c in equal:
        assert c["exact"] == (c["method"] not in SEARCHES)
        assert c["evaluations"] == pytest.approx(60, rel=0.35), c["method"]
    assert equal[0]["potential_calls"] == 0  # the prior's own samples
    assert any(c["on_front"] for c in equal)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    pareto = module("pareto")
    app = pareto.typer.Typer()
    app.command()(pareto.main)
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "none" / "rows.json")])
    assert result.exit_code == 2
    assert "make it first" in result.output
