"""The posteriors of the PBM benchmark are exact, and its rows say what the methods did.

Generated landscapes have the layout of the measured one, with words of 4 bases instead of 8.
"""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from bench import module
from typer.testing import CliRunner

from ppl_diffusion.smc import ArgmaxFill
from ppl_diffusion.testing import state_index

FACTORS = ("SIX6", "PAX6", "PAX3")
LENGTH = 4


def other_strand(word):
    return tuple(3 - base for base in reversed(word))


def one_strand():
    """One strand of every word, in alphabetical order, as the measured table has it."""
    every = itertools.product(range(4), repeat=LENGTH)
    return np.array([word for word in every if word <= other_strand(word)], dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    words, rng = one_strand(), np.random.default_rng(0)
    scores = rng.integers(-1500, 1500, (len(words), len(FACTORS))).astype(np.int16)
    save(tmp_path, kmer=words, escore_x1e4=scores, tf=np.array([f.encode() for f in FACTORS]))
    return tmp_path


def save(folder, **arrays):
    (folder / "dna").mkdir(exist_ok=True)
    np.savez(folder / "dna" / "pbm_8mer_escores.npz", **arrays)


@pytest.fixture
def landscape(folder):
    problem = module("_pbm_problem")
    return problem.Landscape.load(problem.find_data(folder))


@pytest.fixture
def problem(landscape):
    return module("pbm").make_problems(landscape)[0]


def brute_force(problem):
    """Return prior and potential of every word by loops over a Markov chain."""
    counts = torch.tensor(module("_pbm_problem").DINUCLEOTIDES, dtype=torch.float64)
    move = counts / counts.sum(1, keepdim=True)
    eigenvalue, vectors = torch.linalg.eig(move.T)
    start = vectors[:, eigenvalue.real.argmax()].real
    start = start / start.sum()
    prior, potential = {}, {}
    for index, word in enumerate(itertools.product(range(4), repeat=LENGTH)):
        steps = [move[a, b] for a, b in itertools.pairwise(word)]
        prior[word] = float(start[word[0]] * math.prod(steps))
        potential[word] = math.exp(float(problem.log_g[index]))
    return prior, potential


def test_both_strands_have_the_score_of_the_row(folder, landscape):
    with np.load(folder / "dna" / "pbm_8mer_escores.npz") as file:
        row = 37
        word, score = tuple(int(base) for base in file["kmer"][row]), file["escore_x1e4"][row]
    for strand in (word, other_strand(word)):
        code = sum(base * 4 ** (LENGTH - 1 - place) for place, base in enumerate(strand))
        for factor, expected in zip(FACTORS, score, strict=True):
            assert float(landscape.factor(factor)[code]) == pytest.approx(expected / 1e4)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_posteriors_agree_with_loops(problem, power):
    prior, potential = brute_force(problem)
    given = replace(problem, power=power)
    joint = {word: p**power * potential[word] for word, p in prior.items()}
    z = sum(joint.values())
    assert given.log_z == pytest.approx(math.log(z), abs=1e-12)
    share = sum(weight for word, weight in joint.items() if word[2] == 1) / z
    assert float(given.marginals[2, 1]) == pytest.approx(share, abs=1e-12)
    mean = sum(weight * math.log(potential[word]) for word, weight in joint.items()) / z
    assert given.mean(given.log_g) == pytest.approx(mean, abs=1e-12)


def test_share_of_useful_draws_agrees_with_loops(problem):
    prior, potential = brute_force(problem)
    first, second = (sum(p * potential[w] ** n for w, p in prior.items()) for n in (1, 2))
    assert problem.importance_ess == pytest.approx(first**2 / second, rel=1e-12)


def test_the_exact_twist_sums_over_completions(problem):
    prior, potential = brute_force(problem)
    for state in ((4, 2, 4, 0), (4, 4, 4, 4), (1, 3, 0, 2)):
        ends = [w for w in prior if all(a in (4, b) for a, b in zip(state, w, strict=True))]
        mean = sum(prior[w] * potential[w] for w in ends) / sum(prior[w] for w in ends)
        found = problem.exact_twist({"tokens": torch.tensor([[state]])}, 0)
        assert float(found) == pytest.approx(math.log(mean), abs=1e-12)


def test_intervals_are_about_equally_likely(problem):
    """Words of one potential stay together, so that an interval is off by one such level."""
    mass = torch.zeros(16, dtype=torch.float64).index_add(0, problem.bins, problem.law)
    level = problem.log_g.unique(return_inverse=True)[1]
    largest = (
        torch.zeros(len(mass) ** 2, dtype=torch.float64).index_add(0, level, problem.law).max()
    )
    assert 0 < float((mass - 1 / 16).abs().max()) < float(largest)
    low, high = (problem.log_g[problem.bins == side] for side in (0, 15))
    assert float(low.max()) < float(high.min())


def test_distances_vanish_for_the_posterior_and_see_the_prior(problem, generator):
    """Exact draws: 4 times the expected distance of 20,000, which is below 0.02."""
    exact = problem.draw(20_000, generator)
    prior = problem.chain.x0(problem.chain.sample((20_000,), generator=generator))
    for distance in (problem.marginal_distance, problem.bin_distance):
        assert distance(exact) < 0.02
        assert distance(prior) > 2 * distance(exact) + 0.02


def test_exact_paths_reveal_one_position_at_a_time(problem, generator):
    paths = problem.draw_paths(50, generator)
    masked = paths == 4
    assert bool(masked[:, 0].all())
    assert bool((masked.sum(-1) == torch.arange(LENGTH, -1, -1)).all())
    kept = ~masked[:, :-1]
    assert bool((paths[:, 1:][kept] == paths[:, :-1][kept]).all())
    assert len({tuple(order) for order in masked.sum(1).tolist()}) > 10


def test_methods_are_unbiased_and_the_exact_twist_is_exact(problem):
    """Each mean evidence within 4.5 standard errors, 15 methods: false alarm 1e-4.

    The potential is bounded within 6 nats, so that 600 runs have a normal mean.
    """
    methods = module("_pbm_methods")
    for method in methods.METHODS:
        outcome = methods.run_method(problem, method, 8, 600)
        if not outcome.exact:
            assert method.name.split(",")[0] in ("best-of-n", "beam", "svdd argmax", "svdd soft")
            continue
        errors = module("pbm").evidence_errors(outcome.log_evidence - problem.log_z)
        if method.name == "exact twist":
            assert errors["rmse_log_z"] < 1e-9
            continue
        assert errors["rmse_log_z"] > 0.02, method.name
        assert abs(errors["z_ratio"] - 1) < 4.5 * errors["z_ratio_se"], method.name


def test_correctors_target_the_squared_prior(landscape):
    """The mean evidence within 4.5 standard errors of its own target: false alarm 1e-5."""
    methods, squared = module("_pbm_methods"), module("pbm").make_problems(landscape)[2]
    assert [m.name for m in methods.methods_of(squared)] == [
        "corrector, argmax",
        "corrector, clamped persistent",
    ]
    for method in methods.methods_of(squared):
        outcome = methods.run_method(squared, method, 8, 600)
        errors = module("pbm").evidence_errors(outcome.log_evidence - squared.log_z)
        assert abs(errors["z_ratio"] - 1) < 4.5 * errors["z_ratio_se"], method.name
        plain = replace(squared, power=1.0)
        errors = module("pbm").evidence_errors(outcome.log_evidence - plain.log_z)
        assert abs(errors["z_ratio"] - 1) > 9 * errors["z_ratio_se"], method.name


def test_outcomes_keep_weights_and_draws_with_their_words(problem):
    methods, code = module("_pbm_methods"), state_index
    method = next(m for m in methods.METHODS if m.name == "importance")
    outcome = methods.run_method(problem, method, 6, 20)
    log_g = problem.log_g[outcome.codes]
    torch.testing.assert_close(outcome.weights, torch.softmax(log_g, -1))
    torch.testing.assert_close(
        outcome.means(problem.log_g), (torch.softmax(log_g, -1) * log_g).sum(-1)
    )
    assert bool((outcome.codes == code(outcome.draws, 4)[:, None]).any(-1).all())


def test_problems_share_their_random_numbers(landscape):
    pbm, methods = module("pbm"), module("_pbm_methods")
    method = next(m for m in methods.METHODS if m.name == "importance")
    first, second = (
        methods.run_method(pbm.trade_off(landscape, weight), method, 4, 50) for weight in (0, 1)
    )
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.weights, second.weights)


def test_spread_of_common_random_numbers(generator):
    """A ratio of spreads over 4,000 values is within 0.05 of 1, 4 standard errors."""
    share = module("pbm")._common_share
    first, second = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    assert share(first, first + 0.5) == pytest.approx(0, abs=1e-12)
    assert share(first, second) == pytest.approx(1, abs=0.05)


def test_a_fill_cannot_be_wrong_about_a_constant(problem):
    error = module("_pbm_methods").twist_error
    assert error(replace(problem, log_g=torch.full_like(problem.log_g, 2.0)), ArgmaxFill()) < 1e-12
    assert error(problem, ArgmaxFill()) > 0.3


def test_errors_of_the_evidence_by_hand():
    found = module("pbm").evidence_errors(torch.tensor([math.log(2.0), 0.0], dtype=torch.float64))
    assert found["rmse_log_z"] == pytest.approx(math.log(2) / math.sqrt(2))
    assert found["bias_log_z"] == pytest.approx(math.log(2) / 2)
    assert found["z_ratio"] == pytest.approx(1.5)
    assert found["z_ratio_se"] == pytest.approx(0.5)


def invoke(*arguments, data=None):
    app = typer.Typer()
    app.command()(module("pbm").main)
    return CliRunner().invoke(app, arguments, env={"PPL_DIFFUSION_DATA": data})


@pytest.fixture
def rows(folder, tmp_path, monkeypatch):
    """The rows of a small run of the command, which is also asked for its tables."""
    pbm, out = module("pbm"), tmp_path / "rows.json"
    monkeypatch.setattr(pbm, "QUICK", pbm.Plan((4,), 10))
    for count in ("GAP_RUNS", "COST_RUNS"):
        monkeypatch.setattr(module("_pbm_methods"), count, 2)
    result = invoke("--quick", "--json", str(out), data=str(folder))
    assert result.exit_code == 0, result.output
    for words in ("bind SIX6: log G", "bind PAX6, not PAX3", "under the prior squared"):
        assert words in result.stdout
    return json.loads(out.read_text(encoding="utf-8"))


def test_rows(rows):
    pbm = module("pbm")
    methods = [row for row in rows if row["name"] == "pbm" and row["method"] != "exact draws"]
    assert len(methods) == 18 + 18 + 2
    for row in methods:
        assert ("rmse_log_z" in row) == row["exact"]
        assert row["evaluations"] > 0
        assert row["potential_calls"] > 0
        if row["method"] != "tempering":  # which is allowed to cost more
            assert row["evaluations"] <= row["rows_requested"]
    gaps = {row["method"] for row in methods if "two_sided_gap" in row}
    steered = {f"difference, {twist}" for twist in ("argmax", "defensive", "persistent")}
    assert gaps == {"importance"} | steered
    grid = [row for row in rows if row["name"] == "pbm_trade_off"]
    assert [row["weight"] for row in grid] == [*pbm.GRID, *pbm.GRID]
    assert [row["common_numbers_share"] is None for row in grid[:5]] == [True] + [False] * 4


def test_the_file_may_be_named(folder):
    problem = module("_pbm_problem")
    assert problem.find_data(folder / problem.FILE) == problem.find_data(folder)


def refusal(*arguments, data=None):
    result = invoke(*arguments, data=data)
    assert result.exit_code == 2
    return result.stderr


def test_refusals_are_one_sentence(folder, tmp_path):
    assert refusal() == (
        "benchmarks.pbm needs the measured 8-mers, which are not shipped: give --data the file "
        "pbm_8mer_escores.npz or the folder with dna/pbm_8mer_escores.npz, or set "
        "PPL_DIFFUSION_DATA to that folder.\n"
    )
    absent = tmp_path / "absent.npz"
    assert refusal("--data", str(absent)) == (
        f"benchmarks.pbm: there is no file {absent}; give --data the file pbm_8mer_escores.npz or "
        "the folder with dna/pbm_8mer_escores.npz.\n"
    )
    assert "make it first" in refusal("--json", str(absent / "rows.json"), data=str(folder))


def test_broken_tables_are_refused(folder):
    words = one_strand()
    names = np.array([name.encode() for name in FACTORS])
    scores = np.zeros((len(words), 3), dtype=np.int16)
    save(folder, kmer=words[1:], escore_x1e4=scores[1:], tf=names)
    assert "leaves 2 of 256 sequences without a score" in refusal(data=str(folder))
    save(folder, kmer=words, escore_x1e4=scores, tf=np.array([b"SIX6", b"PAX6", b"CRX"]))
    assert "no factor 'PAX3', only SIX6, PAX6, CRX" in refusal(data=str(folder))
    save(folder, kmer=words, tf=names)
    assert "is no table of E-scores" in refusal(data=str(folder))
    (folder / "dna" / "pbm_8mer_escores.npz").write_text("nothing", encoding="utf-8")
    assert "is no table of E-scores" in refusal(data=str(folder))


@pytest.mark.data
def test_the_measured_table():
    """Numbers printed when the benchmark was written, from the file's 65,536 words."""
    problem, data = module("_pbm_problem"), os.environ.get("PPL_DIFFUSION_DATA")
    if not data or not (Path(data) / problem.FILE).is_file():
        pytest.skip("needs PPL_DIFFUSION_DATA, the folder with dna/pbm_8mer_escores.npz")
    measured = problem.Landscape.load(problem.find_data(Path(data)))
    assert (measured.length, len(measured.scores)) == (8, 20)
    one, both, squared = module("pbm").make_problems(measured)
    assert one.log_z == pytest.approx(5.094680762, abs=1e-8)
    assert float(one.law.sum()) == pytest.approx(1, abs=1e-12)
    assert one.importance_ess == pytest.approx(0.0305, abs=1e-4)
    assert both.log_z == pytest.approx(2.918, abs=1e-3)
    assert both.importance_ess == pytest.approx(0.0029, abs=1e-4)
    assert squared.log_z == pytest.approx(-5.543, abs=1e-3)
    method = next(m for m in module("_pbm_methods").METHODS if m.name == "exact twist")
    outcome = module("_pbm_methods").run_method(both, method, 8, 50)
    assert float((outcome.log_evidence - both.log_z).abs().max()) < 1e-9
