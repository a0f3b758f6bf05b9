"""The benchmark of caches compares what it says, and notices when it does not hold."""

import json
from dataclasses import replace

import pytest
import torch
from bench import module as imported
from rich.console import Console


def caching():
    return imported("caching")


def small_plan():
    module = caching()
    return module.Plan("B0", module.Size(6), 2)


@pytest.mark.parametrize("name", ["smc", "steering", "soft-value", "twisted"])
def test_without_caches_every_particle_pays(name):
    module = caching()
    rows = list(module.measure_method(small_plan(), name))
    assert [row.name for row in rows] == [
        *("rows_saved", "calls_saved", "time_ratio"),
        *("batches_per_step",) * 2,
    ]
    assert rows[0].value > 2  # five sites and twelve particles: few states
    assert rows[1].value > 1.5
    assert rows[3].coordinates["asked"] == "network"
    assert rows[4].value <= 6 / 5  # one batch per step, and a closing one


@pytest.mark.parametrize("name", ["smc", "steering", "soft-value", "twisted"])
def test_what_is_paid_without_caches_is_counted_by_hand(name):
    """Twelve particles, five steps, four children, four completions."""
    module = caching()
    chain, log_g = module.chain_of("B0")
    with module.caches(False):
        paid = module.METHODS[name](chain, log_g, module.Size(6), 0)
    calls = {
        "smc": 6 * 12,  # the start, four guesses, the end
        "steering": (4 * 4 + 1) * 12,
        "soft-value": 5 * 4 * 12,
        "twisted": (4 * 3 * 4 + 3 + 1) * 12,  # children of four steps, of the last, the end
    }
    assert paid.num_potential_calls == calls[name]


def test_caches_come_back():
    module = caching()
    chain, log_g = module.chain_of("B0")
    before = module.smc(chain, log_g, module.Size(6), 0)
    with module.caches(False):
        without = module.smc(chain, log_g, module.Size(6), 0)
    after = module.smc(chain, log_g, module.Size(6), 0)
    assert before.num_evaluations == after.num_evaluations < without.num_evaluations
    module.require_same(before, without)


def test_other_samples_and_evidences_are_noticed():
    module = caching()
    chain, log_g = module.chain_of("B0")
    first, other = (module.smc(chain, log_g, module.Size(6), seed) for seed in (0, 1))
    with pytest.raises(AssertionError, match="caches change the samples"):
        module.require_same(first, other)
    with pytest.raises(AssertionError, match="caches change the samples"):
        module.require_same(first, replace(first, log_evidence=first.log_evidence + 1e-3))


def test_batches_that_grow_are_noticed(monkeypatch):
    module = caching()

    def one_by_one(chain, log_g, size, seed):
        return module.smc(
            chain, lambda x0: torch.stack([log_g(x)[None] for x in x0])[:, 0], size, 0
        )

    monkeypatch.setitem(module.METHODS, "smc", one_by_one)
    with pytest.raises(AssertionError, match="potential batches per step go from"):
        list(module.measure_method(small_plan(), "smc"))


def test_rows_and_table(monkeypatch, tmp_path):
    module, report = caching(), imported("_report")
    monkeypatch.setattr(module, "QUICK", (small_plan(),))
    console = Console(width=120, record=True)
    rows = module.measure(True, console)
    report.write(rows, tmp_path / "rows.json")
    flat = json.loads((tmp_path / "rows.json").read_text())
    assert {row["method"] for row in flat} == set(module.METHODS)
    assert all({"name", "value", "unit", "n", "problem"} <= set(row) for row in flat)
    assert "same samples" in console.export_text()
