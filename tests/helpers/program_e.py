"""A program whose evidence is known to many digits: three tokens, a gain, a noise and a switch.

``y_j ~ Normal(gain * score(x) + b, sd)`` with ``gain ~ LogNormal(0, .5)``, ``sd ~ HalfNormal(1)``
and ``b ~ Bernoulli(.3)``; the truth is a sum over 27 sequences and ``b``, and a grid over the rest.
"""

import math
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, OrderedKernel

RNG = np.random.default_rng(3)
LOGITS, SCORES, RAW = RNG.normal(size=27), 1.2 + 0.4 * RNG.normal(size=27), RNG.normal(size=4)
SCORE = torch.tensor(SCORES)
Y = torch.tensor(1.8 + 0.5 * (RAW - RAW.mean()) / RAW.std())
LAW = torch.softmax(torch.tensor(LOGITS), 0)
POWERS = torch.tensor([9, 3, 1])
CHAIN = ReverseChain(
    OrderedKernel(Absorbing(3), TableDenoiser(LAW.reshape(3, 3, 3), Absorbing(3)), length=3), 3
)


def zero(x=0.0):
    return torch.tensor(x, dtype=torch.float64)


def assay():
    gain = pyro.sample("gain", dist.LogNormal(zero(), 0.5))
    sd = pyro.sample("sd", dist.HalfNormal(zero(1.0)))
    b = pyro.sample("b", dist.Bernoulli(zero(0.3)))
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    level = gain * SCORE[(x * POWERS).sum(-1)] + b
    with pyro.plate("measured", 4):
        pyro.sample("y", dist.Normal(level, sd), obs=Y)


@cache
def truth():
    """Return the log-evidence and the means of gain and sd, by a grid."""
    u = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    v = torch.linspace(-4.0, 1.6, 561, dtype=torch.float64)
    gain, sd = u.exp()[:, None], v.exp()
    step = (u[1] - u[0]) * (v[1] - v[0])
    prior = (
        dist.Normal(zero(), 0.5).log_prob(u)[:, None] + v + dist.HalfNormal(zero(1.0)).log_prob(sd)
    )
    total = means = 0.0
    for score, p in zip(SCORE, LAW, strict=True):
        for b, q in ((0.0, 0.7), (1.0, 0.3)):
            mean = gain * score + b
            ll = sum(dist.Normal(mean, sd).log_prob(y) for y in Y)
            cell = p * q * (prior + ll).exp() * step
            total = total + cell.sum()
            means = means + torch.stack([(cell * gain).sum(), (cell * sd).sum()])
    return math.log(total), means / total
