"""The summary of a posterior: exact figures on hand-made runs, and JSON through and through."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from ppl_diffusion.diagnostics import khat, summary, summary_table
from ppl_diffusion.diagnostics.report import pooled_root_ancestors, root_ancestors


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.fixture
def two_runs(make_posterior):
    return replace(
        make_posterior(runs=2, particles=4, steps=3),
        x0=torch.tensor([[[0, 1], [0, 1], [1, 1], [3, 3]], [[0, 1], [2, 2], [2, 2], [2, 2]]]),
        log_weights=logs([0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]),
        log_evidence=logs([1.0, 3.0])[0],
        evidence_variance=torch.tensor([0.2, 0.4], dtype=torch.float64),
        eve=torch.tensor([[0, 0, 2, 3], [1, 1, 1, 1]]),
    )


def render(posterior):
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(posterior))
    return console.file.getvalue()


def test_summary_pools_the_evidence_without_bias(two_runs):
    facts = summary(two_runs)
    assert facts["log_evidence"] == pytest.approx(np.log(2))
    assert facts["log_evidence_sd"] == pytest.approx(np.log(3) / np.sqrt(2))
    low, high = facts["log_evidence_interval"]
    assert low < np.log(2) < high
    assert high - low > 17  # two runs know next to nothing: Student's t of one degree
    assert facts["log_evidence_bound"] is None
    # mean of Z^2 V over (mean of Z)^2: (0.2 + 3.6) / 2 / 4
    assert facts["genealogical_sd"] == pytest.approx(np.sqrt(0.475))
    assert facts["log_evidence_per_run"] == pytest.approx([0.0, np.log(3)])


def test_summary_counts_what_carries_weight(two_runs):
    facts = summary(two_runs)
    assert facts["num_unique_x0"] == 3
    assert facts["num_eves_per_run"] == [2, 1]
    assert facts["ess_per_run"] == pytest.approx([1 / 0.375, 4.0])
    pooled = np.r_[0.5, 0.25, 0.25, 0, [0.75] * 4] / 4
    assert facts["ess"] == pytest.approx(1 / (pooled**2).sum())


def test_summary_states_cost_and_claim(two_runs):
    facts = summary(replace(two_runs, law=two_runs.law.but(exact=False)))
    assert (facts["exact"], facts["target"]) == (False, str(two_runs.law.but(exact=False)))
    assert facts["target"].startswith("approximately p(path) * G(x0) of the 3-step reverse chain")
    assert (facts["num_evaluations"], facts["num_potential_calls"]) == (1200, 340)
    assert (facts["num_runs"], facts["num_particles"], facts["num_steps"]) == (2, 4, 3)


def test_summary_has_the_khat_of_all_particles(make_posterior):
    posterior = make_posterior(particles=100)
    facts = summary(posterior)
    assert facts["khat"] == khat(posterior.pooled_log_weights.reshape(1, -1))[0]
    assert facts["khat_per_run"] == list(khat(posterior.log_weights))


def test_summary_of_a_tree_that_tells_nothing(two_runs):
    variance = torch.tensor([0.2, torch.nan], dtype=torch.float64)
    silent = replace(two_runs, evidence_variance=variance)
    assert summary(silent)["genealogical_sd"] is None
    assert "not available" in render(silent)


def test_summary_counts_roots_by_their_weight(two_runs):
    # Shares .75 and .25 of two roots, and one root that holds all.
    expected = [1 / (0.75**2 + 0.25**2), 1.0]
    assert summary(two_runs)["root_ancestors_per_run"] == pytest.approx(expected)


def test_summary_says_what_is_wrong(two_runs):
    facts = summary(two_runs)
    assert facts["warnings"] == list(two_runs.warnings) != []
    for sentence in facts["warnings"]:
        assert sentence[:40] in render(two_runs)


def test_summary_counts_dead_runs_as_zero(make_posterior):
    posterior = make_posterior(runs=2, dead=[1])
    facts = summary(posterior)
    assert facts["num_dead_runs"] == 1
    assert facts["log_evidence"] == pytest.approx(float(posterior.log_evidence[0]) - np.log(2))
    assert facts["log_evidence_interval"] is None
    assert facts["log_evidence_bound"] == pytest.approx(facts["log_evidence"] - np.log(20))
    assert facts["log_evidence_per_run"][1] is None
    assert (facts["ess_per_run"][1], facts["num_eves_per_run"][1]) == (0.0, 0)


def test_summary_of_nothing_but_dead_runs_still_reports(make_posterior):
    facts = summary(make_posterior(dead=[0, 1, 2]))
    assert facts["log_evidence"] is facts["log_evidence_interval"] is facts["khat"] is None
    assert (facts["ess"], facts["num_unique_x0"], facts["num_dead_runs"]) == (0.0, 0, 3)


@pytest.mark.parametrize("dead", [[], [0], [0, 1, 2]])
def test_summary_is_json(make_posterior, dead):
    facts = summary(make_posterior(dead=dead))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_summary_counts_plated_sequences_as_one(make_posterior):
    posterior = make_posterior(plates=(2,))
    together = posterior.x0.reshape(3 * 40, -1).unique(dim=0)
    assert summary(posterior)["num_unique_x0"] == len(together)


def test_table_shows_the_figures(two_runs):
    text = render(two_runs)
    for expected in ("0.6931 [-", "0.6892", "3 of 8", "1 to 1.6", "1,200", "exact for"):
        assert expected in text


def test_table_reports_what_is_missing(make_posterior):
    text = render(make_posterior(dead=[0, 1, 2], particles=4))
    for expected in ("3 runs dead", "-inf (every run is dead)", "not available"):
        assert expected in text
    assert "(one run)" in render(make_posterior(runs=1))


def test_table_prints_a_target_with_brackets_as_it_stands(make_posterior):
    posterior = make_posterior()
    law = posterior.law.but(product="the law of x[0] [bold]")
    assert "law of x[0] [bold]" in render(replace(posterior, law=law))


def test_of_refined_results_no_effective_sample_size_is_known(two_runs):
    """Their states are correlated, and count alike."""
    refined = replace(two_runs, settings={"method": "refinement"})
    facts = summary(refined)
    assert (facts["ess"], facts["ess_per_run"]) == (None, [None, None])
    lines = [
        x
        for x in render(refined).splitlines()
        if "effective sample size" in x or "per run, lo" in x
    ]
    assert all("not available" in line for line in lines[:2])


def test_roots_of_all_runs_are_counted_by_weight(two_runs):
    """Two runs that share no root, weighed by evidence."""
    share = (two_runs.log_evidence - two_runs.log_evidence.logsumexp(0)).exp().numpy()
    each = np.array(root_ancestors(two_runs))
    assert pooled_root_ancestors(two_runs) == pytest.approx(1 / (share**2 / each).sum())
