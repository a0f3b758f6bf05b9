"""Chains of the torch side are the same law in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpyro_toys import pair

import ppl_diffusion as ppd
import ppl_diffusion.numpyro as ppn
from ppl_diffusion.errors import CapabilityError


@pytest.mark.parametrize("name", ["yeast-promoter", "yeast-promoter-uniform"])
def test_a_shipped_prior_gives_paths_the_same_density(name):
    """In float32 sums of 640 logs: within 2e-3 nats of some hundreds."""
    theirs = ppd.models.load(name).chain(num_steps=8)
    ours = ppn.from_torch(theirs)
    path = theirs.sample((3,), generator=torch.Generator().manual_seed(0))
    found = ours.log_prob(jnp.asarray(path.numpy()))
    np.testing.assert_allclose(found, theirs.log_prob(path).numpy(), rtol=0, atol=2e-3)
    drawn = ours.x0(ours.sample(jax.random.key(0)))
    assert drawn.shape == (80,)
    assert int(drawn.max()) < 4


@pytest.mark.parametrize("options", [{}, {"process": "uniform"}, {"prompt": [-1, 2, -1]}], ids=str)
def test_tiny_chains_too(options):
    ours, theirs = pair(**options)
    path = ours.sample(jax.random.key(0), (5,))
    found = ppn.from_torch(theirs.expand((5,))).log_prob(path)
    np.testing.assert_allclose(found, ours.log_prob(path), atol=1e-5)


def test_what_has_no_twin_is_refused():
    prior = ppd.models.load("latent-names")
    with pytest.raises(CapabilityError, match="has no twin in JAX"):
        ppn.from_torch(prior.chain())
