"""Two promoters in three replicates, with a gain and a noise that nobody knows; and a tiny twin."""

from functools import cache

import pyro
import pyro.distributions as dist
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing.toys import random_joint, toy_markov_chain

LONG = toy_markov_chain(length=12, num_steps=12, seed=1)
SHORT = ReverseChain(
    OrderedKernel(Absorbing(3), TableDenoiser(random_joint(3, 3, seed=1), Absorbing(3)), length=3),
    3,
)
EFFECTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.tensor([[2.9, 4.1], [3.2, 3.9], [3.05, 4.2]], dtype=torch.float64)
ROUGH = torch.tensor([[2.4, 4.0], [3.5, 3.1], [2.8, 4.4]], dtype=torch.float64)
"""Data of the tiny twin: exact ones make its evidence a matter of one rare pair of sequences."""


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def score(x):
    return 2 + 0.35 * EFFECTS[torch.arange(x.shape[-1]), x].sum(-1)


def promoters(chain, y=Y):
    """A gain and a noise for two promoters, each measured three times."""
    gain = pyro.sample("gain", dist.LogNormal(number(0.0), 0.5))
    sd = pyro.sample("sd", dist.HalfNormal(number(1.0)))
    with pyro.plate("promoter", 2, dim=-1):
        x = chain.x0(pyro.sample("path", chain))
    with pyro.plate("replicate", 3, dim=-2), pyro.plate("measured", 2, dim=-1):
        pyro.sample("y", dist.Normal(gain * score(x), sd), obs=y)


@cache
def truth():
    """Return the log-evidence and the means of gain and noise of the tiny twin, by a grid."""
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    law, level = SHORT.kernel.denoiser.joint.flatten().double(), score(x)
    u = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)
    v = torch.linspace(-5.0, 1.6, 441, dtype=torch.float64)
    gain, sd = u.exp()[:, None], v.exp()
    prior = dist.Normal(number(0.0), 0.5).log_prob(u)[:, None] + v
    total = prior + dist.HalfNormal(number(1.0)).log_prob(sd)
    for y in ROUGH.T:
        each = [dist.Normal(gain * m, sd).log_prob(y[:, None, None]).sum(0) for m in level]
        total = total + torch.logsumexp(torch.stack(each) + law.log()[:, None, None], 0)
    cell = total.exp() * (u[1] - u[0]) * (v[1] - v[0])
    mass = cell.sum()
    return float(mass.log()), float((cell * gain).sum() / mass), float((cell * sd).sum() / mass)
