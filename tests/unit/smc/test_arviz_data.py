"""The ArviZ adapter: schema, values, weights, dead runs, and the way to a file and back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppl_diffusion.diagnostics import khat, to_arviz
from ppl_diffusion.errors import ParticleCollapse
from ppl_diffusion.smc import arviz_data, arviz_layout

arviz = arviz_layout.import_arviz()
ARVIZ_MAJOR = int(arviz.__version__.split(".")[0])
only_1x = pytest.mark.skipif(ARVIZ_MAJOR < 1, reason="needs ArviZ 1.x (Python 3.12)")
only_0x = pytest.mark.skipif(ARVIZ_MAJOR >= 1, reason="needs ArviZ 0.x")


def group_names(data):
    return set(data.groups()) if ARVIZ_MAJOR == 0 else set(data.children)


TARGET = "p(path) * G(x0) of the 5-step reverse chain, normalised, with log G = hand-made;"


def dataset(data, group):
    return data[group] if ARVIZ_MAJOR == 0 else data[group].to_dataset()


def program_posterior(make, **options):
    """Sites of every kind: tokens, a scalar, a vector, a flag, a path."""
    posterior = make(path=True, **options)
    shape = posterior.log_weights.shape
    sites = {
        "x": posterior.x0,
        "gain": torch.arange(shape.numel(), dtype=torch.float32).reshape(shape),
        "count": torch.arange(shape.numel()).reshape(shape),
        "offset": torch.zeros(*shape, 2, dtype=torch.float64),
        "on": torch.ones(shape, dtype=torch.bool),
        "trajectory": posterior.path,
    }
    return replace(posterior, samples=sites)


def test_stored_particles_are_the_posterior_itself(make_posterior):
    posterior = make_posterior()
    data = to_arviz(posterior, weights="store")
    draws, stats = dataset(data, "sequences"), dataset(data, "sample_stats")
    assert draws["x0"].dims == ("chain", "draw", "position")
    np.testing.assert_array_equal(draws["x0"], posterior.x0)
    np.testing.assert_array_equal(stats["log_weight"], posterior.log_weights)
    np.testing.assert_array_equal(stats["log_potential"], posterior.log_potential)
    np.testing.assert_array_equal(stats["root_ancestor"], posterior.eve)
    np.testing.assert_array_equal(stats["particle"][1], np.arange(40))


def test_draws_are_copies_of_particles_with_equal_weights(make_posterior):
    posterior = make_posterior()
    data = to_arviz(posterior)
    draws, stats = dataset(data, "sequences"), dataset(data, "sample_stats")
    particle = torch.as_tensor(stats["particle"].values.astype(np.int64))
    for run in range(3):
        np.testing.assert_array_equal(draws["x0"][run], posterior.x0[run, particle[run]])
        np.testing.assert_array_equal(
            stats["root_ancestor"][run], posterior.eve[run, particle[run]]
        )
    np.testing.assert_allclose(np.exp(stats["log_weight"]).sum("draw"), 1.0)


def test_stratified_draws_copy_each_particle_within_two_of_its_share(make_posterior):
    posterior = make_posterior(particles=200)
    particle = dataset(to_arviz(posterior, seed=3), "sample_stats")["particle"].values
    for run, share in enumerate(200 * posterior.log_weights.exp().numpy()):
        copies = np.bincount(particle[run], minlength=200)
        assert (np.abs(copies - share) < 2).all()


def test_weighted_and_resampled_means_agree(make_posterior):
    # stratified resampling of 2000 particles: the sd of a mean is below that of 2000 independent
    # draws, so 5 of those in one of 3 runs is a false alarm less than once in 500,000
    posterior = make_posterior(particles=2000)
    weights = posterior.log_weights.exp().numpy()
    values = posterior.log_potential.numpy()
    exact = (weights * values).sum(-1)
    variance = (weights * (values - exact[:, None]) ** 2).sum(-1)
    drawn = dataset(to_arviz(posterior, seed=11), "sample_stats")["log_potential"].mean("draw")
    assert (np.abs(drawn.values - exact) < 5 * np.sqrt(variance / 2000)).all()


def test_zero_weight_particles_are_never_drawn(make_posterior):
    posterior = make_posterior(particles=8)
    log_weights = torch.full((3, 8), -torch.inf, dtype=torch.float64)
    log_weights[:, [2, 5]] = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    data = to_arviz(replace(posterior, log_weights=log_weights))
    particle = dataset(data, "sample_stats")["particle"].values
    np.testing.assert_array_equal(particle, [[2, 2, 5, 5, 5, 5, 5, 5]] * 3)


def test_same_seed_gives_the_same_draws_and_another_seed_others(make_posterior):
    first, again, other = (
        dataset(to_arviz(make_posterior(), seed=s), "sample_stats")["particle"] for s in (1, 1, 2)
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_smc_group_follows_the_runs_step_by_step(make_posterior):
    posterior = make_posterior(dead=[1])
    smc = dataset(to_arviz(posterior), "smc")
    np.testing.assert_array_equal(smc["ess"], posterior.ess)
    np.testing.assert_array_equal(smc["log_evidence"], posterior.log_evidence_steps)
    np.testing.assert_allclose(
        smc["log_evidence_increment"][0].cumsum(), posterior.log_evidence_steps[0]
    )
    np.testing.assert_array_equal(smc["resampled"], posterior.resampled)
    np.testing.assert_array_equal(smc["total_log_evidence"], posterior.log_evidence)
    np.testing.assert_array_equal(smc["died_at"], [-1, 3, -1])
    np.testing.assert_array_equal(smc["khat"], khat(posterior.log_weights))
    np.testing.assert_allclose(smc["time"][0], [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-15)


def test_smc_group_counts_parents_and_roots(make_posterior):
    ancestors = torch.tensor([[[0, 1, 2, 3]], [[0, 0, 2, 3]], [[0, 1, 1, 2]]])
    posterior = make_posterior(runs=1, particles=4, steps=3)
    smc = dataset(to_arviz(replace(posterior, ancestors=ancestors)), "smc")
    np.testing.assert_array_equal(smc["n_unique"], [[4, 3, 3]])
    np.testing.assert_array_equal(smc["n_root_ancestors"], [[4, 3, 2]])


def test_smc_group_does_not_depend_on_the_weights_mode(make_posterior):
    posterior = make_posterior(dead=[0])
    drawn, stored = (dataset(to_arviz(posterior, weights=w), "smc") for w in ("resample", "store"))
    assert drawn.identical(stored)


def test_dead_run_is_left_out_of_draws_and_keeps_the_run_numbers(make_posterior):
    data = to_arviz(make_posterior(dead=[1]))
    draws, smc = dataset(data, "posterior"), dataset(data, "smc")
    np.testing.assert_array_equal(draws["chain"], [0, 2])
    np.testing.assert_array_equal(smc["chain"], [0, 1, 2])
    assert np.isneginf(smc["total_log_evidence"].sel(chain=1))


def test_dead_run_is_stored_with_weight_zero(make_posterior):
    stats = dataset(to_arviz(make_posterior(dead=[1]), weights="store"), "sample_stats")
    assert np.isneginf(stats["log_weight"].sel(chain=1)).all()
    np.testing.assert_array_equal(stats["is_valid"].sum("draw"), [40, 0, 40])


def test_draws_of_nothing_but_dead_runs_raise(make_posterior):
    posterior = make_posterior(dead=[0, 1, 2])
    with pytest.raises(ParticleCollapse, match=r'all 3 runs are dead .* weights="store"'):
        to_arviz(posterior)
    assert "posterior" in group_names(to_arviz(posterior, weights="store"))


def test_sites_of_a_program_get_sensible_dims(make_posterior):
    posterior = program_posterior(make_posterior)
    data = to_arviz(posterior, weights="store")
    draws, past = dataset(data, "posterior"), dataset(data, "smc_history")
    sequences = {name: (v.dims[2:], v.dtype) for name, v in dataset(data, "sequences").items()}
    assert sequences == dict.fromkeys(["x0", "x"], (("position",), np.int16))
    assert {name: (v.dims[2:], v.dtype) for name, v in draws.data_vars.items()} == {
        "gain": ((), np.float32),
        "count": ((), np.int64),
        "offset": (("offset_dim_0",), np.float64),
        "on": ((), np.int8),
    }
    assert past["trajectory"].dims == ("chain", "draw", "state", "position")
    np.testing.assert_array_equal(past["trajectory"], posterior.path)


RENAMED = {
    **{name: f"{name}_site" for name in ("chain", "draw", "run", "position", "state", "step")},
    "ancestor": "ancestor_site",
    "plate_0": "plate_0_site",
    "gain_dim_0": "gain_dim_0_site",
    "scope/gain": "scope.gain",
}


@pytest.mark.parametrize("shape", [(), (2,)], ids=["numbers", "vectors"])
def test_sites_that_cannot_keep_their_name_are_renamed(make_posterior, tmp_path, shape):
    posterior = make_posterior(plates=(3,))
    names = ["gain", "time", "draw_site", "scope.gain", *RENAMED]
    stored = dict(zip(names, names, strict=True)) | RENAMED
    stored |= {"draw": "draw_site_site", "scope/gain": "scope.gain_site"}
    samples = {name: torch.randn(3, 40, *shape) for name in names}
    data = to_arviz(replace(posterior, samples=samples), weights="store")
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    draws = dataset(arviz.from_netcdf(str(tmp_path / "posterior.nc")), "posterior")
    assert set(draws.data_vars) == set(stored.values())
    for name, values in samples.items():
        np.testing.assert_array_equal(draws[stored[name]], values, err_msg=name)


@pytest.mark.parametrize("name", ["step", "state", "ancestor", "scope/x", "x0"])
def test_paths_that_cannot_keep_their_name_are_renamed(make_posterior, tmp_path, name):
    posterior = make_posterior(path=True)
    data = to_arviz(replace(posterior, samples={name: posterior.path}), weights="store")
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    back = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    stored = (RENAMED | {"scope/x": "scope.x"}).get(name, name)
    np.testing.assert_array_equal(dataset(back, "smc_history")[stored], posterior.path)
    np.testing.assert_array_equal(dataset(back, "sequences")["x0"], posterior.x0)
    assert "ancestor" in dataset(back, "smc_history")


def test_plates_come_before_positions(make_posterior):
    posterior = program_posterior(make_posterior, plates=(2,))
    local = torch.zeros(3, 40, 2, 5)
    posterior = replace(posterior, samples=posterior.samples | {"local": local})
    data = to_arviz(posterior)
    draws = dataset(data, "posterior")
    x0 = dataset(data, "sequences")["x0"]
    assert x0.dims == ("chain", "draw", "plate_0", "position")
    assert draws["local"].dims == ("chain", "draw", "plate_0", "local_dim_0")
    assert draws["gain"].dims == ("chain", "draw")
    assert dataset(data, "smc_history")["path"].dims[2:] == ("plate_0", "state", "position")


def test_large_token_ids_are_stored_as_int32(make_posterior):
    posterior = make_posterior()
    posterior = replace(posterior, x0=posterior.x0 + 70_000, samples={})
    draws = dataset(to_arviz(posterior, weights="store"), "sequences")
    assert draws["x0"].dtype == np.int32
    np.testing.assert_array_equal(draws["x0"], posterior.x0)


def test_history_can_be_left_out_and_is_guarded_by_size(make_posterior, monkeypatch):
    posterior = make_posterior(path=True)
    assert "smc_history" not in group_names(to_arviz(posterior, history=False))
    np.testing.assert_array_equal(
        dataset(to_arviz(posterior), "smc_history")["ancestor"][:, 2], posterior.ancestors[2]
    )
    monkeypatch.setattr(arviz_data, "HISTORY_LIMIT", 3 * 5 * 40 * 4)
    assert set(dataset(to_arviz(posterior), "smc_history").data_vars) == {"ancestor"}
    assert "path" in dataset(to_arviz(posterior, history=True), "smc_history")
    monkeypatch.setattr(arviz_data, "HISTORY_LIMIT", 0)
    assert "smc_history" not in group_names(to_arviz(posterior))


def test_vocabulary_labels_token_ids(make_posterior):
    constant = dataset(to_arviz(make_posterior(), vocabulary="ACGT"), "constant_data")
    assert int(constant["token_id"].sel(token="G")) == 2
    with pytest.raises(ValueError, match="vocabulary has 2 strings but x0 holds token id 3"):
        to_arviz(make_posterior(), vocabulary="AC")


def test_unknown_weights_mode_is_refused(make_posterior):
    with pytest.raises(ValueError, match='weights is \'equal\': pass "resample" or "store"'):
        to_arviz(make_posterior(), weights="equal")


def test_attributes_state_target_cost_and_settings(make_posterior):
    posterior = make_posterior()
    settings = posterior.settings | {"grid": [1.0, 0.5], "lazy": np.bool_(True)}
    settings |= {"seed": np.int64(7)}
    attrs = to_arviz(replace(posterior, settings=settings), seed=5).attrs
    assert attrs["target"].startswith(TARGET)
    assert (attrs["exact"], attrs["num_evaluations"], attrs["num_potential_calls"]) == (
        1,
        1200,
        340,
    )
    assert (attrs["resampler"], attrs["seed"], attrs["resample_seed"]) == ("systematic", 7, 5)
    assert (attrs["lazy"], attrs["twist"], json.loads(attrs["grid"])) == (1, "null", [1.0, 0.5])


@pytest.mark.parametrize("weights", ["resample", "store"])
def test_every_group_survives_netcdf(make_posterior, tmp_path, weights):
    posterior = program_posterior(make_posterior, dead=[1])
    data = to_arviz(posterior, weights=weights, vocabulary="ACGT")
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    back = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    expected = {"posterior", "sequences", "sample_stats", "smc", "smc_history", "constant_data"}
    expected |= {"weighted_data"} if weights == "resample" else set()
    assert group_names(data) == group_names(back) == expected
    assert dict(back.attrs) == dict(data.attrs)
    for group in expected:
        before, after = dataset(data, group), dataset(back, group).load()
        assert before.equals(after)
        assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}


def test_nothing_is_stored_as_objects(make_posterior):
    data = to_arviz(program_posterior(make_posterior), vocabulary="ACGT")
    for group in group_names(data):
        assert all(v.dtype != object for v in dataset(data, group).variables.values())


@pytest.mark.filterwarnings("default")  # ArviZ 0.x calls deprecated xarray and scipy functions
def test_arviz_summary_reads_the_draws(make_posterior):
    posterior = program_posterior(make_posterior)
    data = to_arviz(posterior)
    table = arviz.summary(data, var_names=["gain"], round_to="none")
    mean = float(dataset(data, "posterior")["gain"].mean())
    assert float(table.loc["gain", "mean"]) == pytest.approx(mean)


@only_0x
def test_arviz_0x_gets_inference_data(make_posterior):
    assert isinstance(to_arviz(make_posterior()), arviz.InferenceData)


@only_1x
def test_arviz_1x_gets_a_data_tree(make_posterior):
    import xarray

    tree = to_arviz(make_posterior(), vocabulary="ACGT")
    assert isinstance(tree, xarray.DataTree)
    assert float(arviz.ess(tree, group="sequences", var_names=["x0"])["x0"].min()) > 0


def test_container_follows_the_installed_major(make_posterior, monkeypatch):
    # the 1.x branch needs nothing but the version number and xarray
    import xarray

    class Future:
        __version__ = "1.3.0"

    monkeypatch.setattr(arviz_layout, "import_arviz", lambda: Future)
    tree = to_arviz(make_posterior())
    assert isinstance(tree, xarray.DataTree)
    groups = {"posterior", "sequences", "weighted_data", "sample_stats", "smc", "smc_history"}
    assert set(tree.children) == groups
    assert tree.attrs["target"].startswith(TARGET)


def test_particles_keep_their_weights_beside_resampled_draws(make_posterior):
    posterior = program_posterior(make_posterior, dead=[1])
    data = to_arviz(posterior)
    weighted, stats = dataset(data, "weighted_data"), dataset(data, "sample_stats")
    np.testing.assert_array_equal(weighted["log_weight"], posterior.log_weights)
    np.testing.assert_array_equal(weighted["gain"], posterior.samples["gain"])
    assert weighted["x0"].dims == ("chain", "particle", "position")
    # and a draw's number finds its particle there
    gain = weighted["gain"].sel(chain=stats["chain"]).values
    drawn = np.take_along_axis(gain, stats["particle"].values.astype(np.int64), 1)
    np.testing.assert_array_equal(dataset(data, "posterior")["gain"], drawn)


def test_sequences_may_be_asked_into_the_posterior(make_posterior):
    posterior = program_posterior(make_posterior)
    assert "x0" not in dataset(to_arviz(posterior), "posterior")
    draws = dataset(to_arviz(posterior, tokens=True, weights="store"), "posterior")
    np.testing.assert_array_equal(draws["x0"], posterior.x0)
    assert {"x", "gain"} <= set(draws.data_vars)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (torch.bfloat16, np.float32),
        (torch.float16, np.float32),
        (torch.uint8, np.int16),
        (torch.uint16, np.int32),
        (torch.uint32, np.int64),
    ],
)
def test_types_that_netcdf_or_summaries_cannot_take_are_converted(make_posterior, kind, stored):
    posterior = make_posterior()
    level = torch.arange(120).reshape(3, 40).to(kind)
    data = to_arviz(replace(posterior, samples={"level": level}), weights="store")
    values = dataset(data, "posterior")["level"]
    assert values.dtype == stored
    np.testing.assert_array_equal(values, np.arange(120).reshape(3, 40))


def test_plates_have_their_own_names(make_posterior):
    posterior = make_posterior(plates=(2,))
    samples = {"x": posterior.x0, "offset": torch.zeros(3, 40, 2, 5), "scale": torch.zeros(3, 40)}
    plates = {"x": ("promoter",), "offset": ("promoter",)}
    data = to_arviz(replace(posterior, samples=samples, plates=plates, is_program=True))
    draws, sequences = dataset(data, "posterior"), dataset(data, "sequences")
    assert draws["offset"].dims == ("chain", "draw", "promoter", "offset_dim_0")
    assert draws["scale"].dims == ("chain", "draw")
    for name in ("x0", "x"):
        assert sequences[name].dims == ("chain", "draw", "promoter", "position")


def test_plates_that_cannot_keep_their_name_are_renamed(make_posterior):
    posterior = make_posterior()
    samples = {"a": torch.zeros(3, 40, 4), "state": torch.zeros(3, 40, 2)}
    plates = {"a": ("position",), "state": ("scope/rows",)}
    data = to_arviz(replace(posterior, samples=samples, plates=plates))
    draws = dataset(data, "posterior")
    assert draws["a"].dims[2:] == ("position_plate",)
    assert draws["state_site"].dims[2:] == ("scope.rows",)
