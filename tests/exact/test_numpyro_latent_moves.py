"""Latents that are moved inside the scan: unbiased evidence, exact posteriors, many values."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from numpyro_toys import _x64, chain  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.inference import LatentMoves
from ppl_diffusion.numpyro import latent_moves
from ppl_diffusion.numpyro.latent_sites import RealSite
from ppl_diffusion.testing import z_score

RUNS, SIZE = 3000, 8
MEANS = jnp.array([-1.0, 0.0, 1.5])
Y = 2.5


@pytest.fixture
def model():
    ours = chain(length=2, steps=3)

    def assay():
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.7))
        with numpyro.plate("batch", 2):
            shift = numpyro.sample("shift", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        x = ours.x0(numpyro.sample("path", ours))
        loc = gain * (x == 1).sum(-1) + MEANS[shift].sum()
        numpyro.sample("y", dist.Normal(loc, 0.5), obs=Y)

    assay.chain = ours
    return assay


def exact(model):
    """Return the evidence, and posterior means of ``gain`` and of ``shift[0] == 2``."""
    sequences = model.chain.marginal().enumerate_support()
    law = np.asarray(jnp.exp(model.chain.marginal().log_prob(sequences)))
    # Quadrature over the standard normal behind the gain: its error is far below what is tested.
    z = np.linspace(-8, 8, 4001)
    gain, density = np.exp(0.7 * z), np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    total, first, second = 0.0, 0.0, 0.0
    for i, a in enumerate((0.2, 0.5, 0.3)):
        for j, b in enumerate((0.2, 0.5, 0.3)):
            count = np.asarray((sequences == 1).sum(-1))[:, None]
            loc = gain * count + float(MEANS[i] + MEANS[j])
            like = np.exp(-((Y - loc) ** 2) / 0.5) / (0.5 * np.sqrt(2 * np.pi))
            mass = a * b * law[:, None] * density * like
            total, first = total + mass.sum(), first + (mass * gain).sum()
            second += mass.sum() * (i == 2)
    return total, first / total, second / total


def run(model, seed=0, **options):
    smc = ppn.SMC(
        model, num_particles=SIZE, num_runs=RUNS, ess_threshold=2.0, moves=LatentMoves(**options)
    )
    return smc.run(jax.random.key(seed))


def scores(posterior, model):
    """Return standard errors of the evidence, and of two posterior means that it weighs."""
    z, gain, shift = exact(model)
    share = torch.exp(posterior.log_evidence - np.log(z))
    values = posterior.samples
    means = [
        (posterior.weights * values["gain"]).sum(1) - gain,
        (posterior.weights * (values["shift"][..., 0] == 2)).sum(1) - shift,
    ]
    found = [z_score(share, 1.0), *(z_score(share * mean, 0.0) for mean in means)]
    return [abs(float(x)) for x in found]


@pytest.mark.parametrize("kernel", ["random-walk", "hmc"])
def test_moves_leave_evidence_and_posterior_alone(model, kernel):
    """Three numbers within 4 standard errors: a false alarm in 5,000 for each kernel."""
    posterior = run(model, kernel=kernel)
    assert max(scores(posterior, model)) < 4
    told = posterior.settings["latent_moves"]
    assert told["kernels"] == {"gain": kernel, "shift": "gibbs"}
    assert told["schedule"] == [1, 2, 3]
    assert told["evidence"] == "unbiased"
    # Resampled at every step, and yet all different where moves are accepted.
    distinct = [len(row.unique()) for row in posterior.samples["gain"][:50]]
    assert np.mean(distinct) > 0.8 * SIZE
    assert posterior.num_move_rows > posterior.num_scout_rows > 0


MUTANTS = {
    "the volume of the transform is forgotten": (RealSite, "back"),
    "values side by side are not compared with what is held": (latent_moves, "_drawn"),
    "the look-ahead is not that of the new latents": (latent_moves, "_where"),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_kernel_that_is_wrong_is_seen(model, mutant, monkeypatch):
    """Each moves one of the three numbers by more than 6 standard errors."""
    place, name = MUTANTS[mutant]
    whole = getattr(place, name)

    def no_volume(self, flat):
        value, volume = whole(self, flat)
        return value, jnp.zeros_like(volume)

    def always(spot, *args):
        there, taken = whole(spot._replace(log_h=spot.log_h - 1.0), *args)
        return there._replace(log_h=jnp.where(taken, there.log_h, spot.log_h)), taken

    def keep_the_old(chosen, new, old):
        return whole(chosen, new, old)._replace(log_h=old.log_h)

    broken = {"back": no_volume, "_drawn": always, "_where": keep_the_old}[name]
    monkeypatch.setattr(place, name, broken)
    jax.clear_caches()
    assert max(scores(run(model, kernel="random-walk", number=3), model)) > 6
    jax.clear_caches()


def test_tuned_on_themselves_the_evidence_says_so(model):
    posterior = ppn.SMC(model, num_particles=64, num_runs=2, moves=LatentMoves(tuning="own")).run(
        jax.random.key(0)
    )
    assert "consistent, not unbiased" in posterior.target
    assert posterior.num_scout_rows == 0


def test_latents_that_cannot_be_moved_are_named():
    ours = chain(length=2, steps=3)

    def assay():
        low = numpyro.sample("low", dist.Normal(0.0, 1.0))
        top = numpyro.sample("top", dist.Uniform(low, low + 1.0))
        kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
        below = numpyro.sample("below", dist.DiscreteUniform(0, kind))
        count = numpyro.sample("count", dist.Poisson(2.0))
        x = ours.x0(numpyro.sample("path", ours))
        numpyro.sample("y", dist.Normal(top + below + count + (x == 1).sum(-1), 1.0), obs=1.0)

    posterior = ppn.SMC(assay, num_particles=8).run(jax.random.key(0))
    told = posterior.settings["latent_moves"]
    assert told["left"] == {
        "top": "its support depends on other sites",
        "below": "its support depends on other sites",
        "count": "its values cannot be listed",
    }
    assert told["kernels"] == {"low": "random-walk", "kind": "gibbs"}
    still = ppn.SMC(assay, num_particles=8, moves=None).run(jax.random.key(0))
    assert set(still.settings["latent_moves"]["left"].values()) == {"moves=None"}
