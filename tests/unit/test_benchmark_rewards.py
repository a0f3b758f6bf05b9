"""The benchmark of rewards measures what it says, on runs of no size."""

import pytest
import torch
from bench import module as imported
from rich.console import Console


def rewards():
    return imported("rewards")


def tiny():
    module = rewards()
    return module, module.Size(0.002, 4, 4, 12, 0.001, 0.001, 3, 16, 3, 1)


def test_rows_are_what_outside_checks_read(monkeypatch):
    module, size = tiny()
    monkeypatch.setattr(module, "QUICK", size)
    monkeypatch.setattr(module, "WORKERS", (1, 2))  # processes take their time to start
    rows = module.measure(True, Console(quiet=True))
    assert {row.name for row in rows} == {
        "overlap_wall_ratio",
        "utilisation",
        "idle_share",
        "call_overhead_ratio",
        "wall_over_ideal",
        "calls_saved_by_cache",
        "repeat_share",
        "memory_over_last_call",
    }
    goals = {(row.name, row.goal) for row in rows if row.goal is not None}
    assert ("overlap_wall_ratio", 0.6) in goals
    assert ("repeat_share", 0.0) in goals
    (main,) = [row for row in rows if row.name == "overlap_wall_ratio" and row.goal]
    assert main.coordinates == {"workers": 1, "times": "per question", "late": True}


def test_a_file_saves_all_calls_of_the_same_run():
    module, size = tiny()
    assert module.saved_by_cache(size, 0, 0) == 1.0
    assert 0.0 <= module.saved_by_cache(size, 0, 1) < 1.0


def test_a_run_never_asks_again_and_the_last_question_does():
    module, size = tiny()
    assert module.repeat_share(size, module.EvaluatedPotential, 0) == 0
    calls = []
    for kind in (module.EvaluatedPotential, module.LastQuestionPotential):
        potential = kind(module.Potential(lambda x0: x0.double().sum(-1)))
        for first in (0, 0, 5, 0):
            potential.lookahead(torch.arange(first, first + 5)[:, None])
        calls.append(potential.num_calls)
    assert calls == [10, 15]


def test_both_memories_give_the_same_answers():
    module, size = tiny()
    potentials = [
        kind(module.Potential(lambda x0: x0.double().sum(-1)))
        for kind in (module.EvaluatedPotential, module.LastQuestionPotential)
    ]
    for x0 in module.questions(size, 0):
        now, before = (potential.lookahead(x0) for potential in potentials)
        assert torch.equal(now, before)
        assert torch.equal(now, x0.double().sum(-1))


def test_times_are_those_of_the_sequences():
    module = rewards()
    x0 = torch.arange(4000)[:, None].expand(-1, 4)
    assert module.TIMES["constant"](x0) == 4000
    assert module.TIMES["per question"](x0) == 1.0
    heavy = module.TIMES["heavy-tailed"]
    assert heavy(x0) == pytest.approx(heavy(x0[:1000]) + heavy(x0[1000:]))
    # Log-normal, variance e - 1: four standard errors of the mean are a share of .083.
    assert heavy(x0) / 4000 == pytest.approx(1.0, abs=0.083)
