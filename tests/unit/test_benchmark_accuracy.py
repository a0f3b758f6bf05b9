"""The accuracy benchmark: its exact answers, its bounds from both sides, its rows and tables.

Means are compared at four standard errors (false alarm 6e-5 each, about 1e-3 for the file, once, at
the fixed seeds), laws by Pearson's test at p > 1e-4.
"""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench import module
from rich.console import Console

from ppl_diffusion.inference import CFG, Power
from ppl_diffusion.testing import ExactChain, PathLaw, all_states, z_score
from ppl_diffusion.testing.dense import state_matrix

MAX_Z = 4.0
pytestmark = pytest.mark.filterwarnings("ignore:twist='sample'")


def short(length=3, name="B0"):
    return replace(module("_problems").Problem.load(name), length=length)


def mean_of_evidence(log_evidence, log_z):
    return z_score((log_evidence - log_z).exp(), 1.0)


# --- laws of paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["masked", "uniform"])
def test_a_chain_without_powers_has_its_own_law(noise):
    paths, problem = module("_paths"), short()
    chain = problem.chain(4) if noise == "masked" else problem.uniform_chain(4)
    exact = ExactChain.of(chain)
    for target in (
        paths.chain_target(chain, problem.log_potential),
        paths.power_target([(chain, 1.0)], problem.log_potential),
    ):
        assert target.log_z == pytest.approx(
            math.log(exact.evidence(problem.log_potential)), abs=1e-12
        )
        torch.testing.assert_close(
            target.x0_law(), exact.posterior(problem.log_potential), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("noise", ["masked", "uniform"])
@pytest.mark.parametrize("exponents", [(2.0,), (0.5,), (2.0, -1.0)])
def test_powers_are_those_of_whole_matrices(noise, exponents):
    """``m**B prod (prod_m K_m**b_m) q**(1 - B)`` with kernels as matrices over all states."""
    cases, paths = module("_cases"), module("_paths")
    problems = [short(2), cases.other(short(2))][: len(exponents)]
    chains = [p.chain(3) if noise == "masked" else p.uniform_chain(3) for p in problems]
    kernel, order = chains[0].kernel, sum(exponents)
    prior = torch.as_tensor(kernel.process.prior)
    weight = torch.kron(prior, prior) ** order
    for k in range(3):
        keep = float(kernel.alphas[k] / kernel.alphas[k + 1])
        site = keep * torch.eye(len(prior), dtype=torch.float64) + (1 - keep) * prior
        forward = torch.kron(site, site).T  # q(x | x'), by row x and column x'
        step = torch.where(forward > 0, forward, 1.0) ** (1 - order)
        for chain, exponent in zip(chains, exponents, strict=True):
            matrix = state_matrix(chain.kernel, k, 2)
            step = torch.where(matrix > 0, step * matrix.clamp_min(1e-300) ** exponent, 0.0)
        weight = weight @ step
    clean = (all_states(len(prior), 2) < 3).all(-1)
    target = paths.power_target(list(zip(chains, exponents, strict=True)))
    assert target.log_z == pytest.approx(float(weight[clean].sum().log()), abs=1e-11)
    expected = weight[clean] / weight[clean].sum()
    torch.testing.assert_close(target.x0_law(), expected, rtol=0, atol=1e-11)


def test_drawn_paths_follow_the_law():
    paths, problem = module("_paths"), short(2)
    chain, generator = problem.chain(3), torch.Generator().manual_seed(0)
    law = PathLaw.of(chain, problem.log_potential)
    target = paths.power_target([(chain, 1.0)], problem.log_potential)
    assert law.p_value(target.draw(4000, generator)) > 1e-4
    untilted = paths.power_target([(chain, 1.0)])  # the test sees another law
    assert law.p_value(untilted.draw(4000, generator)) < 1e-4


def test_ordered_paths_follow_the_law():
    paths, problem = module("_paths"), short()
    generator = torch.Generator().manual_seed(0)
    chain = paths.ordered(problem.chain(1))
    drawn = paths.ordered_paths(problem.posterior.draw(4000, generator), 3, generator)
    assert PathLaw.of(chain, problem.log_potential).p_value(drawn) > 1e-4


def test_a_short_grid_agrees_with_following_reveals():
    problems, paths, problem = module("_problems"), module("_paths"), short()
    target = paths.power_target([(problem.chain(6), 1.0)])
    torch.testing.assert_close(
        target.x0_law(), problems.chain_table(problem, 6), rtol=0, atol=1e-13
    )


# --- cases ---------------------------------------------------------------------------------------


def test_means_are_slopes_of_the_evidence():
    case = module("_cases").ordered_case("B0")
    x0 = all_states(3, 5)
    expected = [float(f(x0) @ case.ideal.table) for f in (case.log_potential, case.log_prior)]
    assert case.means == pytest.approx(expected, abs=1e-6)
    assert case.means == pytest.approx((3.60, -4.66), abs=0.01)  # as published


@pytest.mark.parametrize("steps", [None, 3])
def test_compositions_have_the_evidence_that_is_estimated(steps):
    cases, methods = module("_cases"), module("_methods")
    both = [short(), cases.other(short())]
    case = cases.composed_case("B3", "p1^2 p2^-1", lambda a, b: CFG(a, b, 2.0), both, steps)
    method = methods.PATH if steps else methods.LOCKSTEP
    post = method.build(case, 8, 3000).run(seed=0)
    assert abs(mean_of_evidence(post.log_evidence, case.log_z_declared)) < MAX_Z
    histogram = case.histogram(post.x0.flatten(0, 1), post.weights.flatten())
    assert case.distance(histogram) < 0.1
    if steps:  # the chain's own law is another
        assert abs(case.log_z_declared - case.ideal.log_z) > 0.01


def test_wrong_denoisers_have_an_evidence_of_their_own():
    """M18: the estimate is that of the wrong chain, not of the right one."""
    cases, methods = module("_cases"), module("_methods")
    case = cases.perturbed_case(noise=1.0)
    state = torch.tensor([[3, 1, 3, 3, 0]])
    log_d = case.chain.kernel.denoiser(state, 0.5)
    torch.testing.assert_close(log_d.exp().sum(-1), torch.ones(1, 5, dtype=torch.float64))
    post = methods.CLAMPED_SAMPLE[1].build(case, 16, 2000).run(seed=0)
    assert abs(mean_of_evidence(post.log_evidence, case.log_z_declared)) < MAX_Z
    assert abs(mean_of_evidence(post.log_evidence, case.ideal.log_z)) > MAX_Z


@pytest.mark.parametrize("name", ["B0", "B1"])
def test_noise_is_what_exact_draws_leave(name):
    """Half the distance of two halves is the distance of the whole, but for 30 %."""
    case = module("_cases").ordered_case(name)
    draws = case.reference.draw(4000, torch.Generator().manual_seed(0))
    even, odd = (case.histogram(part) for part in (draws[::2], draws[1::2]))
    floor = module("_cases").tv_of(even, odd) / 2
    assert floor == pytest.approx(case.distance(even + odd), rel=0.3)
    assert floor == pytest.approx(case.floor(4000), rel=0.3)


# --- both sides ----------------------------------------------------------------------------------


def tilted_case(kind):
    cases, problem = module("_cases"), short()
    if kind == "uniform":
        chain = problem.uniform_chain(3)
        law = module("_paths").power_target([(chain, 1.0)], problem.log_potential)
    else:
        chain = module("_paths").ordered(problem.chain(1))
        law = module("_paths").chain_target(chain, problem.log_potential)
    potential, prior = problem.log_potential, problem.log_prior
    ideal = problem.posterior
    return cases.Case("B0", "", kind, chain, potential, prior, ideal, law.log_z, None, law.draw)


def composed(steps):
    cases = module("_cases")
    return cases.composed_case("B2", "p^2", lambda c: Power(c, 2.0), [short()], steps)


HELD = {
    "importance": ("ordered", lambda m: m.IMPORTANCE),
    "difference": ("ordered", lambda m: m.PERSISTENT_4),
    "max": ("ordered", lambda m: m.MAX_AND_SUM[0]),
    "children": ("ordered", lambda m: m.SVDD[2]),
    "clamped": ("ordered", lambda m: m.CLAMPED_SAMPLE[0]),
    "surprise": ("ordered", lambda m: m.SURPRISE),
    "reweighted": ("uniform", lambda m: m.REWEIGHTED),
    "lockstep": (None, lambda m: m.LOCKSTEP),
    "order": (None, lambda m: m.LOCKSTEP),
    "path": (3, lambda m: m.PATH),
}


def bounds_of(kind, **changes):
    where, choose = HELD[kind]
    case = tilted_case(where) if isinstance(where, str) else composed(where)
    case = replace(case, **changes)
    method, generator = choose(module("_methods")), torch.Generator().manual_seed(0)
    # The retained particle weighs most among few; an order of reveals shows among many.
    size = 8 if kind in ("children", "order") else 2
    program = method.build(case, size, 6000)
    return case, module("_two_sided").two_sided(program, case, 6000, generator)


@pytest.mark.parametrize("kind", HELD)
def test_conditional_runs_have_the_inverse_evidence(kind):
    """``E[1 / Z_hat] = 1 / Z`` around exact draws, and ``E[Z_hat] = Z`` without them."""
    case, bounds = bounds_of(kind)
    assert abs(mean_of_evidence(bounds.lower, case.log_z_declared)) < MAX_Z
    assert abs(mean_of_evidence(-bounds.upper, -case.log_z_declared)) < MAX_Z
    assert bounds.gap > 0


@pytest.mark.parametrize("kind", ["difference", "clamped", "children"])
def test_paths_of_another_law_are_seen(kind):
    """Failing twin: retained paths of the chain, not of its posterior."""
    paths, problem = module("_paths"), short()
    chain = paths.ordered(problem.chain(1))
    case, bounds = bounds_of(kind, draw_paths=paths.chain_target(chain).draw)
    assert abs(mean_of_evidence(-bounds.upper, -case.log_z_declared)) > MAX_Z


# --- rows and tables -----------------------------------------------------------------------------


def plan_of(case, *names, **options):
    plans, methods = module("_accuracy_plans"), module("_methods")
    chosen = tuple(m for m in methods.SHORT if m.name in names)
    settings = {"num_particles": (8,), "num_runs": 30, "num_costly": 20, "num_bounds": 10}
    return plans.Plan(case, chosen, **{**settings, **options})


def test_rows_are_what_outside_checks_read():
    accuracy, cases = module("accuracy"), module("_cases")
    names = ["best-of-n", "svdd-soft", "svdd-weighted-4", "sample-4", "surprise-exhaustive"]
    goals = {("rmse_log_z", "surprise-exhaustive", 8): 10.0}
    plan = plan_of(partial(cases.ordered_case, "B0"), *names, goals=goals)
    rows = [row.flat() for row in accuracy.measure_plan(plan)]
    json.dumps(rows, allow_nan=False)
    assert [row["method"] for row in rows] == ["exact draws", *names, names[-1]]
    for row in rows:
        assert {"name", "value", "unit", "n", "problem", "num_steps", "kernel", "tv"} <= row.keys()
        assert 0 < row["tv"] < 1
        assert 0 < row["tv_floor"] < 1
    for row in rows[1:6]:
        assert ("rmse_log_z" in row) == (row["method"] not in ("best-of-n", "svdd-soft"))
        assert row["exact"] == ("rmse_log_z" in row) == ("gap_log_z" in row)
        assert 0 < row["evaluations"] <= row["rows_requested"] == 8 * 5
        assert row["potential_calls"] >= 1
        assert row["mean_log_p"] < 0 < row["mean_potential"]
    assert [row["n"] for row in rows] == [30, 30, 30, 30, 30, 20, 20]
    goal = rows[-1]
    assert (goal["name"], goal["goal"], goal["ok"]) == ("rmse_log_z", 10.0, True)
    assert goal["value"] == rows[-2]["rmse_log_z"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_goal_belongs_to_a_row(quick):
    plans = module("_accuracy_plans")
    found, problems = [], set()
    for plan in plans.quick_plans() if quick else plans.full_plans():
        names = {method.name for method in plan.methods}
        mine = [key for key in plan.goals if key[1] in names and key[2] in plan.num_particles]
        found += mine
        fewest = min(plan.runs_of(method) for method in plan.methods)
        assert fewest >= 300
        problems.add(plan.case.args[0] if plan.case.args else plan.case.func.__name__)
    assert set(plans.SHORT_GOALS) | set(plans.ANNEALED_GOALS) <= set(found)
    assert len(found) == len(set(found)) == (4 if quick else 7)


def test_tables_fit_and_say_what_was_met():
    accuracy, tables = module("accuracy"), module("_accuracy_tables")
    goals = {("rmse_log_z", "argmax", 8): 1e-9}
    plan = plan_of(partial(module("_cases").grid_case, "B0", 3), "argmax", "beam", goals=goals)
    console, rows = Console(record=True, width=120), list(accuracy.measure_plan(plan))
    widest = {"num_particles": 64, "potential_calls": 122527.0, "seconds_per_run": 1.77682}
    widest |= {"mean_log_p": -42.75, "mean_potential": 13.85, "bias_log_z": -11.5}
    widest |= {"method": "clamped-persistent-16", "evaluations": 2485.0, "gap_log_z": 19.412}
    wide = replace(rows[1], coordinates={**rows[1].coordinates, **widest})
    tables.show([*rows, wide], console)
    text = console.export_text()
    assert "…" not in text
    assert "TV ideal" in text  # a coarse grid declares another law
    assert "beam *" in text  # a search has no law
    assert "argmax, N = 8: rmse_log_z" in text
    assert "missed" in text
