"""The numbers behind each plot, exactly, and that the drawings show them."""

import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from ppl_diffusion import diagnostics
from ppl_diffusion.errors import ParticleCollapse

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLOTS = ["plot_ess", "plot_evidence", "plot_weights", "plot_ancestry", "plot_token_entropy"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_ess_data_is_the_trace_over_the_number_of_particles(make_posterior):
    posterior = make_posterior(runs=2, particles=10, steps=4)
    data = diagnostics.plot_ess_data(posterior)
    np.testing.assert_array_equal(data["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(data["ess_fraction"], posterior.ess / 10)
    np.testing.assert_array_equal(data["resampled"], posterior.resampled)
    assert data["threshold"] == 0.5
    assert np.isnan(diagnostics.plot_ess_data(replace(posterior, settings={}))["threshold"])


def test_evidence_data_pools_runs_without_bias(make_posterior):
    steps = logs([1.0, 2.0], [3.0, 6.0])
    posterior = make_posterior(runs=2, steps=2)
    posterior = replace(posterior, log_evidence_steps=steps, log_evidence=steps[:, -1])
    data = diagnostics.plot_evidence_data(posterior)
    np.testing.assert_allclose(np.exp(data["pooled"]), [2.0, 4.0])
    # sd of (1, 3) over their mean 2, and the same for (2, 6)
    np.testing.assert_allclose(data["across_run_sd"], np.sqrt(2) / 2)


def test_evidence_data_counts_a_dead_run_as_zero(make_posterior):
    steps = logs([1.0, 0.0], [1.0, 6.0])
    variance = torch.tensor([torch.nan, 0.16], dtype=torch.float64)
    posterior = make_posterior(runs=2, steps=2)
    posterior = replace(
        posterior,
        log_evidence_steps=steps,
        log_evidence=steps[:, -1],
        evidence_variance=variance,
    )
    data = diagnostics.plot_evidence_data(posterior)
    np.testing.assert_allclose(np.exp(data["pooled"]), [1.0, 3.0])
    np.testing.assert_allclose(data["across_run_sd"], [0.0, np.sqrt(2)])
    # mean of Z^2 V over (mean of Z)^2: (0 + 36 * 0.16) / 2 / 9
    np.testing.assert_allclose(data["genealogical_sd"], np.sqrt(0.32))


def test_evidence_data_without_an_error_estimate_is_nan(make_posterior):
    posterior = make_posterior(runs=1)
    assert np.isnan(diagnostics.plot_evidence_data(posterior)["across_run_sd"]).all()
    variance = torch.tensor([0.1, torch.nan, 0.1], dtype=torch.float64)
    posterior = replace(make_posterior(), evidence_variance=variance)
    assert np.isnan(diagnostics.plot_evidence_data(posterior)["genealogical_sd"])
    dead = make_posterior(dead=[0, 1, 2])
    assert np.isnan(diagnostics.plot_evidence_data(dead)["genealogical_sd"])


def test_genealogical_sd_of_a_negative_variance_estimate_is_zero(make_posterior):
    variance = torch.full((3,), -0.01, dtype=torch.float64)
    posterior = replace(make_posterior(), evidence_variance=variance)
    assert diagnostics.plot_evidence_data(posterior)["genealogical_sd"] == 0


def test_weights_data_orders_counts_and_accumulates(make_posterior):
    weights = logs([0.1, 0.5, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0])
    posterior = replace(make_posterior(runs=2, particles=4), log_weights=weights)
    data = diagnostics.plot_weights_data(posterior)
    np.testing.assert_allclose(np.sort(data["log10_scaled"]), np.log10([0.4, 1.6, 2.0]))
    assert data["num_zero"] == 5
    np.testing.assert_allclose(data["cumulative"], [[0.5, 0.9, 1.0, 1.0], [np.nan] * 4])


def test_ancestry_data_follows_lineages(make_posterior):
    ancestors = torch.tensor([[[0, 1, 2, 3]], [[1, 0, 1, 3]], [[0, 0, 2, 1]]])
    posterior = replace(
        make_posterior(runs=1, particles=4, steps=3),
        ancestors=ancestors,
        log_weights=logs([0.1, 0.2, 0.3, 0.4]),
    )
    data = diagnostics.plot_ancestry_data(posterior)
    np.testing.assert_array_equal(data["parents"], ancestors[:, 0])
    np.testing.assert_array_equal(
        data["root"], [[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 1, 3], [1, 1, 1, 0]]
    )
    np.testing.assert_array_equal(
        data["survives"], [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(data["num_roots"], [4, 4, 3, 2])
    np.testing.assert_allclose(data["weight"], [0.4, 0.6, 0.0, 0.0])


def test_ancestry_ranks_never_let_lineages_cross(make_posterior):
    posterior = make_posterior()
    shuffled = torch.randint(40, (5, 3, 40), generator=torch.Generator().manual_seed(1))
    data = diagnostics.plot_ancestry_data(replace(posterior, ancestors=shuffled), run=2)
    for k, parents in enumerate(data["parents"]):
        order = np.argsort(data["rank"][k + 1])
        assert (np.diff(data["rank"][k][parents[order]]) >= 0).all()
        assert sorted(data["rank"][k + 1]) == list(range(40))


def test_ancestry_of_a_run_that_does_not_exist(make_posterior):
    with pytest.raises(IndexError, match=r"run 3 does not exist: choose one of 0\.\.2"):
        diagnostics.plot_ancestry(make_posterior(), run=3)


def entropy_posterior(make):
    """Two runs of two particles, evidences 1 and 3, tokens chosen so that entropies are known."""
    posterior = make(runs=2, particles=2, steps=1, length=3)
    x0 = torch.tensor([[[0, 1, 2], [0, 2, 2]], [[0, 1, 7], [0, 1, 7]]])
    masked = torch.full_like(x0, 8)
    return replace(
        posterior,
        x0=x0,
        log_weights=logs([1.0, 0.0], [0.5, 0.5]),
        log_evidence=logs([1.0, 3.0])[0],
        compact_path=torch.stack([masked, x0], -2),
    )


def test_token_entropy_data_weighs_runs_by_evidence(make_posterior):
    data = diagnostics.plot_token_entropy_data(entropy_posterior(make_posterior))
    # the last position shows token 2 in run 0 (1/4 of the pooled weight) and 7 in run 1
    quarter = 0.25 * 2 + 0.75 * np.log2(4 / 3)
    np.testing.assert_allclose(data["entropy"], [0.0, 0.0, quarter], atol=1e-15)
    np.testing.assert_allclose(data["entropy_steps"], [[0, 0, 0], [0, 0, quarter]], atol=1e-15)
    np.testing.assert_array_equal(data["times"], [1.0, 0.0])


def test_token_entropy_data_without_a_path_has_no_steps(make_posterior):
    data = diagnostics.plot_token_entropy_data(make_posterior())
    assert set(data) == {"position", "entropy"}


def test_token_entropy_of_one_certain_token_is_plus_zero(make_posterior):
    posterior = make_posterior()
    posterior = replace(posterior, x0=torch.zeros_like(posterior.x0))
    entropy = diagnostics.plot_token_entropy_data(posterior)["entropy"]
    np.testing.assert_allclose(entropy, 0.0, atol=1e-12)
    assert not np.signbit(entropy).any()


def test_token_entropy_data_lays_plates_side_by_side(make_posterior):
    posterior = make_posterior(plates=(2,), path=True)
    data = diagnostics.plot_token_entropy_data(posterior)
    first = replace(
        posterior, x0=posterior.x0[:, :, 1], compact_path=posterior.compact_path[:, :, 1]
    )
    expected = diagnostics.plot_token_entropy_data(first)
    np.testing.assert_allclose(data["entropy"][6:], expected["entropy"])
    np.testing.assert_allclose(data["entropy_steps"][:, 6:], expected["entropy_steps"])


def test_token_entropy_of_dead_runs_raises(make_posterior):
    with pytest.raises(ParticleCollapse, match="weight zero"):
        diagnostics.plot_token_entropy_data(make_posterior(dead=[0, 1, 2]))


@pytest.mark.parametrize("name", PLOTS)
def test_plot_draws_into_the_axes_it_is_given(make_posterior, name):
    for posterior in (make_posterior(path=True), make_posterior(runs=1, plates=(2,))):
        figure, ax = plt.subplots(layout="constrained")
        assert getattr(diagnostics, name)(posterior, ax=ax) is ax
        figure.canvas.draw()
        assert getattr(diagnostics, name)(posterior).figure is not figure


@pytest.mark.parametrize("name", PLOTS[:4])
def test_plot_survives_dead_runs(make_posterior, name):
    for dead in ([1], [0, 1, 2]):
        getattr(diagnostics, name)(make_posterior(dead=dead)).figure.canvas.draw()


def test_evidence_plot_spans_the_runs_and_says_when_they_disagree(make_posterior):
    posterior = make_posterior()
    steps = posterior.log_evidence_steps.clone()
    ax = diagnostics.plot_evidence(posterior)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(float(steps.min()))
    assert band[:, 1].max() == pytest.approx(float(steps.max()))
    assert not any("disagree" in text.get_text() for text in ax.texts)
    steps[0] -= 5.8 + steps[0, -1] - steps[1, -1]
    steps[2] = steps[1]
    apart = replace(posterior, log_evidence_steps=steps, log_evidence=steps[:, -1])
    (text,) = diagnostics.plot_evidence(apart).texts
    assert "runs disagree by 5.8 nats" in text.get_text()


def test_evidence_plot_shows_the_runs_the_band_and_the_bar(make_posterior):
    posterior = make_posterior()
    ax = diagnostics.plot_evidence(posterior)
    for line, run in zip(ax.lines, posterior.log_evidence_steps, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), run)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "lowest to highest run",
        "one run",
        "log of the mean over runs",
        "±1 sd across runs",
        "±1 genealogical sd",
    ]
    degenerate = replace(posterior, evidence_variance=posterior.evidence_variance * torch.nan)
    texts = diagnostics.plot_evidence(degenerate).get_legend().get_texts()
    assert texts[-1].get_text() == "genealogical sd: degenerate"


def test_ancestry_plot_colours_edges_by_eve_and_can_drop_the_faint_ones(
    make_posterior, monkeypatch
):
    posterior = make_posterior()
    data = diagnostics.plot_ancestry_data(posterior)
    tree, count = diagnostics.plot_ancestry(posterior).child_axes
    assert sum(len(c.get_segments()) for c in tree.collections) == 5 * 40
    np.testing.assert_array_equal(count.lines[0].get_ydata(), data["num_roots"])
    labels = [text.get_text() for text in tree.get_legend().get_texts()]
    heaviest = int(data["weight"].argmax())
    assert labels[0] == f"Eve {heaviest}: {data['weight'][heaviest]:.0%}"
    monkeypatch.setattr(diagnostics.plots, "_MAX_FAINT_EDGES", 0)
    tree, _ = diagnostics.plot_ancestry(posterior).child_axes
    drawn = sum(len(c.get_segments()) for c in tree.collections)
    assert drawn == data["survives"][1:].sum()
    monkeypatch.setattr(diagnostics.plots, "_MAX_LINEAGES", 3)
    tree, _ = diagnostics.plot_ancestry(posterior).child_axes
    assert 5 <= sum(len(c.get_segments()) for c in tree.collections) <= 3 * 5


def test_plots_without_matplotlib_say_what_to_install(make_posterior, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'ppl-diffusion\[plot\]'"):
        diagnostics.plot_ess(make_posterior())
