"""The benchmarks of the engine count, fit and filter what they say."""

import importlib
import importlib.util
import itertools
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import module

from ppl_diffusion.inference import methods

ROOT = str(Path(__file__).parents[2])


# Operations and host reads.

X = torch.arange(6.0)
MASK = X > 2
ONE, MANY = torch.tensor(2), torch.ones(6, dtype=torch.int64)
READS = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool(MASK.any()),
    "float": lambda: float(X[0]),
    "index by a tensor": lambda: X[ONE],
    "mask": lambda: X[MASK],
    "assign many by a mask": lambda: X.clone().__setitem__(MASK, X[:3]),
    "unique": lambda: torch.unique(X),
    "unique rows": lambda: torch.unique(X[:, None], dim=0),
    "unique runs": lambda: torch.unique_consecutive(X),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "bincount": lambda: MASK.long().bincount(),
    "repeat": lambda: X.repeat_interleave(MANY),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
}
WAITS_FOR_NOTHING = {
    "arithmetic": lambda: torch.where(MASK, X, 0) + X.cumsum(-1),
    "gather": lambda: X[MANY],
    "assign one number by a mask": lambda: X.clone().__setitem__(MASK, 0.0),
    "repeat to a known size": lambda: X.repeat_interleave(MANY, output_size=6),
    "shape": lambda: X.shape[0] + X.numel(),
}


@pytest.mark.parametrize("name", READS)
def test_a_host_read_is_counted_once(name):
    assert module("_operations").count_operations(READS[name]).num_reads == 1


@pytest.mark.parametrize("name", WAITS_FOR_NOTHING)
def test_what_waits_for_nothing_is_no_read(name):
    assert module("_operations").count_operations(WAITS_FOR_NOTHING[name]).num_reads == 0


def test_operations_are_counted():
    counted = module("_operations").count_operations(lambda: [X.exp() for _ in range(7)])
    assert dict(counted.calls) == {"exp": 7}


# The hidden Markov model.


def enumerated(model):
    total = 0.0
    for states in itertools.product(range(len(model.initial)), repeat=model.num_steps):
        p = float(model.initial[states[0]])
        for a, b in itertools.pairwise(states):
            p *= float(model.transition[a, b])
        for state, symbol in zip(states, model.symbols.tolist(), strict=True):
            p *= float(model.emission[state, symbol])
        total += p
    return math.log(total)


def test_the_forward_algorithm_is_exact():
    model = module("_filters").HMM.random(4, num_states=3, num_symbols=2)
    assert model.log_evidence == pytest.approx(enumerated(model), abs=1e-12)


def test_our_evidence_is_unbiased():
    """4,000 runs within 4 standard errors: false alarm 6e-5."""
    filters = module("_filters")
    model = filters.HMM.random(8, num_states=3, num_symbols=3)
    ratios = (filters.evidences(model, 16, 4000, 0) - model.log_evidence).exp()
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("name", ["ours", "bare torch loop", "Pyro"])
def test_all_filters_estimate_the_same_evidence(name):
    """One run of 4,096 particles, whose standard deviation is below .05, within .25 nats."""
    filters = module("_filters")
    model = filters.HMM.random(20)
    one = filters.pyro_evidence if name == "Pyro" else filters.filters()[name]
    assert one(model, 4096, 0) == pytest.approx(model.log_evidence, abs=0.25)


@pytest.mark.skipif(
    importlib.util.find_spec("particles") is None, reason="particles is not installed"
)
def test_particles_filters_the_same_model():
    filters = module("_filters")
    model = filters.HMM.random(20)
    assert filters.by_particles(model, 4096, 0) == pytest.approx(model.log_evidence, abs=0.25)


# The engine above a trivial network.


def test_every_method_is_measured():
    free = {name for name, cls in methods().items() if cls.needs.any_target}
    assert free < set(module("engine").runners())


def test_rows_of_a_method(monkeypatch):
    engine = module("engine")
    monkeypatch.setattr(engine, "SIZE", 6)
    chosen = {"smc, no twist": engine.runners()["smc, no twist"]}
    monkeypatch.setattr(engine, "runners", lambda: chosen)
    rows = list(engine.measure_methods(1))
    found = {(row.name, row.coordinates["method"]): row for row in rows}
    names = ("engine_over_chain", "host_reads_per_step", "operations_per_step")
    assert set(found) == {
        (name, method) for name in names for method in ("bare chain.sample", "smc, no twist")
    }
    assert found["engine_over_chain", "bare chain.sample"].value == 1
    assert found["engine_over_chain", "smc, no twist"].goal == 3
    assert found["host_reads_per_step", "smc, no twist"].goal == 1
    operations = found["operations_per_step", "smc, no twist"].value
    assert operations > found["host_reads_per_step", "smc, no twist"].value > 0


def test_rows_of_the_filters(monkeypatch):
    engine = module("engine")
    monkeypatch.setattr(engine, "NUM_PARTICLES", (8,))
    monkeypatch.setattr(engine, "FILTER_STEPS", 3)
    rows = list(engine.measure_filters(1, 2))
    assert {"time_per_step", "evidence_error", "smc_over_pyro", "smc_over_torch"} <= {
        row.name for row in rows
    }
    assert all(row.coordinates["num_particles"] == 8 and row.value > 0 for row in rows)


# Exponents.


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_an_exponent_is_found(power):
    sizes = [4, 8, 16, 64]
    costs = [0.3 * size**power for size in sizes]
    assert module("scaling").exponent(sizes, costs) == pytest.approx(power, abs=1e-12)


def test_constants_are_left_to_the_lower_half():
    scaling = module("scaling")
    sizes = [1, 2, 4, 8, 16]
    assert scaling.upper_half(sizes) == [4, 8, 16]
    for axis in scaling.AXES:
        assert axis.sizes(quick=True) == axis.sizes(quick=False)[-3:]
        assert axis.sizes(quick=False)[-1] == axis.largest


def test_rows_of_an_axis(monkeypatch):
    scaling = module("scaling")
    sizes = {"N": lambda size: (size / 1e3, size**2 / 1e6, 1)}
    monkeypatch.setattr(scaling, "in_own_process", lambda _, setting, n: sizes["N"](setting.N))
    axis = scaling.Axis("N", 64, scaling.Setting())
    rows = {row.name: row for row in scaling.measure_axis(axis, quick=True)}
    assert rows["exponent_memory"].value == pytest.approx(1)
    assert rows["exponent_time"].value == pytest.approx(2)
    assert rows["exponent_memory"].ok
    assert not rows["exponent_time"].ok
    assert rows["exponent_time"].coordinates["axis"] == "N"


@pytest.mark.parametrize("masked", [True, False])
def test_a_setting_runs(masked):
    module("scaling").Setting(N=3, L=4, T=2, V=5, masked=masked).run(0)


# The clock.


def test_parts_add_up_to_all():
    times = iter(range(100))
    clock = module("_clock").Clock("all", now=lambda: float(next(times)))
    inner = clock.timed(lambda: None, None, "network")
    outer = clock.timed(lambda: [inner(), inner()], "engine", "")
    outer()
    clock.stop()
    assert clock.seconds == {
        ("all", ""): 2,
        ("engine", ""): 3,
        ("engine", "network"): 2,
    }
    assert clock.total == next(times) - 1


def test_a_part_of_a_part_is_told_apart_there_only():
    clock = module("_clock").Clock("all")
    product = clock.timed(lambda: clock.part, None, "network", "rotation")
    rotation = clock.timed(lambda: product(), None, "rotation", "network")
    assert product() == ("all", "")
    assert clock.timed(rotation, None, "network")() == ("all", "network")
    assert rotation() == ("all", "")


def test_everything_that_is_profiled_exists():
    from contextlib import ExitStack

    from ppl_diffusion.designs import run

    profile, clock = module("profile"), module("_clock").Clock("all")
    own = run.infer
    with ExitStack() as stack:
        profile.watch(clock, stack)
        assert run.infer is not own
    assert run.infer is own


def test_shares_add_up():
    profile, clock = module("profile"), module("_clock").Clock("all")
    clock.seconds.update({("engine", ""): 1.0, ("engine", "network"): 4.0})
    clock.seconds.update({("engine", "rotation"): 2.0, ("plots", ""): 1.0})
    rows = list(profile.shares(clock))
    share = {row.coordinates["part"]: row.value for row in rows if row.name == "share"}
    assert share == {"network": 0.75, "rotation": 0.25, "engine": 0.125, "plots": 0.125}
    phases = {r.coordinates["phase"]: r.value for r in rows if r.name == "phase_share"}
    assert phases == {"engine": 0.875, "plots": 0.125}


# Before and after.


def test_both_trees_know_all_cases():
    against, cases = module("against"), module("_against_cases")
    asked = {case.named(quick) for case in against.CASES for quick in (False, True)}
    assert asked - {None} <= set(cases.BUILD)


def test_a_case_answers():
    cases = module("_against_cases")
    made = {"small": cases.steering(cases.trivial_chain(4, 3, 4), cases.share_of_fourths, 5, None)}
    found = cases.answer({"case": "small", "seed": 0}, made)
    assert found["seconds"] > 0
    assert math.isfinite(found["evidence"])


def test_an_unknown_commit_is_no_crash(tmp_path):
    against = module("against")
    with pytest.raises(against.NoHistory, match="clone the repository with its history"):
        against.check_out("no-such-commit", tmp_path)


def test_no_history_ends_in_a_sentence(tmp_path, monkeypatch, capsys):
    against = module("against")
    monkeypatch.setattr(against, "ROOT", tmp_path)
    against.main(commit="4700c97", quick=True, json_file=tmp_path / "rows.json")
    assert "cannot be compared with" in capsys.readouterr().out
    assert (tmp_path / "rows.json").read_text().strip() == "[]"


def test_a_commit_is_laid_out_like_the_installed_package(tmp_path):
    against = module("against")
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no history")
    tree = against.check_out("HEAD", tmp_path)
    for name in ("models", "inference", "smc"):
        assert (tree / "ppl_diffusion" / name / "__init__.py").exists()


def test_what_follows_from_several_cases():
    against = module("against")
    slow, fast = [{"seconds": 6.0, "evidence": 0.0}], [{"seconds": 2.0, "evidence": 0.0}]
    answers = {case.name: {"before": slow, "after": fast} for case in against.CASES}
    answers["chain.sample"] = {"before": fast, "after": fast}
    rows = [r for r in against.derived(answers) if r.name == "engine_over_chain"]
    assert {(r.coordinates["tree"], r.value) for r in rows} == {("before", 3.0), ("after", 1.0)}
    assert all((row.goal is None) == (row.coordinates["tree"] == "before") for row in rows)


def test_a_goal_is_a_share_of_the_time_before():
    against = module("against")
    answers = {
        "before": [{"seconds": s, "evidence": 1.5} for s in (4.0, 5.0, 9.0)],
        "after": [{"seconds": s, "evidence": 1.5} for s in (1.0, 2.0, 3.0)],
    }
    row = against.timed(against.Case("c", 0.3), "c", answers)
    assert row.value == pytest.approx(0.4)
    assert not row.ok
    assert row.flat()["evidence_before"] == row.flat()["evidence_after"] == 1.5
    assert against.timed(against.Case("c", 0.3), "c, quick", answers).goal is None


def test_a_round_is_a_step_that_reveals_something():
    against = module("against")
    assert against.expected_rounds(2, 2) == 1.5
    assert against.expected_rounds(1024, 64) == pytest.approx(62.07, abs=0.01)
    took = {"chain.sample": 1.0, "engine, argmax, T=256": 1.5, "engine, argmax, T=1,024": 1.8}
    answers = {}
    for case in against.CASES:
        told = [{"seconds": took.get(case.name, 1.0)}]
        answers[case.name] = {"before": told, "after": told}
    rows = [row for row in against.derived(answers) if "num_steps" in row.coordinates]
    after = {(row.name, row.coordinates["num_steps"]): row for row in rows[4:]}
    assert after["time_over_t64", 1024].value == pytest.approx(1.8)
    assert after["time_over_t64", 1024].goal is None
    per_round = after["time_per_round_over_t64", 1024]
    assert per_round.value == pytest.approx(1.8 * 40.64 / 62.07, abs=0.001)
    assert per_round.goal == 1.2


# Fills.


def test_each_case_of_fills_is_told_as_it_ends(monkeypatch, capsys):
    fills = module("fills")
    assert all(case.time_goal is case.memory_goal is None for case in fills.QUICK)
    told = []

    def compare(case, repeats):
        told.append(capsys.readouterr().out)
        where = {"case": case.name, "plain_seconds": 2.0, "seconds": 1.0}
        return [module("_report").Row("fill_time", 0.5, "of plain", repeats, None, where)]

    monkeypatch.setattr(fills, "compare", compare)
    rows = fills.measure(True, module("_report").console())
    assert len(rows) == len(fills.QUICK)
    assert told[0] == ""
    for case, line in zip(fills.QUICK, told[1:], strict=False):
        assert line == f"{case.name}: fill_time 0.500 of plain\n"


def test_the_page_of_benchmarks_names_each_command():
    page = (Path(ROOT) / "docs" / "benchmarks.md").read_text()
    commands = [path.stem for path in (Path(ROOT) / "benchmarks").glob("[a-z]*.py")]
    assert [name for name in sorted(commands) if f"| `{name}` |" not in page] == []
