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


def test_evidence_data_counts_a_dead_run_as_zero(make_posterior):
    steps = logs([1.0, 0.0], [1.0, 6.0])
    posterior = make_posterior(runs=2, steps=2)
    posterior = replace(posterior, log_evidence_steps=steps, log_evidence=steps[:, -1])
    data = diagnostics.plot_evidence_data(posterior)
    np.testing.assert_allclose(np.exp(data["pooled"]), [1.0, 3.0])


def test_weights_data_orders_counts_and_accumulates(make_posterior):
    weights = logs([0.1, 0.5, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0])
    posterior = replace(make_posterior(runs=2, particles=4), log_weights=weights)
    data = diagnostics.plot_weights_data(posterior)
    np.testing.assert_allclose(np.sort(data["log10_scaled"]), np.log10([0.4, 1.6, 2.0]))
    assert data["num_zero"] == 5
    np.testing.assert_array_equal(data["run"], [0, 0, 0])
    np.testing.assert_allclose(data["cumulative"], [[0.5, 0.9, 1.0, 1.0], [np.nan] * 4])


def test_weights_data_has_the_khat_of_each_run_and_of_all(make_posterior):
    posterior = make_posterior(particles=200, dead=[1])
    data = diagnostics.plot_weights_data(posterior)
    np.testing.assert_array_equal(data["khat"], diagnostics.khat(posterior.log_weights))
    pooled = posterior.pooled_log_weights.flatten()
    assert data["khat_pooled"] == diagnostics.khat(pooled)
    assert np.isfinite(data["khat"][[0, 2]]).all()
    assert np.isnan(data["khat"][1])
    assert np.isnan(diagnostics.plot_weights_data(make_posterior(dead=[0, 1, 2]))["khat_pooled"])


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
    np.testing.assert_allclose(data["revealed"], [[0, 0, 0], [1, 1, 1]])
    assert data["num_tokens"] == 8  # the mask is 8


def test_token_entropy_leaves_the_mask_out(make_posterior):
    """Two lineages show 0 and 1, two are masked: one bit, and half of them revealed."""
    posterior = make_posterior(runs=1, particles=4, steps=2, length=1, vocab=2)
    path = torch.tensor([[2, 2, 0], [2, 0, 0], [2, 1, 1], [2, 2, 1]])[None, :, :, None]
    posterior = replace(
        posterior,
        x0=path[..., -1, :].contiguous(),
        compact_path=path,
        log_weights=logs([0.25] * 4),
    )
    data = diagnostics.plot_token_entropy_data(posterior)
    np.testing.assert_allclose(data["entropy_steps"][:, 0], [0.0, 1.0, 1.0])
    np.testing.assert_allclose(data["revealed"][:, 0], [0.0, 0.5, 1.0])
    (image,) = diagnostics.plot_token_entropy(posterior).images
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 1.0)
    np.testing.assert_array_equal(image.get_array().mask[:, 0], [True, False, False])


@pytest.mark.parametrize("path", [False, True])
def test_the_scale_of_entropy_ends_at_the_log_of_the_alphabet(make_posterior, path):
    posterior = make_posterior(path=path)
    for asked, bits in ((None, 2.0), (16, 4.0), (1, 1.0)):
        ax = diagnostics.plot_token_entropy(posterior, num_tokens=asked)
        top = ax.images[0].norm.vmax if path else ax.lines[1].get_ydata()[0]
        assert top == bits


def test_token_entropy_data_without_a_path_has_no_steps(make_posterior):
    data = diagnostics.plot_token_entropy_data(make_posterior())
    assert set(data) == {"position", "entropy", "num_tokens"}


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


def labels_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_every_run_has_one_colour_and_one_name_in_all_plots(make_posterior):
    posterior = make_posterior(runs=9, dead=[4])
    names = [f"run {run}{' (dead)' * (run == 4)}" for run in range(9)]
    ess, evidence = diagnostics.plot_ess(posterior), diagnostics.plot_evidence(posterior)
    weights = diagnostics.plot_weights(posterior).child_axes[1]
    roots = diagnostics.plot_ancestry(posterior).child_axes[-1]
    assert labels_of(ess)[:9] == labels_of(evidence)[:9] == labels_of(roots)[:9] == names
    assert [label.partition(":")[0] for label in labels_of(weights)[:9]] == names
    looks = []
    for ax in (ess, evidence, weights, roots):
        handles = ax.get_legend().legend_handles[:9]
        looks.append([(line.get_color(), line.get_linestyle()) for line in handles])
        drawn = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
        assert set(looks[-1]) <= set(drawn)
    assert len(set(looks[0])) == 9
    assert looks[0] == looks[1] == looks[2] == looks[3]


def test_a_legend_names_so_many_runs_as_look_different(make_posterior):
    labels = labels_of(diagnostics.plot_evidence(make_posterior(runs=40)))
    assert labels[23:25] == ["run 23", "and 16 more"]


def test_evidence_plot_shows_the_runs_themselves_and_their_interval(make_posterior):
    posterior = make_posterior()
    ax = diagnostics.plot_evidence(posterior)
    for run, values in enumerate(posterior.log_evidence_steps):
        line, point = ax.lines[run], ax.lines[3 + run]
        np.testing.assert_array_equal(line.get_ydata(), values)
        np.testing.assert_array_equal(point.get_ydata(), values[-1:])
        assert line.get_color() == point.get_color()
    assert labels_of(ax) == ["run 0", "run 1", "run 2", "log of the mean", "95 %, nominal"]
    (bar,) = ax.collections
    (ends,) = bar.get_segments()
    assert tuple(ends[:, 1]) == posterior.evidence.interval
    assert not ax.containers


def test_evidence_plot_says_when_runs_disagree(make_posterior):
    posterior = make_posterior()
    steps = posterior.log_evidence_steps.clone()
    assert not diagnostics.plot_evidence(posterior).texts
    steps[0] -= 5.8 + steps[0, -1] - steps[1, -1]
    steps[2] = steps[1]
    apart = replace(posterior, log_evidence_steps=steps, log_evidence=steps[:, -1])
    ax = diagnostics.plot_evidence(apart)
    assert "runs disagree by 5.8 nats" in ax.texts[0].get_text()
    assert not ax.collections  # no error where none is known


@pytest.mark.parametrize("name", PLOTS)
def test_plots_name_what_the_result_is_warned_about(make_posterior, name):
    quiet, dead = make_posterior(particles=100), make_posterior(particles=100, dead=[1])
    kinds = [verdict.kind for verdict in dead.warnings]
    assert "dead" in kinds
    said = getattr(diagnostics, name)(dead).get_title(loc="left")
    assert said == f"see posterior.warnings: {', '.join(kinds)}"
    assert bool(quiet.warnings) == bool(getattr(diagnostics, name)(quiet).get_title(loc="left"))


def test_weights_plot_shows_every_particle_and_the_khat(make_posterior):
    posterior = make_posterior(particles=200, dead=[1])
    left, right = diagnostics.plot_weights(posterior).child_axes
    heights = [patch.get_data().values - patch.get_data().baseline for patch in left.patches]
    assert [int(height.sum()) for height in heights] == [200, 0, 200]
    assert left.get_title() == "200 of 600 weights zero"
    data = diagnostics.plot_weights_data(posterior)
    assert right.get_title() == f"all: k-hat {data['khat_pooled']:.2f} (limit 0.7)"
    assert labels_of(right)[:2] == [f"run 0: k-hat {data['khat'][0]:.2f}", "run 1 (dead): no k-hat"]


def test_ancestry_plot_shows_the_tree_of_every_run(make_posterior):
    posterior = make_posterior(dead=[1])
    *trees, count = diagnostics.plot_ancestry(posterior).child_axes
    assert len(trees) == 3
    for run, tree in enumerate(trees):
        data = diagnostics.plot_ancestry_data(posterior, run=run)
        assert sum(len(c.get_segments()) for c in tree.collections) == 5 * 40
        np.testing.assert_array_equal(count.lines[run].get_ydata(), data["num_roots"])
        dead = " (dead)" * (run == 1)
        assert tree.get_title() == f"run {run}{dead}: {data['num_roots'][-1]} roots"
        assert tree.title.get_color() == count.lines[run].get_color()
    boxes = [ax.get_position().bounds for ax in (*trees, count)]
    assert len(set(boxes)) == 4
    many = make_posterior(runs=20, particles=4)
    assert len(diagnostics.plot_ancestry(many).child_axes) == 17
    assert "4 more runs: run=" in labels_of(diagnostics.plot_ancestry(many).child_axes[-1])


def test_ancestry_plot_colours_edges_by_eve_and_can_drop_the_faint_ones(
    make_posterior, monkeypatch
):
    posterior = make_posterior()
    data = diagnostics.plot_ancestry_data(posterior)
    tree, count = diagnostics.plot_ancestry(posterior, run=0).child_axes
    assert sum(len(c.get_segments()) for c in tree.collections) == 5 * 40
    np.testing.assert_array_equal(count.lines[0].get_ydata(), data["num_roots"])
    heaviest = int(data["weight"].argmax())
    assert labels_of(tree)[0] == f"Eve {heaviest}: {data['weight'][heaviest]:.0%}"
    monkeypatch.setattr(diagnostics.plots, "_MAX_FAINT_EDGES", 0)
    tree, _ = diagnostics.plot_ancestry(posterior, run=0).child_axes
    drawn = sum(len(c.get_segments()) for c in tree.collections)
    assert drawn == data["survives"][1:].sum()
    monkeypatch.setattr(diagnostics.plots, "_MAX_LINEAGES", 3)
    tree, _ = diagnostics.plot_ancestry(posterior, run=0).child_axes
    assert 5 <= sum(len(c.get_segments()) for c in tree.collections) <= 3 * 5


def test_plots_without_matplotlib_say_what_to_install(make_posterior, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'ppl-diffusion\[plot\]'"):
        diagnostics.plot_ess(make_posterior())
