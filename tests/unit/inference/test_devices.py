"""Every method makes its tensors where its chains live, and hands posteriors back on the CPU."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppl_diffusion as ppd
from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, ParticleGibbs, methods
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing.devices import DeviceDiscipline
from ppl_diffusion.testing.toys import random_joint, toy_chain, toy_potential

GOAL = toy_potential(3, 2)
SIZE = {"num_particles": 8, "num_runs": 2}


def ordered():
    denoiser = TableDenoiser(random_joint(3, 2), Absorbing(3))
    return ReverseChain(OrderedKernel(denoiser.process, denoiser, length=2), 2)


CHAINS = {"absorbing": toy_chain(), "uniform": toy_chain("uniform"), "ordered": ordered()}


UNGUIDED = [name for name, cls in methods().items() if cls.needs.any_target]
"""Those that any potential will do for."""


def assay(chain):
    gain = pyro.sample("gain", dist.Normal(torch.tensor(0.0).double(), 1.0))
    x = chain.x0(pyro.sample("path", chain))
    pyro.sample("y", dist.Normal(gain + (x == 0).sum(-1), 1.0), obs=torch.tensor(1.0).double())


@pytest.mark.parametrize("process", CHAINS)
@pytest.mark.parametrize("method", UNGUIDED)
def test_methods_say_where_their_tensors_live(method, process):
    with DeviceDiscipline():
        SMC(CHAINS[process], GOAL, method=method, **SIZE).run(seed=0)
        SMC(assay, method=method, **SIZE).run(CHAINS[process], seed=0)


def test_particle_gibbs_says_where_its_tensors_live():
    gibbs = ParticleGibbs(assay, num_particles=4, num_runs=2, num_samples=2, num_warmup=1)
    with DeviceDiscipline():
        gibbs.run(CHAINS["absorbing"], seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", UNGUIDED)
def test_methods_on_an_accelerator_give_what_the_cpu_gives(method):
    """The same law on a shipped prior: run evidences agree within 4 standard errors."""
    prior = ppd.models.load("yeast-promoter")
    likes = ppd.potentials.Potential(lambda x: 0.2 * (x == 0).sum(-1).double(), name="likes A")
    options = {"method": method, "num_particles": 32, "num_runs": 8}
    if method == "beam":
        options["num_children"] = 4
    here = SMC(prior.chain(num_steps=16), likes, **options).run(seed=0)
    there = SMC(prior.to("cuda").chain(num_steps=16), likes, **options).run(seed=1)
    assert there.x0.device.type == there.log_weights.device.type == "cpu"
    if methods()[method].exact:
        gap = here.log_evidence.mean() - there.log_evidence.mean()
        error = (here.log_evidence.var() / 8 + there.log_evidence.var() / 8).sqrt()
        assert float(gap.abs()) < 4 * float(error) + 0.05
