"""Stepwise programs with particles: evidence and smoothing against the forward algorithm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import mask, scale, substitute
from numpyro_toys import _x64, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.smc.resampling import RESAMPLERS
from ppl_diffusion.testing import z_score

RUNS, PARTICLES, STATES = 2000, 6, 3
SOURCE = np.random.default_rng(0)
INITIAL = SOURCE.dirichlet(np.ones(STATES))
TRANSITION = SOURCE.dirichlet(np.ones(STATES), STATES)
EMISSION = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
SYMBOLS = np.array([0, 1, 1, 0, 1, 1])
XS = {"k": np.arange(len(SYMBOLS)), "symbol": SYMBOLS}


def forward():
    """Return the log-evidence up to each symbol, and the law of the first state given all."""
    joint = np.diag(INITIAL)  # first state, present state
    totals = []
    for symbol in SYMBOLS:
        joint = joint * EMISSION[:, symbol]
        totals.append(math.log(joint.sum()))
        seen, joint = joint, joint @ TRANSITION
    return np.array(totals), seen.sum(1) / seen.sum()


EXACT, FIRST = forward()


def law(state, x):
    return jnp.where(x["k"] > 0, jnp.asarray(TRANSITION)[state], jnp.asarray(INITIAL))


def hmm(state, x):
    state = numpyro.sample("x", dist.Categorical(law(state, x)))
    seen = dist.Categorical(jnp.asarray(EMISSION)[state])
    numpyro.sample("y", seen, obs=x["symbol"])
    return state, {"state": state, "log_g": seen.log_prob(x["symbol"])}


def guided(state, x):
    """A proposal that knows nothing, and its price."""
    proposal = dist.Categorical(jnp.ones(STATES) / STATES)
    new = numpyro.sample("x", proposal)
    ratio = dist.Categorical(law(state, x)).log_prob(new) - proposal.log_prob(new)
    seen = dist.Categorical(jnp.asarray(EMISSION)[new]).log_prob(x["symbol"])
    numpyro.factor("seen", ratio + seen)
    return new, {"state": new, "log_g": seen}


def scanned(f=hmm, seed=0, **settings):
    chosen = {"num_particles": PARTICLES, "num_runs": RUNS} | settings
    xs = jax.tree.map(jnp.asarray, XS)
    return ppn.smc_scan(f, jnp.asarray(0), xs, key=jax.random.key(seed), **chosen)


@pytest.fixture(scope="module")
def adaptive():
    with jax.enable_x64(True):
        return scanned()


def test_the_evidence_is_unbiased_at_every_step(adaptive):
    """Within 4 standard errors at each of six steps: a false alarm in 2,600."""
    assert 0.05 < float(adaptive.resampled.mean()) < 0.95
    for k, exact in enumerate(EXACT):
        ratios = tensor(jnp.exp(adaptive.log_evidence_steps[:, k] - exact))
        assert abs(z_score(ratios, 1.0)) < 4
    assert (adaptive.log_evidence == adaptive.log_evidence_steps[:, -1]).all()


def test_weights_forgotten_between_resamplings_are_seen(adaptive):
    """The mutant: the product of the steps' mean weights, as if every step had resampled."""
    log_g = adaptive.ys["log_g"]
    wrong = (jax.nn.logsumexp(log_g, -1) - math.log(PARTICLES)).sum(0)
    assert abs(z_score(tensor(jnp.exp(wrong - EXACT[-1])), 1.0)) > 5


@pytest.mark.parametrize("resampler", list(RESAMPLERS))
def test_every_scheme_is_unbiased(resampler):
    """Resampled at every step; within 4 standard errors: a false alarm in 16,000 each."""
    found = scanned(seed=1, resampler=resampler, ess_threshold=2.0)
    assert abs(z_score(tensor(jnp.exp(found.log_evidence - EXACT[-1])), 1.0)) < 4
    assert bool(found.resampled[:, :-1].all())
    assert not bool(found.resampled[:, -1].any())


def test_a_proposal_is_a_site_and_a_factor():
    """4 standard errors: a false alarm in 16,000."""
    found = scanned(guided, seed=2)
    assert abs(z_score(tensor(jnp.exp(found.log_evidence - EXACT[-1])), 1.0)) < 4


def shares(posterior, states):
    """Return the unbiased estimate of each run of ``p(state | y)``, times ``Z_hat / Z``."""
    weights = jnp.exp(posterior.log_weights + (posterior.log_evidence - EXACT[-1])[:, None])
    return tensor((weights[..., None] * (states[..., None] == jnp.arange(STATES))).sum(1))


def test_paths_follow_lineages(adaptive):
    """The first state given all symbols, 4 standard errors for each of three shares.

    The mutant takes for the first states of particles those that stood in their places.
    """
    paths = adaptive.paths["state"]
    assert paths.shape == (RUNS, PARTICLES, len(SYMBOLS))
    assert (paths[..., -1] == adaptive.carry).all()
    right = shares(adaptive, paths[..., 0])
    wrong = shares(adaptive, adaptive.ys["state"][0])
    assert all(abs(z_score(right[:, s], FIRST[s])) < 4 for s in range(STATES))
    assert max(abs(z_score(wrong[:, s], FIRST[s])) for s in range(STATES)) > 8


def walk(level, y):
    level = numpyro.sample("level", dist.Normal(level, 1.0))
    numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
    return level, level


def test_what_a_particle_draws_does_not_depend_on_their_number():
    few, many = (
        ppn.smc_scan(
            walk, 0.0, jnp.ones(3), key=jax.random.key(0), num_particles=n, ess_threshold=0.0
        )
        for n in (4, 7)
    )
    np.testing.assert_array_equal(few.ys, many.ys[:, :, :4])


def test_without_xs_and_resampling_it_is_a_scan():
    def count(carry, x):
        assert x is None
        numpyro.factor("g", -1.0 * carry)
        return carry + 1, None

    found = ppn.smc_scan(count, 0, None, 4, key=jax.random.key(0), num_particles=2)
    assert found.carry.tolist() == [[4, 4]]
    assert found.log_evidence_steps.tolist() == [[0, -1, -3, -6]]
    assert found.ys is None
    assert found.paths is None


def test_it_goes_through_jit_and_vmap():
    def evidence(scale, key):
        def step(level, y):
            level = numpyro.sample("level", dist.Normal(level, scale))
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
            return level, None

        return ppn.smc_scan(step, 0.0, jnp.ones(3), key=key, num_particles=4).log_evidence

    key = jax.random.key(0)
    scales = jnp.array([0.5, 1.0])
    found = jax.jit(jax.vmap(evidence, (0, None)))(scales, key)
    alone = [evidence(scale, key) for scale in scales]
    np.testing.assert_allclose(found, alone, atol=1e-12)


def test_a_substituted_site_is_weighed():
    """Its value came from nobody's draw, so that its density counts."""
    held = ppn.smc_scan(
        lambda c, y: substitute(walk, {"level": jnp.asarray(0.5)})(c, y),
        0.0,
        jnp.ones(1),
        key=jax.random.key(0),
        num_particles=2,
    )
    expected = dist.Normal(0.0, 1.0).log_prob(0.5) + dist.Normal(0.5, 1.0).log_prob(1.0)
    assert float(held.log_evidence[0]) == pytest.approx(float(expected))


def test_scales_and_masks_of_what_is_observed_count():
    def step(carry, x):
        with scale(scale=2.0):
            numpyro.sample("twice", dist.Normal(0.0, 1.0), obs=x)
        with mask(mask=False):
            numpyro.sample("never", dist.Normal(0.0, 1.0), obs=x)
        return carry, None

    found = ppn.smc_scan(step, 0, jnp.ones(1), key=jax.random.key(0), num_particles=2)
    expected = 2 * dist.Normal(0.0, 1.0).log_prob(1.0)
    assert float(found.log_evidence[0]) == pytest.approx(float(expected))


def test_a_dead_population_has_no_evidence():
    def step(carry, x):
        numpyro.factor("g", jnp.where(x > 1, -jnp.inf, 0.0))
        return carry, None

    found = ppn.smc_scan(step, 0, jnp.arange(4), key=jax.random.key(0), num_particles=2)
    assert found.log_evidence_steps.tolist() == [[0, 0, -math.inf, -math.inf]]


def test_what_it_cannot_do_is_refused():
    def run(f, init=0.0, xs=None, **settings):
        xs = jnp.ones(2) if xs is None else xs
        return ppn.smc_scan(f, init, xs, key=jax.random.key(0), num_particles=2, **settings)

    with pytest.raises(CapabilityError, match="the site 'level' is scaled"):
        run(lambda c, y: scale(walk, scale=2.0)(c, y))
    with pytest.raises(ValueError, match="the step takes a carry of"):
        run(lambda c, y: walk(c[0], y), init=(0.0, 0.0))
    with pytest.raises(ValueError, match="the step takes a carry of"):
        run(walk, init=jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"one number of steps, got \[2, 3\]"):
        run(walk, length=3)
    with pytest.raises(ValueError, match=r"one number of steps, got \[\]"):
        ppn.smc_scan(walk, 0.0, None, key=jax.random.key(0))
    with pytest.raises(ValueError, match="must be >= 1"):
        run(walk, num_runs=0)
    with pytest.raises(ValueError, match="NaN or \\+inf at step 1 of run 0"):
        run(lambda c, y: (numpyro.factor("g", y), (c, None))[1], xs=jnp.array([0.0, jnp.nan]))


def test_sites_of_a_step_are_independent():
    """Three normal numbers a step, 20,000 times: correlations within 4 standard errors.

    A false alarm in 1,700 for nine of them; the mutant is a site that is drawn by another's key.
    """

    def step(carry, x):
        key = numpyro.prng_key()
        first = numpyro.sample("first", dist.Normal(0.0, 1.0))
        second = numpyro.sample("second", dist.Normal(0.0, 1.0))
        same = numpyro.sample("same", dist.Normal(0.0, 1.0), rng_key=key)
        return carry, jnp.array([jax.random.normal(key), first, second, same])

    found = ppn.smc_scan(
        step, 0, None, 2, key=jax.random.key(0), num_particles=20_000, ess_threshold=0.0
    )
    draws = np.asarray(jnp.concatenate([found.ys[0, 0, :, :3], found.ys[1, 0, :, :1]], -1))
    apart = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    assert np.abs(apart).max() < 4 / np.sqrt(len(draws))
    assert np.abs(np.corrcoef(found.ys[0, 0, :, [0, 3]])[0, 1]) > 0.99


def test_inside_of_a_program_only_its_evidence_is_seen():
    """Its sites stay inside, and one that was given a key of its own is weighed where observed."""
    key = jax.random.key(0)

    def step(level, y):
        level = numpyro.sample("level", dist.Normal(level, 1.0))
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y, rng_key=key)
        return level, level

    def model():
        found = ppn.smc_scan(step, 0.0, jnp.array([0.3, 1.0]), key=key, num_particles=4)
        numpyro.factor("f", found.log_evidence[0])

    sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    assert list(sites) == ["f"]
    assert float(sites["f"]["fn"].log_factor) < 0


def test_parts_of_plates_are_refused():
    def step(level, y):
        with numpyro.plate("rows", 4, subsample_size=2):
            numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
        return level, level

    with pytest.raises(CapabilityError, match="a random part of what it holds"):
        ppn.smc_scan(step, 0.0, jnp.zeros(2), key=jax.random.key(0), num_particles=4)
    with pytest.raises(ValueError, match="ess_threshold must be >= 0"):
        ppn.smc_scan(step, 0.0, jnp.zeros(2), key=jax.random.key(0), ess_threshold=float("nan"))
