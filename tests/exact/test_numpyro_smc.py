"""Particles in JAX: evidence against enumeration, and the numbers of the torch engine."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from numpyro_toys import LENGTH, STEPS, GivenNoise, _x64, chain, log_z, pair, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.numpyro.engine import run_particles
from ppl_diffusion.numpyro.feynman_kac import ChainParticles
from ppl_diffusion.numpyro.noise import FILL, MOVE, RESAMPLE
from ppl_diffusion.numpyro.program import PotentialTarget
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.smc.resampling import RESAMPLERS
from ppl_diffusion.smc.twists import Defensive
from ppl_diffusion.testing import z_score

RUNS = 2000


def log_g(x0):
    return 1.5 * (x0 == 1).sum(-1) - 0.5 * (x0[..., 0] == x0[..., -1])


@pytest.mark.parametrize("twist", ["defensive", None], ids=str)
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_the_evidence_is_unbiased(process, twist):
    """Within 4 standard errors: a false alarm in 16,000 for each of the four."""
    ours = chain(process)
    _, _, exact = log_z(ours, log_g)
    smc = ppn.SMC(ours, log_g, num_particles=8, num_runs=RUNS, twist=twist, ess_threshold=0.9)
    posterior = smc.run(jax.random.key(0))
    assert abs(z_score(torch.exp(posterior.log_evidence - exact), 1.0)) < 4
    assert bool(posterior.resampled.any()) == (twist is not None)


@pytest.mark.parametrize("scheme", list(RESAMPLERS))
def test_every_scheme_is_unbiased(scheme):
    ours = chain()
    _, _, exact = log_z(ours, log_g)
    smc = ppn.SMC(ours, log_g, num_particles=5, num_runs=RUNS, resampler=scheme, ess_threshold=2.0)
    posterior = smc.run(jax.random.key(1))
    assert abs(z_score(torch.exp(posterior.log_evidence - exact), 1.0)) < 4
    assert bool(posterior.resampled[:, :-1].all())


def test_forgotten_weights_are_seen():
    """The mutant: evidence of the last block alone, as if resampling had cost nothing."""
    ours = chain()
    _, _, exact = log_z(ours, log_g)
    smc = ppn.SMC(ours, log_g, num_particles=8, num_runs=RUNS, ess_threshold=2.0)
    posterior = smc.run(jax.random.key(0))
    last = posterior.log_evidence_steps[:, -1] - posterior.log_evidence_steps[:, -2]
    assert abs(z_score(torch.exp(last - exact), 1.0)) > 8


def test_the_posterior_of_sequences():
    """27 shares from 2,000 runs of 16: total variation of the exact law below .02."""
    ours = chain()
    sequences, joint, exact = log_z(ours, log_g)
    posterior = ppn.SMC(ours, log_g, num_particles=16, num_runs=RUNS).run(jax.random.key(2))
    weights = torch.exp(posterior.log_weights + (posterior.log_evidence - exact)[:, None])
    codes = (posterior.x0 * torch.tensor([9, 3, 1])).sum(-1)
    found = torch.bincount(codes.flatten(), weights.flatten(), minlength=27) / RUNS
    assert 0.5 * float((found - torch.exp(tensor(joint) - exact)).abs().sum()) < 0.02
    assert sequences.shape == (27, 3)
    assert posterior.exact
    assert "reverse chain" in posterior.target


def test_the_same_uniforms_give_the_run_of_torch(monkeypatch):
    """Path, weights, ancestors and evidence of 3 runs of 6 particles, to 1e-10."""
    size, fills = (3, 6), 2
    ours, theirs = pair("uniform")
    source = np.random.default_rng(3)
    move = source.random((STEPS + 1, *size, 2, LENGTH))
    fill = source.random((1, *size, fills, LENGTH))
    scheme = RESAMPLERS["systematic"]
    resample = source.random((STEPS, size[0], scheme.num_uniforms(size[1])))
    noise = GivenNoise(
        {MOVE: jnp.asarray(move), FILL: jnp.asarray(fill)} | {RESAMPLE: jnp.asarray(resample)}
    )
    particles = ChainParticles(
        {"x": ours}, PotentialTarget(log_g, "x", 0), Defensive(num_persistent=fills)
    )
    trace = run_particles(particles, noise, size, scheme, 2.0)

    feed = iter(
        [
            move[0, ..., 0, :],
            fill[0],
            *(x for k in range(STEPS) for x in (np.moveaxis(move[k + 1], 2, 0), resample[k])),
        ]
    )
    for where in ("kernels.base", "smc.twists", "kernels.step", "smc.engine"):
        monkeypatch.setattr(
            f"ppl_diffusion.{where}.uniforms",
            lambda shape, **_: torch.tensor(next(feed)).reshape(tuple(shape)),
        )
    model = FeynmanKac(theirs, lambda x: log_g(x).double(), Defensive(num_persistent=fills))
    expected = run_smc(model, size[1], size[0], "systematic", 2.0)
    assert torch.equal(tensor(trace.carry["tokens"]["x"]), expected.x0)
    assert torch.equal(tensor(trace.ancestors).long(), expected.ancestors)
    for name in ("log_weights", "log_evidence_steps", "ess", "log_mass"):
        found = np.asarray(getattr(trace, name))
        np.testing.assert_allclose(found, getattr(expected, name).numpy(), rtol=0, atol=1e-10)


def assay(y, scale=0.5):
    path = numpyro.sample("path", _CHAIN[0])
    x = numpyro.deterministic("x", _CHAIN[0].x0(path))
    gain = numpyro.sample("gain", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(gain + (x == 1).sum(-1), scale), obs=y)


_CHAIN = [None]


@pytest.fixture
def program():
    _CHAIN[0] = chain()
    return assay


def test_the_evidence_of_a_program_with_a_latent(program):
    """The latent is integrated out by hand; 4 standard errors."""
    sequences = _CHAIN[0].marginal().enumerate_support()
    law = dist.Normal((sequences == 1).sum(-1), np.sqrt(1.25))
    joint = _CHAIN[0].marginal().log_prob(sequences) + law.log_prob(2.0)
    exact = float(jax.scipy.special.logsumexp(joint))
    posterior = ppn.SMC(program, num_particles=16, num_runs=RUNS).run(jax.random.key(4), 2.0)
    assert abs(z_score(torch.exp(posterior.log_evidence - exact), 1.0)) < 4
    weights = torch.exp(posterior.log_weights + (posterior.log_evidence - exact)[:, None])
    mean = (weights * posterior.samples["gain"]).sum(-1)
    posterior_mean = float((jnp.exp(joint - exact) * (2.0 - law.loc) / 1.25).sum())
    assert abs(z_score(mean, posterior_mean)) < 4
    assert posterior.samples["path"].shape == (RUNS, 16, STEPS + 1, LENGTH)
    assert posterior.samples["x"].shape == (RUNS, 16, LENGTH)


def test_latents_whose_law_depends_on_the_sequence():
    """Far from what any one guess would say: the evidence, and a mean, within 4 s.e."""
    ours = chain()

    def model():
        x = ours.x0(numpyro.sample("path", ours))
        kind = numpyro.sample("kind", dist.Categorical(jax.nn.one_hot(x[0], 3)))
        shift = numpyro.sample("shift", dist.Normal(5.0 * kind, 0.5))
        numpyro.sample("y", dist.Normal(shift, 1.0), obs=5.0)

    sequences = ours.marginal().enumerate_support()
    law = dist.Normal(5.0 * sequences[:, 0], np.sqrt(1.25)).log_prob(5.0)
    joint = ours.marginal().log_prob(sequences) + law
    exact = float(jax.scipy.special.logsumexp(joint))
    posterior = ppn.SMC(model, num_particles=16, num_runs=RUNS).run(jax.random.key(5))
    share = torch.exp(posterior.log_evidence - exact)
    assert abs(z_score(share, 1.0)) < 4
    centre = float((jnp.exp(joint - exact) * (4.0 * 5.0 * sequences[:, 0] + 5.0) / 5.0).sum())
    mean = (posterior.weights * posterior.samples["shift"]).sum(-1)
    assert abs(z_score(share * (mean - centre), 0.0)) < 4
    kinds = posterior.samples["kind"]
    assert torch.equal(kinds.long(), posterior.samples["path"][..., -1, 0])
    left = posterior.settings["latent_moves"]["left"]
    assert left == dict.fromkeys(["kind", "shift"], "its law depends on the sequences")


def test_two_chains_and_a_plate():
    """Three sequences in a plate and one beside it, under one sum: 4 standard errors."""
    single = chain(length=1, steps=2)

    def model():
        with numpyro.plate("n", 2):
            many = numpyro.sample("many", single)
        one = numpyro.sample("one", single)
        total = (single.x0(many) == 1).sum() + (single.x0(one) == 1).sum()
        numpyro.factor("count", 0.7 * total)

    sequences = single.marginal().enumerate_support()
    own = jnp.exp(single.marginal().log_prob(sequences) + 0.7 * (sequences[:, 0] == 1)).sum()
    posterior = ppn.SMC(model, num_particles=8, num_runs=RUNS).run(jax.random.key(6))
    assert abs(z_score(torch.exp(posterior.log_evidence), float(own) ** 3)) < 4
    assert posterior.samples["many"].shape == (RUNS, 8, 2, 3, 1)


def test_a_population_that_dies_says_so():
    smc = ppn.SMC(chain(), lambda x: jnp.where((x == 9).any(-1), 0.0, -jnp.inf), num_particles=4)
    posterior = smc.run(jax.random.key(0))
    assert float(posterior.log_evidence) == -np.inf
    assert posterior.died_at.tolist() == [STEPS - 1]


def test_a_weight_that_is_no_number_is_refused():
    smc = ppn.SMC(chain(), lambda x: jnp.nan * x.sum(-1), num_particles=4)
    with pytest.raises(ValueError, match="NaN or \\+inf at step"):
        smc.run(jax.random.key(0))


def test_programs_that_it_cannot_move_are_refused(program):
    ours = chain()

    def without():
        numpyro.sample("a", dist.Normal(0.0, 1.0))

    def depends():
        token = numpyro.sample("token", dist.Categorical(jnp.ones(3) / 3))
        prompt = jnp.array([-1, -1, -1]).at[0].set(token)
        numpyro.sample("path", ppn.ReverseChain(ours.kernel, LENGTH, prompt))

    def scaled():
        with numpyro.handlers.scale(scale=2.0):
            numpyro.sample("path", ours)

    def noisy():
        path = numpyro.sample("path", ours)
        numpyro.factor("g", 1.0 * (path[0] == path[-1]).sum())

    def seldom():
        token = numpyro.sample("token", dist.Bernoulli(0.01))
        prompt = jnp.where(token == 1, 1, 2) * jnp.array([1, 0, 0]) - jnp.array([0, 1, 1])
        numpyro.sample("path", ppn.ReverseChain(ours.kernel, LENGTH, prompt))

    def latent_scaled():
        with numpyro.handlers.scale(scale=3.0):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("path", ours)

    def in_part():
        with numpyro.plate("rows", 4, subsample_size=2) as rows:
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=jnp.arange(4.0)[rows])
        numpyro.sample("path", ours)

    def shown():
        path = numpyro.sample("path", ours)
        numpyro.deterministic("masks", (path == 3).sum())

    for program_of, match in (
        (seldom, "depends on what is drawn before"),
        (latent_scaled, "the latent 'z' is scaled"),
        (in_part, "the plate 'rows' shows a random part"),
        (shown, "or a deterministic site, depends on other states"),
    ):
        with pytest.raises(CapabilityError, match=match):
            ppn.SMC(program_of).run(jax.random.key(0))
    with pytest.raises(ValueError, match="one number for each"):
        ppn.SMC(ours, lambda x: (x == 1).sum()).run(jax.random.key(0))
    with pytest.raises(CapabilityError, match="is scaled"):
        ppn.SMC(scaled).run(jax.random.key(0))
    with pytest.raises(CapabilityError, match="other states of a path than the last"):
        ppn.SMC(noisy).run(jax.random.key(0))
    with pytest.raises(CapabilityError, match="leave steer out"):
        ppn.SMC(ppn.steer(assay, potential=log_g)).run(jax.random.key(0), 2.0)
    with pytest.raises(CapabilityError, match="no unobserved ReverseChain"):
        ppn.SMC(without).run(jax.random.key(0))
    with pytest.raises(CapabilityError, match="depends on what is drawn before"):
        ppn.SMC(depends).run(jax.random.key(0))
    with pytest.raises(ValueError, match="program alone"):
        ppn.SMC(ours)
    with pytest.raises(CapabilityError, match="the JAX engine looks ahead by"):
        ppn.SMC(ours, log_g, twist=lambda carry, k: 0.0).run(jax.random.key(0))
    with pytest.raises(ValueError, match="num_particles"):
        ppn.SMC(ours, log_g, num_particles=0)
