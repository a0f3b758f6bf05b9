"""Rewards outside of JAX: the weights of those inside, declared; errors keep their words."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from numpyro_toys import chain

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.potentials import Potential


def count(x0):
    return 1.5 * (x0 == 1).sum(-1)


def test_a_potential_of_torch_gives_the_weights_of_its_twin():
    ours = chain()
    inside = ppn.SMC(ours, count, num_particles=6, num_runs=2).run(jax.random.key(0))
    potential = Potential(lambda x0: count(x0).double(), name="count")
    outside = ppn.SMC(ours, potential, num_particles=6, num_runs=2).run(jax.random.key(0))
    assert torch.equal(outside.x0, inside.x0)
    torch.testing.assert_close(outside.log_weights, inside.log_weights, atol=1e-5, rtol=0)
    assert outside.settings["host"]
    assert "host" not in inside.settings
    assert "log G = count" in outside.target


def test_what_a_potential_raises_is_raised():
    def broken(x0):
        raise RuntimeError("no licence for the scorer")

    smc = ppn.SMC(chain(), Potential(broken, name="scorer"), num_particles=6)
    with pytest.raises(Exception, match="no licence for the scorer"):
        smc.run(jax.random.key(0))


def test_a_function_of_torch_in_a_program():
    """Batches of all particles, with the gradient of what is inside of JAX around it."""
    asked = []

    def score(rows):
        asked.append(rows.shape)
        return count(rows).double()

    outside = ppn.OnHost(score)
    x = jnp.array([[0, 1, 1], [2, 2, 1]])

    def log_p(gain):
        return jax.vmap(lambda row: dist.Normal(gain * outside(row), 1.0).log_prob(2.0))(x).sum()

    slope = jax.jit(jax.grad(log_p))(0.5)
    assert float(slope) == pytest.approx((2 - 1.5) * 3 + (2 - 0.75) * 1.5)
    assert asked == [(2, 3)]


def test_what_a_program_asks_on_the_host_is_declared():
    ours, score = chain(), ppn.OnHost(lambda rows: count(rows).double())

    def model():
        x = ours.x0(numpyro.sample("path", ours))
        numpyro.factor("score", score(x))

    posterior = ppn.SMC(model, num_particles=6).run(jax.random.key(0))
    assert posterior.settings["host"]
    mesh = jax.make_mesh((1,), ("particles",))
    with pytest.raises(ValueError, match="on one device; drop the mesh"):
        ppn.SMC(model, num_particles=6, mesh=mesh).run(jax.random.key(0))
    whole = Potential(lambda x0: count(x0).double(), name="count")
    with pytest.raises(ValueError, match="on one device; drop the mesh"):
        ppn.SMC(ours, whole, num_particles=6, mesh=mesh).run(jax.random.key(0))
