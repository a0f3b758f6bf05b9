"""Tiny chains in JAX and in torch over the same law, and what is exact for them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.processes import Absorbing, Interpolating, Uniform

SIZE, LENGTH, STEPS = 3, 3, 4
PROCESSES = {
    "absorbing": Absorbing(SIZE),
    "uniform": Uniform(SIZE),
    "skewed": Interpolating([0.2, 0.3, 0.5]),
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def table(length=LENGTH, seed=0):
    """Return a joint law of ``length`` tokens, ``(3,) * length``."""
    law = np.random.default_rng(seed).dirichlet(np.ones(SIZE**length))
    return law.reshape((SIZE,) * length)


def pair(process="absorbing", *, kind="cavity", length=LENGTH, steps=STEPS, kappa=1.0, prompt=None):
    """Return the same chain in JAX and in torch."""
    process, joint = PROCESSES[process], table(length)
    ours = ppn.InterpolatingKernel(
        process, TableDenoiser(jnp.asarray(joint), process, kind=kind), num_steps=steps, kappa=kappa
    )
    theirs = InterpolatingKernel(
        process,
        TableDenoiser(torch.tensor(joint), process, kind=kind),
        num_steps=steps,
        kappa=kappa,
    )
    given = None if prompt is None else torch.tensor(prompt)
    return (
        ppn.ReverseChain(ours, length, None if prompt is None else jnp.asarray(prompt)),
        ReverseChain(theirs, length, prompt=given),
    )


def chain(*args, **kwargs):
    return pair(*args, **kwargs)[0]


def tensor(x):
    return torch.from_numpy(np.array(x))


def log_z(chain, log_g):
    """Return all clean sequences, their exact log-weights, and the log of the sum."""
    sequences = chain.marginal().enumerate_support()
    joint = chain.marginal().log_prob(sequences) + log_g(sequences)
    return sequences, joint, float(jax.scipy.special.logsumexp(joint))


class GivenNoise(eqx.Module):
    """Noise out of arrays, so that another backend can be given the same.

    :param arrays: uniforms by use, steps first: ``{MOVE: (T + 1, R, N, *shape), ...}``.
    """

    arrays: dict

    def particles(self, use, k, shape, size):
        return self.arrays[use][k].reshape(*size, *shape)

    def runs(self, use, k, shape, size):
        return self.arrays[use][k].reshape(size, *shape)
