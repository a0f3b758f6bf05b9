"""Results side by side, on posteriors made by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ppl_diffusion.commands.tables import comparison_tables
from ppl_diffusion.diagnostics import (
    Contender,
    compare,
    plot_comparison,
    plot_comparison_data,
    summary,
)
from ppl_diffusion.smc.evidence import Evidence


def by_label(comparison):
    return {row["label"]: row for row in comparison.rows}


def lawless(posterior):
    law = posterior.law.but(exact=False, why="the best", has_evidence=False)
    return replace(posterior, law=law)


@pytest.fixture
def pair(make_posterior):
    """Return two results of four runs that agree, 1200 and 480 network rows."""
    logs = torch.tensor([-0.3, 0.1, 0.4, 0.0], dtype=torch.float64)
    cheap = replace(make_posterior(runs=4, seed=1), num_evaluations=480, log_evidence=-logs)
    return replace(make_posterior(runs=4), log_evidence=logs), cheap


def half_width(part):
    low, high = part["log_evidence_interval"]
    return (high - low) / 4  # it reaches three times as far up as down


def expected_half_width(posterior, kept, overspent=1.0):
    """Student's t of three degrees times the standard error, by hand."""
    variance = float(posterior.log_evidence.var())
    return 3.182446305 * math.sqrt(variance * overspent / kept + variance**2 / 6)


def test_figures_as_they_are_are_those_of_the_summary(pair):
    row = by_label(compare([Contender("a", pair[0]), Contender("b", pair[1])]))["a"]
    facts = summary(pair[0])
    for name in ("log_evidence", "log_evidence_sd", "log_evidence_bound", "ess", "khat"):
        assert row[name] == pytest.approx(facts[name])
    assert row["root_ancestors"] == min(facts["root_ancestors_per_run"])
    assert row["warnings"] == [verdict.kind for verdict in pair[0].warnings]
    assert row["unique"] == facts["num_unique_x0"]
    assert row["evaluations"] == facts["num_evaluations"]


def test_the_dearer_result_keeps_whole_runs(pair):
    dear, cheap = pair
    comparison = compare([Contender("dear", dear), Contender("cheap", cheap)])
    rows = by_label(comparison)
    assert comparison.evaluations == 480
    assert rows["cheap"]["equal"]["how"] == "whole"
    equal = rows["dear"]["equal"]
    assert (equal["how"], equal["num_runs"], equal["evaluations"]) == ("subsampled", 1, 300)
    # The first run alone, with the spread of all four as that of one.
    assert equal["log_evidence"] == pytest.approx(float(dear.log_evidence[0]))
    assert half_width(rows["dear"]) == pytest.approx(expected_half_width(dear, 4))
    assert half_width(equal) == pytest.approx(expected_half_width(dear, 1))
    weights = dear.weights[0]
    assert equal["ess"] == pytest.approx(float(1 / (weights**2).sum()))
    score = equal["scores"]["log_potential"]
    assert score["mean"] == pytest.approx(float(weights @ dear.log_potential[0]))


@pytest.mark.parametrize(
    ("runs", "rows", "kept", "how", "note"),
    [
        (2, 538, 2, "whole", "kept 538 rows where the budget is 480 (112%)"),
        (2, 500, 2, "whole", None),
        (2, 560, 1, "subsampled", "kept 280 rows where the budget is 480 (58%)"),
        (4, 1000, 2, "subsampled", None),  # 250 a run
        (4, 1120, 1, "subsampled", "kept 280 rows"),  # two would be 117 %
        (4, 1040, 2, "subsampled", None),  # 260 a run: 108 %
        (1, 900, 1, "scaled", None),
    ],
)
def test_the_whole_runs_closest_to_the_budget_are_kept(
    runs, rows, kept, how, note, make_posterior, pair
):
    result = replace(make_posterior(runs=runs, seed=3), num_evaluations=rows)
    comparison = compare([Contender("result", result), Contender("cheap", pair[1])])
    equal = by_label(comparison)["result"]["equal"]
    assert (equal["num_runs"], equal["how"]) == (kept, how)
    said = [text for text in comparison.notes if "whole runs only" in text]
    assert [note in text for text in said] == ([] if note is None else [True])


def test_a_run_above_the_budget_has_its_errors_scaled(pair):
    dear, cheap = pair
    tiny = replace(cheap, num_evaluations=75)  # a run of the other costs four times as much
    rows = by_label(compare([Contender("dear", dear), Contender("tiny", tiny)]))
    equal = rows["dear"]["equal"]
    assert (equal["how"], equal["num_runs"]) == ("scaled", 1)
    # sqrt(4) from four runs to one, sqrt(4) from one run to a quarter of it.
    assert half_width(equal) == pytest.approx(expected_half_width(dear, 1, overspent=4.0))


def test_scores_need_no_value_where_there_is_no_weight(make_posterior):
    posterior = make_posterior(runs=2)
    log_weights = posterior.log_weights.clone()
    log_weights[:, 0] = -torch.inf
    posterior = replace(posterior, log_weights=log_weights.log_softmax(-1))
    values = np.ones((2, 40))
    values[:, 0] = np.nan
    one = Contender("one", posterior, scores={"judge": values})
    row = compare([one, Contender("other", make_posterior(runs=2, seed=5))]).rows[0]
    assert row["scores"]["judge"]["mean"] == pytest.approx(1.0)
    assert row["scores"]["judge"]["se"] == pytest.approx(0.0, abs=1e-12)


def test_the_hamming_distance_is_that_of_two_draws(make_posterior):
    posterior = make_posterior(runs=1, particles=4, length=3)
    x0 = torch.tensor([[[0, 1, 2], [0, 1, 3], [0, 0, 0], [3, 3, 3]]])
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    posterior = replace(posterior, x0=x0, log_weights=weights.log())
    row = compare([Contender("a", posterior), Contender("b", make_posterior())]).rows[0]
    pairs = [
        (float(weights[0, i] * weights[0, j]), int((x0[0, i] != x0[0, j]).sum()))
        for i in range(4)
        for j in range(4)
    ]
    assert row["hamming"] == pytest.approx(sum(w * d for w, d in pairs))
    assert row["unique"] == 3


def test_dead_runs_count_as_zero_evidence(make_posterior):
    half = make_posterior(runs=2, dead=(1,))
    dead = make_posterior(runs=2, dead=(0, 1))
    rows = by_label(compare([Contender("half", half), Contender("dead", dead)]))
    assert rows["half"]["num_dead_runs"] == 1
    assert rows["half"]["log_evidence"] == pytest.approx(float(half.log_evidence[0]) - math.log(2))
    assert rows["dead"]["log_evidence"] is None
    assert rows["dead"]["ess"] == rows["dead"]["unique"] == 0
    assert rows["dead"]["scores"]["log_potential"] == {"mean": None, "se": None}


def test_letters_and_notes_say_what_is_comparable(make_posterior):
    level = torch.zeros(2, dtype=torch.float64)  # runs agree
    one = replace(make_posterior(runs=2), log_evidence=level)
    other = replace(make_posterior(runs=2, seed=1), log_evidence=level)
    best = lawless(other)
    asked = {"prior": "yeast"}
    contenders = [
        Contender("a", one, asked=asked),
        Contender("b", other, asked=asked),
        Contender("c", other, asked={"prior": "human"}),
        Contender("d", best, method="best-of-n", asked=asked),
    ]
    comparison = compare(contenders)
    assert [row["target"] for row in comparison.rows] == ["A", "A", "B", "C"]
    assert by_label(comparison)["d"]["log_evidence"] is None
    assert by_label(comparison)["d"]["equal"]["log_evidence"] is None
    assert len(comparison.notes) == 3
    assert "A, B differ in prior:" in comparison.notes[0]
    assert "The results differ in prior:" in comparison.notes[1]
    assert "No law is declared for d" in comparison.notes[2]
    assert compare(contenders[:2]).notes == []
    (chain,) = other.law.chains
    longer = replace(other, law=other.law.but(chains=(replace(chain, steps=9),)))
    (note,) = compare([contenders[0], Contender("e", longer, asked=asked)]).notes
    assert "A, B differ in steps:" in note


def test_laws_are_one_where_their_data_are_and_not_their_words(make_posterior):
    one, other = make_posterior(), make_posterior(seed=1)
    (chain,) = one.law.chains
    weights = replace(chain, digest="other weights")  # no sentence tells
    approximate = one.law.but(exact=False, why="another sentence")
    cases = {True: approximate, False: one.law.but(chains=(weights,))}
    for same, law in cases.items():
        pair = [Contender("a", one), Contender("b", replace(other, law=law))]
        letters = [row["target"] for row in compare(pair).rows]
        assert (letters[0] == letters[1]) == same
        assert (str(law) == str(one.law)) != same


@pytest.mark.parametrize(
    ("log_evidence", "apart"),
    [
        ([0.0, 0.3, 0.4, 0.1], None),
        ([-1.0, -6.8, -5.0, -6.0], (5.8, 0)),
        ([0.0, 1.9, 0.0, 0.0], None),  # standard deviation .95
        ([0.0, 2.1, 0.0, 0.0], (2.1, 0)),  # 1.05
        ([0.0, -math.inf, 0.1], (0.1, 1)),
        ([0.5], None),
        ([math.nan, math.nan], None),
        ([-math.inf, -math.inf], None),
    ],
)
def test_runs_that_disagree_have_no_known_error(log_evidence, apart):
    found = Evidence.of(torch.tensor(log_evidence))
    assert (found.ends is not None and found.interval is None) == (apart is not None)
    if apart is not None:
        assert (found.ends[1] - found.ends[0], found.num_dead) == pytest.approx(apart)


def test_disagreement_is_noted_beside_the_range(make_posterior):
    logs = torch.tensor([-1.0, -6.8, -5.0], dtype=torch.float64)
    apart = Contender("apart", replace(make_posterior(), log_evidence=logs))
    close = Contender("close", replace(make_posterior(seed=1), log_evidence=0.1 * logs.sign()))
    comparison = compare([apart, close])
    row = by_label(comparison)["apart"]
    assert row["log_evidence_range"] == (-6.8, -1.0)
    assert row["log_evidence_interval"] is None
    assert row["log_evidence_bound"] == pytest.approx(row["log_evidence"] - math.log(20))
    assert by_label(comparison)["close"]["log_evidence_interval"] is not None
    (note,) = [note for note in comparison.notes if "disagree" in note]
    assert note.startswith("Warning: apart: runs disagree: log evidence from -6.8 to -1.0 nats")


def test_notes_say_how_bad_it_is(make_posterior, capsys):
    logs = torch.tensor([-1.0, -26.8, -5.0], dtype=torch.float64)
    apart = Contender("apart", replace(make_posterior(), log_evidence=logs))
    comparison = compare([apart, Contender("other", make_posterior(seed=1))])
    (note,) = [note for note in comparison.notes if "apart: runs disagree" in note]
    assert note.startswith("Do not use this: ")
    comparison_tables(comparison)
    printed = [x for x in capsys.readouterr().out.splitlines() if "apart: runs disagree" in x]
    assert printed == [note]


def test_refined_results_have_no_effective_sample_size(make_posterior):
    """Their states are correlated, and count alike."""
    refined = replace(make_posterior(), settings={"method": "refinement"})
    row = by_label(compare([Contender("r", refined), Contender("o", make_posterior(seed=1))]))["r"]
    assert row["ess"] is row["equal"]["ess"] is None


def test_a_score_is_as_sure_as_the_runs_that_count(make_posterior):
    """One run that holds all the evidence is one run: its neighbours do not sharpen its mean."""
    posterior = make_posterior(runs=4)
    level = replace(posterior, log_evidence=torch.zeros(4, dtype=torch.float64))
    alone = replace(posterior, log_evidence=torch.tensor([40.0, 0, 0, 0], dtype=torch.float64))
    rows = by_label(compare([Contender("level", level), Contender("alone", alone)]))
    score = {name: row["scores"]["log_potential"]["se"] for name, row in rows.items()}
    assert score["alone"] == pytest.approx(2 * score["level"])


def test_labels_must_differ_and_be_two(make_posterior):
    one = Contender("a", make_posterior())
    for wrong in ([one], [one, one]):
        with pytest.raises(ValueError, match="at least two results with labels of their own"):
            compare(wrong)


def test_more_results_than_colours_still_look_different(make_posterior):
    comparison = compare([Contender(f"r{i}", make_posterior(seed=i)) for i in range(9)])
    ax = plot_comparison(comparison, ax=Figure().subplots())
    marks = [
        (container[0].get_color(), container[0].get_marker())
        for container in ax.child_axes[2].containers
    ]
    assert len(marks) == 18
    assert len(set(marks)) == 9


def test_an_empty_panel_says_why_and_a_full_one_shows_single_runs(make_posterior):
    lawful = [Contender(name, make_posterior(seed=seed)) for seed, name in enumerate("ab")]
    nothing = [replace(c, posterior=lawless(c.posterior)) for c in lawful]
    panel = plot_comparison(compare(nothing), ax=Figure().subplots()).child_axes[0]
    assert "no result declares a law" in panel.texts[0].get_text()
    comparison = compare(lawful)
    panel = plot_comparison(comparison, ax=Figure().subplots()).child_axes[0]
    assert not panel.texts
    runs = lawful[0].posterior.log_evidence
    ends = plot_comparison_data(comparison)["log_evidence_range"][0, 0]
    assert ends.tolist() == [float(runs.min()), float(runs.max())]
    lines = [path.vertices[:, 1].tolist() for c in panel.collections for path in c.get_paths()]
    assert ends.tolist() in lines


def test_plot_data_and_plot(pair):
    judged = {"judge": np.ones((4, 40))}
    best = lawless(pair[1])
    comparison = compare(
        [Contender("a", pair[0], scores=judged), Contender("b", best, scores=judged)]
    )
    data = plot_comparison_data(comparison)
    assert str(data["name"]) == "judge"
    assert data["evaluations"].tolist() == [[1200, 300], [480, 480]]
    np.testing.assert_allclose(data["score"], 1.0)
    assert np.isnan(data["log_evidence"][1]).all()
    assert np.isfinite(data["log_evidence"][0]).all()
    ax = plot_comparison(comparison, ax=Figure().subplots())
    assert len(ax.child_axes) == 3
    assert len(ax.child_axes[0].containers) == 2  # the beam has no evidence to mark
    assert len(ax.child_axes[2].containers) == 4
    assert str(plot_comparison_data(comparison, score="log_potential")["name"]) == "log_potential"
    with pytest.raises(ValueError, match="not every result has the score 'docking'"):
        plot_comparison_data(comparison, score="docking")
