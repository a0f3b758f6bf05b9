"""Every plot of every result that is hardly one: it is drawn, without an error or a warning."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ppl_diffusion import diagnostics
from ppl_diffusion.diagnostics import Contender, compare, plot_comparison
from ppl_diffusion.smc.genealogy import eve_indices

PLOTS = ("ess", "evidence", "weights", "ancestry", "token_entropy")
INF = math.inf


def evidence(posterior, *values):
    last = torch.tensor(values, dtype=torch.float64)
    steps = posterior.log_evidence_steps - posterior.log_evidence_steps[:, -1:]
    steps = torch.where(last.isfinite()[:, None], steps, 0.0) + last[:, None]
    return replace(posterior, log_evidence=last, log_evidence_steps=steps)


def lawless(posterior):
    law = posterior.law.but(exact=False, why="a search", has_evidence=False)
    return replace(posterior, law=law)


def weights(posterior, row):
    """The same log-weights, normalised, in every run."""
    log_w = torch.tensor(row, dtype=torch.float64).log_softmax(-1)
    return replace(posterior, log_weights=log_w.expand(posterior.log_weights.shape).clone())


def nearly_equal(posterior):
    """Five of eight particles live, and sums of look-aheads differ in the last bit."""
    log_w = torch.full((3, 8), -INF, dtype=torch.float64)
    log_w[:, :5] = -math.log(5.0)
    log_w[:, 1] += 2.3e-16
    return replace(posterior, log_weights=log_w)


def one_root(posterior):
    ancestors = torch.zeros_like(posterior.ancestors)
    return replace(posterior, ancestors=ancestors, eve=eve_indices(ancestors))


CASES = {
    "one particle": lambda make: make(particles=1, plates=(2, 3)),
    "one particle, one run, one step": lambda make: make(runs=1, particles=1, steps=1, length=1),
    "one step": lambda make: make(runs=1, steps=1, path=True),
    "one position": lambda make: make(length=1, path=True),
    "one token": lambda make: make(vocab=1, path=True),
    "a dead run": lambda make: make(dead=[1], path=True),
    "all dead": lambda make: make(dead=[0, 1, 2], path=True),
    "no evidence": lambda make: evidence(make(), math.nan, math.nan, math.nan),
    "no law": lambda make: lawless(evidence(make(), math.nan, math.nan, math.nan)),
    "evidence of one run only": lambda make: evidence(make(), math.nan, 0.0, math.nan),
    "evidences far apart": lambda make: evidence(make(), -1e5, 0.0, 1e5),
    "enormous evidences": lambda make: evidence(make(), -1e100, 0.0, 1e100),
    "equal weights": lambda make: weights(make(particles=8), [0.0] * 8),
    "equal up to rounding": lambda make: nearly_equal(make(particles=8)),
    "one particle has all": lambda make: weights(make(particles=8), [0.0] + [-INF] * 7),
    "tiny weights": lambda make: weights(make(particles=8), [0.0, -700.0, -745.0] + [-1e5] * 5),
    "tiniest weights": lambda make: weights(make(particles=8), [0.0] + [-1e300] * 7),
    "huge log-weights": lambda make: weights(make(particles=8), [1e8 * k for k in range(8)]),
    "heavy tail": lambda make: weights(
        make(particles=100), (-3 * np.log(np.linspace(1e-6, 1, 100))).tolist()
    ),
    "excluded": lambda make: replace(
        make(), log_potential=torch.full((3, 40), -INF, dtype=torch.float64)
    ),
    "one root": lambda make: one_root(make()),
    "no resampling": lambda make: replace(
        make(), resampled=torch.zeros(3, 5, dtype=torch.bool), settings={}
    ),
    "no effective size": lambda make: replace(make(), ess=torch.full((3, 5), math.nan)),
    "many runs": lambda make: make(runs=30, particles=3),
}


# By turns: every run of the tests sees each plot and each case, and the slow ones see all pairs.
def by_turns(cases, turn):
    return [
        pytest.param(name, case, marks=[pytest.mark.slow] * ((row + column) % turn > 0))
        for row, name in enumerate(PLOTS)
        for column, case in enumerate(cases)
    ]


LAID_OUT = by_turns(["a dead run", "many runs", "enormous evidences"], 3)


@pytest.mark.parametrize(("name", "case"), by_turns(CASES, 2))
def test_every_plot_is_drawn(make_posterior, name, case):
    figure = Figure(figsize=(7, 4.5))
    ax = figure.subplots()
    assert getattr(diagnostics, f"plot_{name}")(CASES[case](make_posterior), ax=ax) is ax
    figure.draw_without_rendering()


@pytest.mark.parametrize(("name", "case"), LAID_OUT)
def test_a_layout_finds_room_for_it_in_a_file(make_posterior, name, case):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    getattr(diagnostics, f"plot_{name}")(CASES[case](make_posterior), ax=figure.subplots())
    figure.savefig(io.BytesIO(), format="png", dpi=30)


COMPARED = [name for name in CASES if "evidence" in name]
COMPARED += ["a dead run", "all dead", "no law", "excluded"]


@pytest.mark.parametrize("case", COMPARED)
def test_every_result_is_compared_in_a_plot(make_posterior, case):
    usual = make_posterior(seed=1)
    pair = [Contender("usual", usual), Contender(case, CASES[case](make_posterior))]
    figure = Figure(figsize=(12, 4.6))
    plot_comparison(compare(pair), ax=figure.subplots())
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", ["$1$ & $x_2^", "_run", "run\\frac {d} é"])
def test_a_label_is_shown_as_it_is(make_posterior, name):
    pair = [Contender(label, make_posterior(seed=len(label))) for label in ("plain one", name)]
    figure = Figure()
    ax = plot_comparison(compare(pair), ax=figure.subplots())
    figure.draw_without_rendering()
    legend = [text.get_text().strip() for text in ax.child_axes[1].get_legend().get_texts()]
    assert legend[1].replace("\\$", "$") == name


def test_dead_results_say_so(make_posterior):
    dead = make_posterior(dead=[0, 1, 2])
    figure = Figure(layout="constrained")
    for ax, name in zip(figure.subplots(3), ("evidence", "weights", "token_entropy"), strict=True):
        getattr(diagnostics, f"plot_{name}")(dead, ax=ax)
        panel = ax.child_axes[0] if name == "weights" else ax
        assert "every run is dead" in panel.texts[0].get_text()


def test_evidences_of_different_laws_never_share_an_axis(make_posterior):
    posteriors = [make_posterior(seed=seed) for seed in range(4)]
    (chain,) = posteriors[0].law.chains
    other = posteriors[0].law.but(chains=(replace(chain, length=99),))
    posteriors[1] = replace(posteriors[1], law=other)
    posteriors[3] = lawless(posteriors[3])
    contenders = [Contender(name, p) for name, p in zip("abcd", posteriors, strict=True)]
    ax = plot_comparison(compare(contenders), ax=Figure().subplots())
    *panels, _, size = ax.child_axes
    shown = {
        panel.get_title(): [text.get_text() for text in panel.get_xticklabels()] for panel in panels
    }
    assert shown == {
        "log evidence (nats), target A": ["a", "c"],
        "log evidence (nats), target B": ["b"],
    }
    assert len(size.get_xticks()) == 4
    runs = [collection.get_offsets()[:, 1] for collection in panels[0].collections]
    each = posteriors[0].log_evidence.tolist()
    assert any(sorted(np.asarray(values).tolist()) == sorted(each) for values in runs)


@pytest.mark.parametrize("case", ["equal up to rounding", "equal weights", "one particle has all"])
def test_weights_without_a_range_have_a_bar_that_is_seen(make_posterior, case):
    posterior = CASES[case](make_posterior)
    left, _ = diagnostics.plot_weights(posterior, ax=Figure().subplots()).child_axes
    bars = [patch.get_data() for patch in left.patches]
    counts = [bar.values - bar.baseline for bar in bars]
    assert sum(map(np.sum, counts)) == int((posterior.weights > 0).sum())
    assert all(np.diff(bar.edges).min() > 0.01 for bar in bars)
