"""Handlers of NumPyro programs: unbiased weights, held tokens, steps written out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.handlers import condition, seed, trace
from numpyro.infer.util import log_density
from numpyro_toys import LENGTH, STEPS, _x64, chain, log_z  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.errors import CapabilityError

DRAWS = 20_000


def log_g(x0):
    return 1.5 * (x0 == 1).sum(-1) - 0.5 * (x0[..., 0] == x0[..., -1])


def program(ours, count=DRAWS):
    def model():
        with numpyro.plate("draws", count):
            x = ours.x0(numpyro.sample("path", ours))
            numpyro.factor("g", log_g(x))

    return model


def weights(model, key=0):
    """Return the log importance weight of each draw of a handled program."""
    sites = trace(seed(model, jax.random.key(key))).get_trace()
    return sum(
        site["fn"].log_prob(site["value"], site["intermediates"])
        if site["intermediates"]
        else site["fn"].log_prob(site["value"])
        for site in sites.values()
        if site["type"] == "sample"
    )


def check_mean(log_w, exact):
    """Within 4 standard errors."""
    ratio = np.exp(np.asarray(log_w) - exact)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_a_twist_is_paid_for(process):
    """A useful one, and one that points the other way."""
    ours = chain(process)
    _, _, exact = log_z(ours, log_g)
    for sign in (1.0, -1.0):
        tilted = ppn.twist(
            program(ours), logits=lambda z, k, log_c, s=sign: s * jnp.array([0.0, 1.0, 0.0])
        )
        check_mean(weights(tilted), exact)


def test_a_twist_without_its_weight_is_seen():
    ours = chain()
    _, _, exact = log_z(ours, log_g)
    tilted = ppn.twist(program(ours), logits=lambda z, k, log_c: jnp.array([0.0, 1.0, 0.0]))
    sites = trace(seed(tilted, jax.random.key(0))).get_trace()
    log_w = np.asarray(log_g(ours.x0(sites["path"]["value"])))
    ratio = np.exp(log_w - exact)
    assert abs(ratio.mean() - 1) > 8 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_a_clamp_conditions(process):
    ours = chain(process)
    sequences, joint, _ = log_z(ours, log_g)
    exact = float(jax.scipy.special.logsumexp(jnp.where(sequences[:, 1] == 2, joint, -jnp.inf)))
    held = ppn.clamp(program(ours), tokens=jnp.array([-1, 2, -1]))
    check_mean(weights(held), exact)
    sites = trace(seed(held, jax.random.key(1))).get_trace()
    x = ours.x0(sites["path"]["value"])
    assert bool((x[:, 1] == 2).all())
    free = sites["path"]["value"].at[:, -1, 1].set(0)
    assert bool((sites["path"]["fn"].log_prob(free) == -jnp.inf).all())


def test_a_clamp_inside_smc_is_a_part_of_the_evidence():
    ours = chain()
    sequences, joint, _ = log_z(ours, log_g)
    exact = float(jax.scipy.special.logsumexp(jnp.where(sequences[:, 1] == 2, joint, -jnp.inf)))
    held = ppn.clamp(program(ours, 1), tokens=jnp.array([-1, 2, -1]))
    posterior = ppn.SMC(held, num_particles=8, num_runs=2000).run(jax.random.key(2))
    check_mean(posterior.log_evidence.numpy(), exact)
    assert bool((posterior.x0[..., 1] == 2).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_steering_is_paid_for(sign):
    ours = chain()
    _, _, exact = log_z(ours, log_g)
    steered = ppn.steer(
        program(ours, 3000), potential=lambda x: sign * (x == 1).sum(-1), num_particles=4
    )
    check_mean(weights(steered), exact)


def test_order_of_seed_does_not_matter():
    ours = chain()
    handlers = {
        "clamp": lambda fn: ppn.clamp(fn, tokens=jnp.array([-1, 2, -1])),
        "twist": lambda fn: ppn.twist(fn, logits=lambda z, k, log_c: 0.0 * log_c),
        "unroll": ppn.unroll,
    }
    for handled in handlers.values():
        inside = trace(handled(seed(program(ours, 3), jax.random.key(0)))).get_trace()
        outside = trace(seed(handled(program(ours, 3)), jax.random.key(0))).get_trace()
        assert np.array_equal(inside["path"]["value"], outside["path"]["value"])


def test_unrolled_steps_have_the_density_of_the_path():
    ours = chain("uniform", prompt=[-1, 2, -1])

    def model():
        numpyro.sample("path", ours)

    sites = trace(seed(ppn.unroll(model), jax.random.key(0))).get_trace()
    names = [f"path_{k}" for k in range(STEPS + 1)]
    assert [name for name in sites if name != "path"] == names
    total = sum(sites[name]["fn"].log_prob(sites[name]["value"]) for name in names)
    path = sites["path"]["value"]
    np.testing.assert_allclose(total, ours.log_prob(path), atol=1e-10)
    known = condition(model, data={"path": path})
    joint, _ = log_density(ppn.unroll(known), (), {}, {})
    np.testing.assert_allclose(joint, ours.log_prob(path), atol=1e-10)


def test_a_constant_chain_is_not_scored():
    ours = chain()

    def model():
        numpyro.sample("path", ours)

    path = ours.sample(jax.random.key(0))
    joint, _ = log_density(ppn.constant(model), (), {}, {"path": path})
    assert float(joint) == 0


def test_what_cannot_be_done_is_refused():
    ours = chain()

    def without():
        numpyro.sample("a", numpyro.distributions.Normal(0.0, 1.0))

    psi = {"logits": lambda z, k, log_c: 0.0 * log_c}
    with pytest.raises(ValueError, match="has no chain site"):
        seed(ppn.twist(without, **psi), jax.random.key(0))()
    with pytest.raises(ValueError, match="5 tokens for the chain 'path' of 3"):
        seed(ppn.clamp(program(ours, 1), tokens=jnp.full(5, -1)), jax.random.key(0))()
    with pytest.raises(CapabilityError, match="twisted already"):
        seed(ppn.twist(ppn.twist(program(ours, 1), **psi), **psi), jax.random.key(0))()
    assert LENGTH == 3


def test_clamps_that_cannot_be_are_refused():
    """As in torch: what would be forgotten, contradicts itself, or is no token."""

    def model(ours):
        return lambda: numpyro.sample("path", ours)

    def drawn(program):
        return trace(seed(program, 0)).get_trace()

    tokens = jnp.array([1, -1, -1])
    held = ppn.clamp(model(chain()), tokens=tokens)
    with pytest.raises(CapabilityError, match="its steps would forget"):
        drawn(ppn.unroll(held))
    with pytest.raises(CapabilityError, match="mask it again"):
        drawn(ppn.clamp(model(chain(kappa=0.5)), tokens=tokens))
    drawn(ppn.clamp(model(chain("uniform", kappa=0.5)), tokens=tokens))
    for other in (held, model(chain(prompt=[0, -1, -1]))):
        with pytest.raises(ValueError, match="have to agree"):
            drawn(ppn.clamp(other, tokens=jnp.array([2, -1, -1])))
    with pytest.raises(ValueError, match="clean token ids"):
        drawn(ppn.clamp(model(chain()), tokens=jnp.array([3, -1, -1])))
    with pytest.raises(TypeError, match="integer ids"):
        drawn(ppn.clamp(model(chain()), tokens=jnp.array([1.5, -1, -1])))
