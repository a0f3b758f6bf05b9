"""Torch and JAX, same uniforms: same tokens, same weights, same ancestors.

JAX runs with 64-bit numbers inside a context, so that no other test sees the switch; a last test
runs everything in JAX's default 32 bits, where warnings are errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_diffusion.kernels import Cosine, Linear, LogLinear
from ppl_diffusion.kernels.kappa_rules import kappa_room
from ppl_diffusion.processes import (
    draw_categorical,
    log_posterior_mean,
    mixture_log_prob,
    mixture_sample,
    nelbo_terms,
    posterior_to_cavity,
    step_kl,
)
from ppl_diffusion.smc import RESAMPLERS, Weights
from ppl_diffusion.testing import PROCESSES, toy_process

RNG = np.random.default_rng(0)
SHAPE = (40, 6)
each_process = pytest.mark.parametrize("name", PROCESSES)


@pytest.fixture
def _x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


def batch(process, seed=0):
    """Return ``(x0, z, log_c, u_move, u_token, t)`` in NumPy."""
    rng = np.random.default_rng(seed)
    x0 = rng.integers(process.vocab_size, size=SHAPE)
    z = rng.integers(process.num_states, size=SHAPE)
    log_c = np.log(rng.dirichlet(np.ones(process.vocab_size), size=SHAPE))
    u_move, u_token = rng.uniform(size=(2, *SHAPE))
    return x0, z, log_c, u_move, u_token, rng.uniform(0.05, 0.95, size=(SHAPE[0], 1))


def both(fn, *arrays):
    """Call a function on torch and on JAX arrays and return both results as NumPy."""
    here = fn(*[torch.as_tensor(a) for a in arrays])
    there = fn(*[jnp.asarray(a) for a in arrays])
    assert isinstance(here, torch.Tensor)
    assert isinstance(there, jax.Array)
    return here.numpy(), np.asarray(there)


def assert_same(fn, *arrays, exact=False):
    here, there = both(fn, *arrays)
    assert here.dtype == there.dtype
    if exact:
        np.testing.assert_array_equal(here, there)
    else:
        np.testing.assert_allclose(here, there, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("_x64")
@each_process
@pytest.mark.parametrize("kappa", [1.0, 0.4])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.3), (0.3, 0.7), (0.6, 1.0), (0.5, 0.5)])
def test_steps(name, kappa, a, b):
    """Same uniforms, same tokens; same densities."""
    process = toy_process(name)
    _, z, log_c, u_move, u_token, _ = batch(process)
    assert_same(
        lambda z, c, u, v: mixture_sample(process, z, c, a, b, u, v, kappa),
        *(z, log_c, u_move, u_token),
        exact=True,
    )
    j = mixture_sample(process, *map(torch.as_tensor, (z, log_c)), a, b,
                       *map(torch.as_tensor, (u_move, u_token)), kappa).numpy()  # fmt: skip
    assert_same(lambda z, j, c: mixture_log_prob(process, z, j, c, a, b, kappa), z, j, log_c)


@pytest.mark.usefixtures("_x64")
@each_process
def test_steps_with_a_kappa_per_site(name):
    """Also below zero, where a non-absorbing site may need its whole row."""
    process, a, b = toy_process(name), 0.2, 0.7
    _, z, log_c, u_move, u_token, _ = batch(process)
    low = 0.99 * float(kappa_room(process, np.array([a, b]))[0])
    kappa = np.linspace(low, 1.0, SHAPE[1])
    arrays = (z, log_c, u_move, u_token, kappa)
    assert_same(
        lambda z, c, u, v, kappa: mixture_sample(process, z, c, a, b, u, v, kappa),
        *arrays,
        exact=True,
    )
    assert_same(
        lambda z, c, kappa: mixture_log_prob(process, z, z, c, a, b, kappa), z, log_c, kappa
    )


@pytest.mark.usefixtures("_x64")
@each_process
def test_whole_chains(name):
    """A chain driven by shared uniforms, with a denoiser that is a function of the state."""
    process, num_steps = toy_process(name), 6
    uniforms = RNG.uniform(size=(num_steps + 1, 2, *SHAPE))
    alphas = process.schedule.alpha(np.linspace(1, 0, num_steps + 1))
    logits = np.random.default_rng(1).normal(size=(process.num_states, 6, 3))
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def run(wrap):
        z = process.corrupt(wrap(np.zeros(SHAPE, np.int64)), 0.0, *wrap(uniforms[0]))
        log_p = 0
        for k in range(num_steps):
            a, b = float(alphas[k]), float(alphas[k + 1])
            log_c = wrap(table)[
                z[:, ::-1] if wrap is jnp.asarray else z.flip(1), wrap(np.arange(6))
            ]
            moved = mixture_sample(process, z, log_c, a, b, *wrap(uniforms[k + 1]))
            log_p = log_p + mixture_log_prob(process, z, moved, log_c, a, b).sum(-1)
            z = moved
        return np.asarray(z), np.asarray(log_p)

    (here, log_here), (there, log_there) = run(torch.as_tensor), run(jnp.asarray)
    np.testing.assert_array_equal(here, there)
    np.testing.assert_allclose(log_here, log_there, rtol=1e-12)


@pytest.mark.usefixtures("_x64")
@each_process
def test_processes_and_bounds(name):
    process = toy_process(name)
    x0, z, log_c, u_move, u_token, t = batch(process)
    a = process.schedule.alpha(t)
    assert_same(lambda x, a, u, v: process.corrupt(x, a, u, v), x0, a, u_move, u_token, exact=True)
    assert_same(process.draw_prior, u_token, exact=True)
    assert_same(process.prior_prob, z)
    z = process.corrupt(*map(torch.as_tensor, (x0, a, u_move, u_token))).numpy()
    assert_same(lambda *args: nelbo_terms(process, *args), x0, z, log_c, t)
    assert_same(lambda *args: step_kl(process, *args, 0.3, 0.6, 0.8), x0, z, log_c)
    assert_same(lambda z, c: log_posterior_mean(process, z, c, 0.3), z, log_c)
    assert_same(lambda z, c: posterior_to_cavity(process, z, c, 0.3), z, log_c)
    assert_same(draw_categorical, log_c, u_token, exact=True)


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("schedule", [Linear(), LogLinear(), Cosine()], ids=repr)
def test_schedules(schedule):
    t = np.linspace(0, 1, 101)
    for name in ("alpha", "alpha_prime", "log1m_alpha"):
        assert_same(getattr(schedule, name), t)
    assert_same(schedule.time_from_log1m, np.linspace(-30, 0, 101))


def log_weights(runs=20, n=9):
    values = np.random.default_rng(2).normal(size=(runs, n)) * 3
    values[np.random.default_rng(3).uniform(size=values.shape) < 0.3] = -np.inf
    values[0] = -np.inf
    return values


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=list(RESAMPLERS))
def test_same_ancestors(scheme):
    values = log_weights()
    uniforms = RNG.uniform(size=(len(values), scheme.num_uniforms(values.shape[1])))
    assert_same(scheme, uniforms, values, exact=True)


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize("name", ["log_sum", "log_mean", "log_normalised", "normalised", "ess"])
def test_same_weights(name):
    assert_same(lambda w: getattr(Weights(w).add(0.5 * w), name), log_weights())


@pytest.mark.usefixtures("_x64")
def test_gradients_agree_and_avoid_nan():
    process = toy_process("absorbing")
    _, z, log_c, _, _, _ = batch(process)
    j = np.where(z < 3, (z + 1) % 3, 0)  # visible tokens cannot move: -inf, masked

    def total(xp, c):
        log_p = mixture_log_prob(process, xp.asarray(z), xp.asarray(j), c, 0.3, 0.7)
        return xp.where(log_p > -np.inf, log_p, 0.0).sum()

    leaf = torch.tensor(log_c, requires_grad=True)
    total(torch, leaf).backward()
    there = jax.grad(lambda c: total(jnp, c))(jnp.asarray(log_c))
    assert bool(jnp.isfinite(there).all())
    np.testing.assert_allclose(leaf.grad.numpy(), np.asarray(there), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_x64")
def test_step_compiles():
    """The maths holds no host value: it runs under ``jax.jit`` with the same result."""
    process = toy_process("uniform")
    _, z, log_c, u_move, u_token, _ = batch(process)

    def step(z, c, u, v):
        moved = mixture_sample(process, z, c, 0.3, 0.7, u, v, 0.8)
        return moved, mixture_log_prob(process, z, moved, c, 0.3, 0.7, 0.8)

    arrays = [jnp.asarray(x) for x in (z, log_c, u_move, u_token)]
    plain, compiled = step(*arrays), jax.jit(step)(*arrays)
    np.testing.assert_array_equal(*[np.asarray(x[0]) for x in (plain, compiled)])
    np.testing.assert_allclose(*[np.asarray(x[1]) for x in (plain, compiled)], rtol=1e-12)


@each_process
def test_default_precision_of_jax_gives_no_warning(name):
    """Without x64 everything runs in float32, silently and close to the float64 numbers."""
    process = toy_process(name)
    x0, z, log_c, u_move, u_token, t = batch(process)
    arrays = [jnp.asarray(x) for x in (z, log_c, u_move, u_token)]
    moved = mixture_sample(process, arrays[0], arrays[1], 0.3, 0.7, *arrays[2:], 0.8)
    assert moved.dtype == jnp.int32
    log_p = mixture_log_prob(process, arrays[0], moved, arrays[1], 0.3, 0.7, 0.8)
    here = mixture_log_prob(
        process, torch.as_tensor(z), torch.tensor(np.asarray(moved)).long(),
        torch.as_tensor(log_c), 0.3, 0.7, 0.8,
    ).numpy()  # fmt: skip
    np.testing.assert_allclose(np.asarray(log_p), here, rtol=1e-4, atol=1e-5)
    a = process.schedule.alpha(jnp.asarray(t))
    noised = process.corrupt(jnp.asarray(x0), a, *arrays[2:])
    terms = nelbo_terms(process, jnp.asarray(x0), noised, arrays[1], jnp.asarray(t))
    assert bool(jnp.isfinite(terms).all())


@pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=list(RESAMPLERS))
def test_default_precision_resampling(scheme):
    values = log_weights()
    uniforms = RNG.uniform(size=(len(values), scheme.num_uniforms(values.shape[1])))
    chosen = np.asarray(scheme(jnp.asarray(uniforms), jnp.asarray(values)))
    alive = np.isfinite(values).any(-1)
    assert np.isfinite(np.take_along_axis(values, chosen, -1)[alive]).all()
    assert (chosen[~alive] == np.arange(values.shape[1])).all()
