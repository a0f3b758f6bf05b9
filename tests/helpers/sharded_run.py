"""Runs of one seed on several devices of the host, to be started as a process of its own.

Prints digests in JSON: of the run on a mesh of all devices, and of its broken twin.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from digests import digests

import ppl_diffusion as ppd
import ppl_diffusion.numpyro as ppn
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.numpyro import smc
from ppl_diffusion.numpyro.noise import KeyNoise
from ppl_diffusion.processes import Uniform
from ppl_diffusion.smc.twists import Defensive


def tiny_chain():
    """Return a chain whose noisiest states are all different."""
    process, law = Uniform(3), np.random.default_rng(0).dirichlet(np.ones(27)).reshape(3, 3, 3)
    denoiser = TableDenoiser(jnp.asarray(law), process)
    return ppn.ReverseChain(ppn.InterpolatingKernel(process, denoiser, num_steps=3), 3)


def run(chain, mesh, num_persistent=0):
    """Return the digests of a run of a program with a latent whose law is that of a guess."""

    def assay():
        x = numpyro.deterministic("x", chain.x0(numpyro.sample("path", chain)))
        gain = numpyro.sample("gain", dist.Normal((x == 1).mean(-1), 0.5))
        numpyro.sample("y", dist.Normal(gain + (x == 2).mean(-1), 0.3), obs=1.0)

    program = ppn.SMC(
        assay,
        num_particles=16,
        num_runs=2,
        twist=Defensive(num_persistent),
        ess_threshold=2.0,  # resampled at every step
        mesh=mesh,
    )
    return digests(program.run(jax.random.key(3)))


class SlotNoise(KeyNoise):
    """The mutant: particles are counted on each device anew."""

    def keys(self, use, k, size):
        return KeyNoise(self.key).keys(use, k, size)


def main(prior):
    chain = tiny_chain() if prior == "tiny" else ppn.from_torch(ppd.models.load(prior).chain(6))
    mesh = jax.make_mesh((jax.device_count(),), ("particles",))
    if prior == "tiny":
        found = {"run": run(chain, mesh)}
        smc.KeyNoise = SlotNoise
        found["mutant"] = run(chain, mesh)
    else:
        found = {"run": run(chain, mesh, num_persistent=4)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
