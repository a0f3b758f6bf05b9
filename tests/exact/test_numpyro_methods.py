"""Methods of inference on the JAX engine: exact evidence, and the numbers of torch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpyro_toys import LENGTH, STEPS, GivenNoise, _x64, chain, log_z, pair, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion import inference
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import FKSteering, SoftValueGuidance, TwistedSampler
from ppl_diffusion.numpyro import methods
from ppl_diffusion.numpyro.engine import run_particles
from ppl_diffusion.numpyro.noise import FILL, MOVE, PICK, RESAMPLE
from ppl_diffusion.numpyro.program import PotentialTarget
from ppl_diffusion.smc import PersistentFill
from ppl_diffusion.smc.resampling import RESAMPLERS
from ppl_diffusion.testing import z_score

RUNS, SIZE = 4000, 4
SOFT = SoftValueGuidance(num_children=3, alpha=2.0, twist=PersistentFill(2, 0.2))
TWISTED = TwistedSampler(twist=PersistentFill(3, 0.3), proposal="reweighted")
CASES = {
    "importance-sampling": inference.ImportanceSampling(),
    "argmax": inference.Bootstrap(twist="argmax"),
    "difference": FKSteering(every=2, interval=(1, 3)),
    "max": FKSteering(kind="max"),
    "sum": FKSteering(kind="sum", twist=PersistentFill(2)),
    "soft-value": SOFT,
    "twisted": TWISTED,
}


def log_g(x0):
    return 1.5 * (x0 == 1).sum(-1) - 0.5 * (x0[..., 0] == x0[..., -1])


def weak(x0):
    """Return a potential that greed does not carry away: sums of scores have heavy tails."""
    return 0.3 * log_g(x0)


def score_of(method, process="absorbing", potential=log_g):
    """Return how many standard errors the evidence is from the enumerated one."""
    ours = chain(process)
    smc = ppn.SMC(
        ours, potential, method=method, num_particles=SIZE, num_runs=RUNS, ess_threshold=0.9
    )
    posterior = smc.run(jax.random.key(0))
    exact = log_z(ours, potential)[2]
    return abs(z_score(torch.exp(posterior.log_evidence - exact), 1.0)), posterior


@pytest.mark.parametrize("name", list(CASES))
def test_the_evidence_is_unbiased(name):
    """Within 4 standard errors: a false alarm in 16,000 for each of the seven."""
    process = "uniform" if name in ("twisted", "soft-value", "max") else "absorbing"
    score, posterior = score_of(CASES[name], process, weak if name == "sum" else log_g)
    assert score < 4
    assert posterior.exact
    assert posterior.settings["method"] == CASES[name].name


def test_a_choice_that_is_not_paid_for_is_seen(monkeypatch):
    """The mutant: children are chosen as before, and nothing pays."""
    move = methods.SoftValueParticles.move

    def unpaid(self, *args):
        carry, paid = move(self, *args)
        return carry, jnp.zeros_like(paid)

    monkeypatch.setattr(methods.SoftValueParticles, "move", unpaid)
    jax.clear_caches()
    assert score_of(SOFT, "uniform")[0] > 8
    jax.clear_caches()


def test_a_proposal_that_is_not_paid_for_is_seen(monkeypatch):
    """The mutant: the tilted step is taken for the model's own."""
    monkeypatch.setattr("ppl_diffusion.numpyro.feynman_kac._ratio", lambda *_: jnp.zeros(()))
    jax.clear_caches()
    assert score_of(TWISTED, "uniform")[0] > 8
    jax.clear_caches()


@pytest.mark.parametrize("name", ["sum", "twisted", "soft-value"])
def test_the_same_uniforms_give_the_run_of_torch(name, monkeypatch):
    """Tokens, weights, ancestors and evidence of 3 runs of 6 particles, to 1e-10."""
    method, size = CASES[name], (3, 6)
    children = method.num_children if name == "soft-value" else 1
    fills = method.twist.num_fills
    ours, theirs = pair("uniform")
    source = np.random.default_rng(3)
    start = source.random((1, *size, 2, LENGTH))
    move = source.random((STEPS, size[0], size[1] * children, 2, LENGTH))
    fill = source.random((1, *size, fills, LENGTH))
    pick = source.random((STEPS, *size))
    scheme = RESAMPLERS["systematic"]
    resample = source.random((STEPS, size[0], scheme.num_uniforms(size[1])))
    noise = _Given(
        {
            MOVE: jnp.asarray(move),
            FILL: jnp.asarray(fill),
            RESAMPLE: jnp.asarray(resample),
            PICK: jnp.asarray(pick),
        },
        jnp.asarray(start),
    )
    target = PotentialTarget(log_g, "x", 0)
    particles = methods.particles_of(method, {"x": ours}, target, None)
    trace = run_particles(particles, noise, size, scheme, 2.0)

    def feed():
        yield from (start[0, ..., 0, :], fill[0])
        for k in range(STEPS):
            yield np.moveaxis(move[k], 2, 0)
            if children > 1:
                yield pick[k]
            if k < STEPS - 1:
                yield resample[k]

    given = feed()
    for where in (
        "kernels.base",
        "smc.twists",
        "kernels.step",
        "smc.engine",
        "inference.soft_value",
    ):
        monkeypatch.setattr(
            f"ppl_diffusion.{where}.uniforms",
            lambda shape, **_: torch.tensor(next(given)).reshape(tuple(shape)),
        )
    expected = inference.SMC(
        theirs,
        lambda x: log_g(x).double(),
        method=method,
        num_particles=size[1],
        num_runs=size[0],
        ess_threshold=2.0,
    ).run()
    assert torch.equal(tensor(trace.carry["tokens"]["x"]), expected.x0)
    assert torch.equal(tensor(trace.ancestors).long(), expected.ancestors)
    for field in ("log_weights", "log_evidence_steps", "ess"):
        found = np.asarray(getattr(trace, field))
        np.testing.assert_allclose(found, getattr(expected, field).numpy(), rtol=0, atol=1e-10)


class _Given(GivenNoise):
    """Noise out of arrays, with a start of its own, as children are more than their parents."""

    start: jax.Array = eqx.field(default=None)

    def particles(self, use, k, shape, size):
        if use == MOVE:
            rows = self.start[0] if isinstance(k, int) and k == 0 else self.arrays[MOVE][k - 1]
            return rows.reshape(*size, *shape)
        return super().particles(use, k - 1 if use == PICK else k, shape, size)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (inference.GuidedLineages(), "and not guided-lineages"),
        (FKSteering(kind="max", closing="published"), "which is not exact"),
        (SoftValueGuidance(weighted=False), "nothing pays for"),
        (SoftValueGuidance(alpha=0.5), "alpha < 1"),
        (inference.Bootstrap(twist_every=2), "twist_every"),
        (TwistedSampler(top=2), "one by one"),
        (TwistedSampler(proposal="clamped"), "move by their chains"),
    ],
)
def test_what_only_torch_has_is_refused(method, match):
    with pytest.raises(CapabilityError, match=match):
        ppn.SMC(chain(), log_g, method=method).run(jax.random.key(0))
