"""Conditional SMC in JAX leaves the posterior alone, and NUTS moves the rest beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, HMCGibbs
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, Gibbs
from numpyro_toys import PROCESSES, _x64, chain, log_z, table, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.conditional import RetainedParticles, sweep
from ppl_diffusion.numpyro.denoisers import register
from ppl_diffusion.numpyro.noise import KeyNoise
from ppl_diffusion.numpyro.program import PotentialTarget
from ppl_diffusion.smc.conditional import ConditionalMultinomial
from ppl_diffusion.smc.resampling import Multinomial
from ppl_diffusion.smc.twists import Defensive
from ppl_diffusion.testing import chi_square_p_value

DRAWS, SWEEPS, PARTICLES = 20_000, 5, 3


def log_g(x0):
    return 1.5 * (x0 == 1).sum(-1) - 0.5 * (x0[..., 0] == x0[..., -1])


def enumerated(ours):
    """Return all paths of a tiny chain, and their exact posterior probabilities."""
    paths = ours.enumerate_support()
    p = np.exp(np.asarray(ours.log_prob(paths) + log_g(ours.x0(paths))))
    return paths, p / p.sum()


def exact_paths(ours, seed=0):
    """Return independent draws of ``p(path) G(x0) / Z``."""
    paths, p = enumerated(ours)
    return paths[np.random.default_rng(seed).choice(len(p), DRAWS, p=p)]


def swept(ours, paths, scheme):
    def one(paths, key):
        target = PotentialTarget(log_g, "x", 0)
        particles = RetainedParticles({"x": ours}, target, Defensive(), {"x": paths})
        done = sweep(particles, KeyNoise(key), (DRAWS, PARTICLES), 2.0, scheme)
        return done.paths["x"], done.slot

    return jax.lax.scan(one, paths, jax.random.split(jax.random.key(1), SWEEPS))


def distance(ours, paths, states=(-1,)):
    """Return the p-value of a chi-square test of some states against their exact joint law."""
    every, p = enumerated(ours)

    def codes(paths):
        digits = paths[:, jnp.array(states)].reshape(len(paths), -1)
        return np.asarray(digits @ 4 ** jnp.arange(digits.shape[-1]))

    size = 4 ** (2 * len(states))
    counts = np.bincount(codes(paths), minlength=size)
    exact = np.bincount(codes(every), p, minlength=size)
    return chi_square_p_value(tensor(counts), tensor(exact))


class Wrong(TableDenoiser):
    """A network that takes pure noise for data, so that a first state matters to what follows."""

    def __call__(self, tokens, t, /):
        return super().__call__(tokens, 0.2)


register(Wrong, ("joint",))


def wrong_chain():
    process = PROCESSES["uniform"]
    kernel = ppn.InterpolatingKernel(process, Wrong(jnp.asarray(table(2)), process), num_steps=3)
    return ppn.ReverseChain(kernel, 2)


@pytest.mark.parametrize("process", ["absorbing", "wrong"])
def test_five_sweeps_leave_the_target_alone(process):
    """From 20,000 exact draws; a false alarm in 10,000."""
    ours = wrong_chain() if process == "wrong" else chain(length=2, steps=3)
    paths, slots = swept(ours, exact_paths(ours), ConditionalMultinomial())
    assert distance(ours, paths) > 1e-4
    assert distance(ours, paths, (0, 1)) > 1e-4  # the noisiest states are held, too
    assert 0.2 < float((slots > 0).mean()) < 0.8


class Sorted(ConditionalMultinomial):
    """The mutant: ancestors in order, which are not exchangeable with slot 0."""

    def _ancestors(self, uniforms, weights):
        drawn = jnp.sort(Multinomial()._ancestors(uniforms, weights), axis=-1)
        return jnp.concatenate([jnp.zeros_like(drawn[..., :1]), drawn[..., 1:]], -1)


def test_sorted_ancestors_do_not():
    ours = chain(length=2, steps=3)
    paths, _ = swept(ours, exact_paths(ours), Sorted())
    assert distance(ours, paths) < 1e-6


Y = 2.5


def model(ours):
    def program():
        x = numpyro.deterministic("x", ours.x0(numpyro.sample("path", ours)))
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(gain * (1 + (x == 1).sum(-1)), 0.5), obs=Y)

    return program


def exact(ours):
    """Return the law of the sequences, and mean and variance of the gain.

    Enumeration, and trapezoids over 2,001 gains up to 6; the integrand vanishes at both ends.
    """
    sequences, gains = ours.marginal().enumerate_support(), np.linspace(1e-6, 6.0, 2001)
    mean = gains[:, None] * np.asarray(1 + (sequences == 1).sum(-1))
    joint = dist.LogNormal(0.0, 0.5).log_prob(gains)[:, None] + dist.Normal(mean, 0.5).log_prob(Y)
    weights = np.exp(np.asarray(joint + ours.marginal().log_prob(sequences)))
    weights /= weights.sum()
    first = float(weights.sum(1) @ gains)
    return weights.sum(0), first, float(weights.sum(1) @ (gains - first) ** 2)


def errors(samples, ours):
    """Return standard errors of mean and variance of the gain, and TV of the sequences over room.

    Numbers of effective draws are those of the moments and of the indicators themselves.
    """
    weights, mean, variance = exact(ours)
    gain = np.asarray(samples["gain"])
    codes = np.asarray(samples["path"][:, -1] @ np.array([3, 1]))
    z = [standard(x, m) for x, m in ((gain, mean), ((gain - mean) ** 2, variance))]
    return *z, excess(codes, weights)


def excess(codes, weights):
    """Return the total variation of draws from their exact law, over the room it has.

    Above its mean, which is below the sum of the standard errors, it rises by
    ``sqrt(log(1e4) / 2 n)`` once in 10,000 (McDiarmid).
    """
    seen = (codes[:, None] == np.arange(len(weights))).astype(float)
    n = effective_sample_size(seen[None])
    room = 0.5 * np.sqrt(weights * (1 - weights) / n).sum() + np.sqrt(np.log(1e4) / 2 / n.min())
    return 0.5 * np.abs(seen.mean(0) - weights).sum() / room


def standard(draws, exact):
    return abs(draws.mean() - exact) * np.sqrt(effective_sample_size(draws[None])) / draws.std()


def run(kernel, fields=()):
    mcmc = MCMC(kernel, num_warmup=200, num_samples=3000, progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=fields)
    return mcmc


def check_joint(mcmc, ours):
    """Within 4 standard errors, and the room of the total variation: 1 false alarm in 4,000."""
    mean, variance, distance = errors(mcmc.get_samples(), ours)
    assert max(mean, variance) < 4
    assert distance < 1


def test_nuts_and_conditional_smc_infer_jointly():
    ours = chain(length=2, steps=3)
    program = model(ours)
    kernel = Gibbs([(ppn.ParticleGibbs(program, num_particles=6), ["path"]), (NUTS(program), None)])
    mcmc = run(kernel, ("block_states.0.moved", "block_states.1.diverging"))
    check_joint(mcmc, ours)
    extra = mcmc.get_extra_fields()
    assert 0.2 < float(extra["block_states.0.moved"].mean()) < 1
    assert int(extra["block_states.1.diverging"].sum()) == 0


class Stale(ppn.ParticleGibbs):
    """The mutant: sequences move as if the gain were a fifth."""

    def sample(self, state, model_args, model_kwargs):
        sites = {**model_kwargs[GIBBS_SITES_KWARG], "gain": jnp.full((), 0.2)}
        return super().sample(state, model_args, {**model_kwargs, GIBBS_SITES_KWARG: sites})


def test_sweeps_at_another_gain_do_not():
    ours = chain(length=2, steps=3)
    program = model(ours)
    kernel = Gibbs([(Stale(program, num_particles=6), ["path"]), (NUTS(program), None)])
    mean, _, distance = errors(run(kernel).get_samples(), ours)
    assert mean > 8
    assert distance > 2


def test_the_form_of_older_versions():
    ours = chain(length=2, steps=3)
    program = model(ours)
    update = ppn.particle_gibbs_fn(program, num_particles=6)
    check_joint(run(HMCGibbs(NUTS(program), gibbs_fn=update, gibbs_sites=["path"])), ours)


def test_alone_it_samples_chains():
    """4,000 sweeps: total variation of 9 sequences below .06."""
    ours = chain(length=2, steps=3)

    def program():
        x = numpyro.deterministic("x", ours.x0(numpyro.sample("path", ours)))
        numpyro.factor("g", log_g(x))

    kernel = ppn.ParticleGibbs(program, num_particles=8)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    samples = mcmc.get_samples()
    assert np.array_equal(samples["x"], samples["path"][:, -1])
    _, joint, log_norm = log_z(ours, log_g)
    codes = np.asarray(samples["x"] @ np.array([3, 1]))
    found = np.bincount(codes, minlength=9) / len(codes)
    assert 0.5 * np.abs(found - np.exp(np.asarray(joint) - log_norm)).sum() < 0.06


@pytest.mark.parametrize("together", [True, False])
def test_several_chain_sites(together):
    """In one block, or in a block each: beyond the room of the total variation once in 10,000."""
    ours = chain(length=1, steps=2)

    def log_joint(a, b):
        return 1.5 * (a == b) + 0.5 * (a == 1)

    def program():
        a, b = (ours.x0(numpyro.sample(name, ours))[0] for name in ("a", "b"))
        numpyro.factor("g", log_joint(a, b))

    def sweeps():
        return ppn.ParticleGibbs(program, num_particles=4)

    kernel = sweeps() if together else Gibbs([(sweeps(), ["a"]), (sweeps(), ["b"])])
    samples = run(kernel).get_samples()
    a, b = (index.ravel() for index in np.indices((3, 3)))
    prior = np.exp(np.asarray(ours.marginal().log_prob(jnp.arange(3)[:, None])))
    law = prior[a] * prior[b] * np.exp(log_joint(a, b))
    exact = np.bincount((a == 1) + 2 * (b == 1), law / law.sum())
    ones = (np.asarray(samples[name][:, -1, 0] == 1) for name in ("a", "b"))
    assert excess(next(ones) + 2 * next(ones), exact) < 1


def test_what_it_cannot_do_is_refused():
    ours = chain(length=2, steps=3)
    with pytest.raises(ValueError, match="num_particles must be >= 2"):
        ppn.ParticleGibbs(model(ours), num_particles=1)
    with pytest.raises(CapabilityError, match="moves chains and not gain"):
        MCMC(ppn.ParticleGibbs(model(ours)), num_warmup=1, num_samples=1, progress_bar=False).run(
            jax.random.key(0)
        )


def test_chains_given_chains_are_refused():
    ours = chain(length=1, steps=2)

    def program():
        first = ours.x0(numpyro.sample("first", ours))
        numpyro.sample("second", ppn.ReverseChain(ours.kernel, 1, first - 1))

    kernel = ppn.ParticleGibbs(program)
    state = kernel.init(jax.random.key(0), 0, None, (), {})
    with pytest.raises(CapabilityError, match="law of the chain 'second' depends on another"):
        kernel.sample(state, (), {})
