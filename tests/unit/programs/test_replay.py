"""Programs run again on finished draws: element by element, without data, from a file."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion import diagnostics
from ppl_diffusion.diagnostics import Contender, collapse, compare, summary, summary_table
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, ParticleGibbs, attach
from ppl_diffusion.potentials import factor
from ppl_diffusion.smc import Draws, GibbsPosterior, ParticlePosterior
from ppl_diffusion.testing import toy_chain, toy_potential, z_score

CHAIN = toy_chain(num_steps=3)
OTHER = toy_chain(vocab_size=2, length=4, num_steps=2)
Y = torch.tensor([1.0, 2.0, 1.5])
SEEN = torch.tensor([True, False, True])
GIBBS = {"num_particles": 4, "num_runs": 2, "num_samples": 5, "num_warmup": 2}


def assay(y, seen=None):
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.3))
    with pyro.plate("promoter", 2):
        x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
        factor("each", toy_potential(), x)
    z = OTHER.x0(pyro.sample("other", OTHER))
    pyro.factor("goal", z.sum(-1).float())
    total = x.sum((-1, -2), keepdim=True)[..., 0].float()
    mean = pyro.deterministic("mean", gain * total, event_dim=1)
    with pyro.plate("replicate", 3):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y, obs_mask=seen)


@pytest.fixture(scope="module")
def posterior():
    return SMC(assay, num_particles=16, num_runs=2, twist=None).run(Y, seed=0)


def test_groups_of_a_program(posterior):
    data = posterior.to_arviz(log_likelihood=True, prior=7, posterior_predictive=True)
    drawn = data.sample_stats["particle"].values

    def of_draws(values):
        return np.stack([value[index] for value, index in zip(values.numpy(), drawn, strict=True)])

    np.testing.assert_array_equal(data.observed_data["y"], Y)
    assert data.observed_data["y"].dims == ("replicate",)
    lik = data.log_likelihood["y"]
    assert lik.dims == ("chain", "draw", "replicate")
    expected = dist.Normal(posterior.samples["mean"], 0.5).log_prob(Y)
    np.testing.assert_allclose(lik, of_draws(expected), rtol=1e-5)
    gain = dist.LogNormal(0.0, 0.3).log_prob(posterior.samples["gain"])
    np.testing.assert_allclose(data.log_prior["gain"], of_draws(gain), rtol=1e-5)
    assert data.log_factors["each"].dims == ("chain", "draw", "promoter")
    each = toy_potential()(posterior.samples["x"])
    np.testing.assert_allclose(data.log_factors["each"], of_draws(each), rtol=1e-5)
    # what each element adds is what the particles are weighed by
    total = lik.sum("replicate") + data.log_factors["each"].sum("promoter")
    total = total + data.log_factors["goal"]
    np.testing.assert_allclose(total, of_draws(posterior.log_potential), rtol=1e-5)
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "replicate")
    assert data.prior["gain"].shape == (1, 7)
    assert data.prior_sequences["x"].dims == ("chain", "draw", "promoter", "position")
    assert data.prior_predictive["y"].shape == (1, 7, 3)


def test_sites_have_the_dimensions_of_their_plates_and_chains(posterior):
    data = posterior.to_arviz()
    assert set(data.posterior.data_vars) == {"gain", "mean"}
    assert data.sequences["x"].dims == ("chain", "draw", "promoter", "position")
    assert data.sequences["x0"].dims == ("chain", "draw", "promoter", "position")
    paths = {name: v.dims[2:] for name, v in data.smc_history.items() if name != "ancestor"}
    assert paths["path"] == ("promoter", "state", "position")
    assert paths["other"] == ("other_dim_0", "other_position")


def test_predictions_are_draws_of_the_likelihood():
    """4 standard errors of 2 x 4000 draws: false alarm 6e-5 for each of two numbers."""
    posterior = SMC(assay, num_particles=4000, num_runs=2, twist=None).run(Y, seed=1)
    data = posterior.to_arviz(weights="store", posterior_predictive=True, seed=3)
    error = torch.as_tensor(data.posterior_predictive["y"].values) - posterior.samples["mean"]
    assert abs(z_score(error[..., 0].flatten().double(), 0.0)) < 4
    assert abs(z_score((error[..., 1] ** 2).flatten().double(), 0.25)) < 4
    again = posterior.to_arviz(weights="store", posterior_predictive=True, seed=3)
    assert again.posterior_predictive.equals(data.posterior_predictive)


def test_what_nobody_saw_is_no_data():
    posterior = SMC(assay, num_particles=16, num_runs=2, twist=None).run(Y, seen=SEEN, seed=0)
    data = posterior.to_arviz(log_likelihood=True, posterior_predictive=True)
    np.testing.assert_array_equal(data.observed_data["y_observed"], Y[SEEN])
    expected = dist.Normal(posterior.samples["mean"], 0.5).log_prob(Y[SEEN])
    np.testing.assert_allclose(data.log_likelihood["y_observed"], expected, rtol=1e-5)
    assert data.posterior_predictive["y_observed"].shape == (2, 16, 2)


@pytest.mark.parametrize("seen", [SEEN, torch.zeros(3).bool()], ids=repr)
def test_summaries_hold_only_what_nobody_saw(seen, tmp_path):
    posterior = SMC(assay, num_particles=16, num_runs=2, twist=None).run(Y, seen=seen, seed=0)
    left = torch.nonzero(~seen)[:, 0]
    for result in (posterior, Draws.load(posterior.save(tmp_path / "run"))):
        data = result.to_arviz()
        assert set(data.posterior.data_vars) == {"gain", "mean", "y_unobserved"}
        fills = data.posterior["y_unobserved"]
        assert fills.dims == ("chain", "draw", "y_unobserved_dim_0")
        np.testing.assert_array_equal(fills["y_unobserved_dim_0"], left)
        np.testing.assert_array_equal(
            data.weighted_data["y_unobserved"], posterior.samples["y"][..., left]
        )
    data = posterior.to_arviz(log_likelihood=True, prior=4)
    assert "y" not in data.prior
    assert data.prior["y_unobserved"].shape == (1, 4, len(left))
    assert data.log_prior["y_unobserved"].shape == (2, 16, len(left))


def test_a_mask_that_hides_nothing_leaves_nothing_to_draw():
    seen = torch.ones(3).bool()
    posterior = SMC(assay, num_particles=16, num_runs=2, twist=None).run(Y, seen=seen, seed=0)
    data = posterior.to_arviz(prior=4)
    assert set(data.posterior.data_vars) == set(data.prior.data_vars) == {"gain", "mean"}


def test_sites_that_look_like_missing_data_stay(posterior):
    fills = torch.rand(2, 16, 3)
    samples = {"z": 2 * fills, "z_unobserved": fills}
    data = replace(posterior, samples={**posterior.samples, **samples}).to_arviz()
    assert data.posterior["z"].shape == data.posterior["z_unobserved"].shape == (2, 16, 3)


def test_particles_one_after_the_other_say_the_same(posterior):
    one = SMC(assay, num_particles=16, num_runs=2, twist=None, vectorize_particles=False)
    slow = one.run(Y, seed=0).to_arviz(log_likelihood=True, prior=3, posterior_predictive=True)
    assert slow.log_likelihood["y"].dims == ("chain", "draw", "replicate")
    assert slow.prior_predictive["y"].shape == (1, 3, 3)
    assert slow.posterior_predictive["y"].shape == (2, 16, 3)


@pytest.mark.parametrize("group", ["log_likelihood", "posterior_predictive"])
def test_unequal_particles_are_no_draws_to_rate(posterior, group):
    # this run was resampled at the end
    assert group in posterior.to_arviz(weights="store", **{group: True}).groups()
    unequal = torch.arange(16.0, dtype=torch.float64).log_softmax(0).expand(2, 16)
    uneven = replace(posterior, log_weights=unequal)
    with pytest.raises(ValueError, match="ArviZ counts draws alike, which particles under"):
        uneven.to_arviz(weights="store", **{group: True})
    assert group in uneven.to_arviz(**{group: True}).groups()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prior": True}, "prior must be a whole number of draws, 0 for none, got True"),
        ({"prior": 2.5}, "prior must be a whole number of draws, 0 for none, got 2.5"),
        ({"prior": -1}, "prior must be a whole number of draws, 0 for none, got -1"),
        ({"log_likelihood": "yy"}, "log_likelihood must be True or False, got 'yy'"),
        ({"posterior_predictive": ["yy"]}, r"posterior_predictive must be True or False, got \['y"),
    ],
)
def test_options_that_mean_nothing_are_refused(posterior, chains, options, said):
    for result in (posterior, chains):
        with pytest.raises(ValueError, match=f"to_arviz: {said}"):
            result.to_arviz(**options)


def test_what_is_not_kept_is_said():
    posterior = SMC(assay, num_particles=8, twist=None, store_path=False).run(Y, seed=0)
    with pytest.raises(ValueError, match=r"do not hold its site 'other'; .*store_path=True"):
        posterior.to_arviz(log_likelihood=True)
    assert "observed_data" in posterior.to_arviz().groups()


def test_data_beyond_the_law_are_said():
    def loose():
        x = CHAIN.x0(pyro.sample("path", CHAIN))
        pyro.sample("y", dist.Normal(x.sum(-1).float(), 1.0), obs=torch.tensor([2.0, 1.0]))

    posterior = SMC(loose, num_particles=8, vectorize_particles=False).run(seed=0)
    with pytest.raises(ValueError, match=r"'y' of loose draws fewer values .* put it into a plate"):
        posterior.to_arviz(posterior_predictive=True)


# One surface, one file format.


@pytest.fixture(scope="module")
def chains():
    return ParticleGibbs(assay, nuts={"max_tree_depth": 2}, **GIBBS).run(Y, seed=0)


def test_chains_are_saved_and_loaded(chains, tmp_path):
    chains.save(tmp_path / "run")
    for loaded in (Draws.load(tmp_path / "run"), GibbsPosterior.load(tmp_path / "run")):
        assert isinstance(loaded, GibbsPosterior)
        assert loaded.law == chains.law
        assert loaded.settings == chains.settings
        assert loaded.plates == chains.plates
        assert loaded.step_size == chains.step_size
        for name, value in chains.samples.items():
            assert torch.equal(loaded.samples[name], value), name
        assert torch.equal(loaded.path, chains.path)
        assert torch.equal(loaded.accept, chains.accept)
    with pytest.raises(ValueError, match=r"holds a GibbsPosterior, not a ParticlePosterior: read"):
        ParticlePosterior.load(tmp_path / "run")
    known = attach(Draws.load(tmp_path / "run"), assay, Y)
    here, there = (p.to_arviz(log_likelihood=True).log_likelihood for p in (chains, known))
    assert here.equals(there)


def test_one_loader_tells_which_it_is(posterior, tmp_path):
    assert isinstance(Draws.load(posterior.save(tmp_path / "a")), ParticlePosterior)


def test_chains_have_the_surface_of_particles(chains):
    drawn = chains.resample(9)
    assert torch.equal(drawn["gain"], chains.samples["gain"].flatten(0, 1)[drawn["index"]])
    assert chains.resample(4, pooled=False)["x0"].shape == (2, 4, 2, 2)
    torch.testing.assert_close(chains.weights.sum(-1), torch.ones(2).double())
    torch.testing.assert_close(chains.pooled_log_weights.exp().sum(), torch.tensor(1.0).double())
    assert {"path", "other", "gain", "mean", "x"} == set(chains.samples)
    assert chains.to("cpu").x0.equal(chains.x0)
    mean = chains.expectation(lambda s: s["gain"])
    torch.testing.assert_close(mean, chains.samples["gain"].double().mean(1))
    assert chains.to_arviz().smc_history["path"].dims[2:] == ("promoter", "state", "position")


def test_chains_have_a_summary(chains):
    facts = summary(chains)
    json.dumps(facts, allow_nan=False)
    assert facts["rhat_of"] in {"gain", "mean", "log_density"}
    assert facts["ess_bulk"] > 0
    assert (facts["num_runs"], facts["num_draws"]) == (2, 5)
    assert summary_table(chains).row_count == len(facts)
    short = {**GIBBS, "num_runs": 1, "num_samples": 2}
    one = ParticleGibbs(CHAIN, toy_potential(), **short).run(seed=0)
    assert summary(one)["rhat"] is None


def test_chains_say_what_they_have_not(chains, posterior):
    asked = {
        "evidence": lambda: chains.evidence,
        "pooled_log_evidence": lambda: chains.pooled_log_evidence,
        "genealogy": lambda: chains.genealogy(),
        r"to_arviz\(weights=...\)": lambda: chains.to_arviz(weights="store"),
        "plot_ess": lambda: diagnostics.plot_ess(chains),
        "plot_evidence": lambda: diagnostics.plot_evidence(chains),
        "plot_weights": lambda: diagnostics.plot_weights(chains),
        "plot_ancestry": lambda: diagnostics.plot_ancestry(chains),
        "compare, 'b'": lambda: compare([Contender("a", posterior), Contender("b", chains)]),
    }
    for name, ask in asked.items():
        with pytest.raises(CapabilityError, match=f"^{name}: draws of ParticleGibbs are Markov ch"):
            ask()


def test_tokens_and_collapse_of_chains(chains):
    found = collapse(chains)
    assert found["ancestors"] == [None, None]
    for chain, share in enumerate(found["unique"]):  # five equal draws are their own set
        assert share == len(chains.x0[chain].flatten(1).unique(dim=0)) / 5
    stored = replace(chains, compact_path=chains.samples["path"].to(torch.int8))
    for result in (replace(chains, compact_path=None), stored):
        data = diagnostics.plot_token_entropy_data(result)
        tokens = chains.x0.flatten(0, 1).flatten(1)
        shares = torch.stack([(tokens == token).double().mean(0) for token in range(3)])
        expected = torch.special.entr(shares).sum(0) / np.log(2)
        np.testing.assert_allclose(data["entropy"], expected, atol=1e-12)
    np.testing.assert_allclose(data["entropy_steps"][-1], data["entropy"])


def test_results_without_labels_are_not_compared(posterior):
    with pytest.raises(TypeError, match=r"give results with labels, Contender\(label, posterior\)"):
        compare([posterior, posterior])


@pytest.mark.parametrize("num", [None, 2.5, True, 0])
def test_numbers_of_draws_are_whole(posterior, num):
    with pytest.raises(ValueError, match="resample: num must be a whole number >= 1, got"):
        posterior.resample(num)


def test_a_file_is_no_folder(posterior, tmp_path):
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(NotADirectoryError, match=r"save: .*taken is a file; give the name of"):
            posterior.save(place)


def test_another_law_and_other_data_are_told_apart(posterior):
    with pytest.raises(ValueError, match="assay at these arguments: the data differ; give"):
        attach(posterior, assay, Y + 1)


def test_a_pickle_does_without_the_program(posterior):
    twin = pickle.loads(pickle.dumps(posterior))
    assert twin.origin is None
    assert torch.equal(twin.x0, posterior.x0)
