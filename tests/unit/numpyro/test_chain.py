"""Reverse chains in NumPyro: the numbers of torch, and the contract of NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import torch
from numpyro.contrib.control_flow import scan
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
from numpyro_toys import LENGTH, SIZE, STEPS, _x64, chain, pair, tensor  # noqa: F401

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.errors import CapabilityError, IntractableLogProb
from ppl_diffusion.processes import Absorbing, Uniform

KINDS = [
    {},
    {"process": "uniform"},
    {"process": "uniform", "kind": "posterior"},
    {"process": "skewed", "kappa": 0.6},
    {"process": "uniform", "kappa": [1.0, 0.9, 0.8, 0.7]},
    {"kappa": 0.5},
    {"prompt": [-1, 2, -1]},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_same_uniforms_give_the_same_path_and_density_as_torch(options):
    """Both are float64: 1e-10 is a thousand times their round-off."""
    ours, theirs = pair(**options)
    noise = np.random.default_rng(1).random((2 * STEPS + 1, 50, LENGTH))
    path, log_p = ours.draw(jnp.asarray(noise))
    kernel = theirs.kernel
    state = kernel.process.draw_prior(torch.tensor(noise[0]))
    if theirs.prompt is not None:
        state = torch.where(theirs.fixed, theirs.prompt, state)
    states = [state]
    for k in range(STEPS):
        step = kernel.step({"tokens": states[-1]}, k, fixed=theirs.fixed)
        states.append(step.draw(*torch.tensor(noise[1 + 2 * k : 3 + 2 * k])))
    expected = torch.stack(states, -2)
    assert np.array_equal(np.asarray(path), expected.numpy())
    np.testing.assert_allclose(log_p, theirs.log_prob(expected).numpy(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours.log_prob(path), log_p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_density_of_paths_sums_to_one(options):
    small = chain(**{**options, "length": 2, "steps": 2, "prompt": None} | _kappa(options))
    every = small.enumerate_support()
    assert float(jnp.exp(small.log_prob(every)).sum()) == pytest.approx(1, abs=1e-12)


def _kappa(options):
    kappa = options.get("kappa", 1.0)
    return {"kappa": kappa[:2] if isinstance(kappa, list) else kappa}


@pytest.mark.parametrize("options", KINDS[:6], ids=str)
def test_the_marginal_is_that_of_torch(options):
    ours, theirs = pair(**options)
    every = ours.marginal().enumerate_support()
    expected = theirs.marginal().log_prob(tensor(every))
    np.testing.assert_allclose(ours.marginal().log_prob(every), expected, rtol=0, atol=1e-10)


def test_what_sampling_keeps_is_the_density():
    ours = chain()
    path, kept = ours.sample_with_intermediates(jax.random.key(0), (7,))
    np.testing.assert_allclose(kept[0], ours.log_prob(path), atol=1e-12)
    assert np.array_equal(ours.log_prob(path, kept), kept[0])


def test_a_site_asks_the_network_once_a_step():
    calls = []
    process = Absorbing(SIZE)

    class Counted(MarkovDenoiser):
        def __call__(self, tokens, t):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(tokens, t)

    jax.tree_util.register_pytree_node(Counted, lambda d: ((), d), lambda d, _: d)
    denoiser = Counted(jnp.ones(3) / 3, jnp.ones((3, 3)) / 3, process)
    ours = ppn.ReverseChain(ppn.InterpolatingKernel(process, denoiser, num_steps=STEPS), LENGTH)

    def model():
        with numpyro.plate("n", 5):
            numpyro.sample("path", ours)

    total, found = log_density(seed(model, jax.random.key(0)), (), {}, {})
    jax.effects_barrier()
    assert len(calls) == STEPS
    np.testing.assert_allclose(total, ours.log_prob(found["path"]["value"]).sum())


def test_draws_follow_the_density():
    """A chi-square test of 64 paths of a tiny chain, at a false-alarm rate of 1e-4."""
    from ppl_diffusion.testing import chi_square_p_value

    small = chain(length=1, steps=2)
    every = small.enumerate_support().reshape(-1, 3)
    drawn = small.sample(jax.random.key(0), (20_000,)).reshape(-1, 3)
    powers = jnp.array([16, 4, 1])
    counts = jnp.bincount((drawn * powers).sum(-1), length=64)
    exact = jnp.exp(small.log_prob(every[..., None]))
    assert chi_square_p_value(tensor(counts), tensor(exact)) > 1e-4


def test_it_goes_through_jit_and_vmap():
    ours = chain("uniform")
    path = ours.sample(jax.random.key(0))
    scored = jax.jit(lambda c, x: c.log_prob(x))(ours, path)
    np.testing.assert_allclose(scored, ours.log_prob(path), atol=1e-12)
    keys = jax.random.split(jax.random.key(1), 4)
    drawn = jax.vmap(ours.sample)(keys)
    assert drawn.shape == (4, STEPS + 1, LENGTH)


def test_what_a_scan_stacked_is_scored_entry_by_entry():
    ours = chain()

    def model():
        def body(carry, _):
            path = numpyro.sample("path", ours)
            return carry + 1, path

        scan(body, 0, None, length=3)

    found = trace(seed(model, jax.random.key(0))).get_trace()
    site = found["path"]
    assert site["fn"].batch_shape == (3,)
    expected = ours.log_prob(site["value"])
    np.testing.assert_allclose(site["fn"].log_prob(site["value"]), expected, atol=1e-12)


def test_it_expands_and_never_shrinks():
    ours = chain(prompt=[-1, 2, -1]).expand((4,))
    assert ours.batch_shape == (4,)
    assert ours.sample(jax.random.key(0)).shape == (4, STEPS + 1, LENGTH)
    with pytest.raises(ValueError, match="Cannot broadcast distribution of shape"):
        ours.expand((3,))


def test_prompts_of_a_batch():
    prompts = jnp.array([[-1, 2, -1], [0, -1, -1]])
    ours = ppn.ReverseChain(chain().kernel, LENGTH, prompts)
    drawn = ours.sample(jax.random.key(0), (6,))
    assert bool((drawn[:, 0, :, 1] == 2).all())
    assert bool((drawn[:, 1, :, 0] == 0).all())
    with pytest.raises(IntractableLogProb, match="one prompt"):
        ours.marginal().log_prob(jnp.zeros((2, 3), int))


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ([0.5, 0.0, 0.0], TypeError, "integer ids"),
        ([1, 1], ValueError, r"shape \(3,\)"),
        ([7, 0, 0], ValueError, "clean token ids"),
    ],
)
def test_impossible_prompts_are_refused(prompt, error, match):
    with pytest.raises(error, match=match):
        ppn.ReverseChain(chain().kernel, LENGTH, jnp.array(prompt))


def test_a_network_of_another_vocabulary_is_refused():
    denoiser = MarkovDenoiser(jnp.ones(3) / 3, jnp.ones((3, 3)) / 3, Uniform(3))
    with pytest.raises(CapabilityError, match="3 tokens and the process has 4"):
        ppn.InterpolatingKernel(Uniform(4), denoiser, num_steps=2)


def test_a_long_chain_has_no_exact_marginal():
    process = Absorbing(3)
    denoiser = MarkovDenoiser(jnp.ones(3) / 3, jnp.ones((3, 3)) / 3, process)
    long = ppn.ReverseChain(ppn.InterpolatingKernel(process, denoiser, num_steps=2), 20)
    with pytest.raises(IntractableLogProb, match="4\\*\\*20"):
        long.marginal().log_prob(jnp.zeros(20, int))
    with pytest.raises(NotImplementedError, match="max_enumerate"):
        long.enumerate_support()
    with pytest.raises(ValueError, match="expected a path"):
        long.x0(jnp.zeros((4, 20), int))
