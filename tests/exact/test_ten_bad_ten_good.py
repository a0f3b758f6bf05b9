"""Ten posteriors that are bad in ten ways, and twelve good ones: each verdict where it belongs.

Limits are worth what they find, and what they leave alone. A handful of seeds runs with the suite,
twenty under ``slow``; both count, so that a rule that fires by luck, or on anything, is seen.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential, Reward
from ppl_diffusion.smc import FeynmanKac, Resampler, run_smc
from ppl_diffusion.testing import random_joint, toy_chain, toy_markov_chain, toy_potential

FEW, MANY = 2, 20
NO_MOVES = {"moves": None} if "moves" in inspect.signature(SMC).parameters else {}
"""Latents that are only inherited: the option is there where latents can move."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def markov(length, num_steps=None):
    return toy_markov_chain(length=length, num_steps=num_steps or length)


def first_hitting(joint):
    process, length = Absorbing(joint.shape[0]), joint.ndim
    kernel = OrderedKernel(process, TableDenoiser(joint, process), length=length)
    return ReverseChain(kernel, length)


def motif(weight):
    """``weight`` for every 0 that a 1 follows."""

    def occurrences(x0):
        return weight * ((x0[..., :-1] == 0) & (x0[..., 1:] == 1)).sum(-1).double()

    return Potential(occurrences)


def where(allowed):
    return Potential(lambda x0: torch.where(allowed(x0), 0.0, -torch.inf).double())


def linear(length, seed):
    scores = torch.randn(length, 3, generator=seeded(seed), dtype=torch.float64)
    return Potential(lambda x0: scores[torch.arange(length), x0].sum(-1))


def steep():
    """The problem D1 of 27 sequences: a look-ahead by the likeliest completion drops the best."""
    generator = np.random.default_rng(8)
    joint = torch.softmax(torch.tensor(generator.normal(size=27)), 0).reshape(3, 3, 3)
    log_g = torch.tensor(8 * generator.normal(size=27)).reshape(3, 3, 3)
    return first_hitting(joint), Potential(lambda x0: log_g[x0.unbind(-1)])


class BestThree(Resampler):
    """What a user might write: copies of the heaviest three, whatever the weights."""

    name = "best-three"

    def _ancestors(self, uniforms, weights):
        best = weights.topk(3, -1).indices
        return best.repeat(1, weights.shape[-1] // 3 + 1)[:, : weights.shape[-1]]


def program(replicates, sd, chain):
    """A gain and a noise that are not known, and replicated measurements of one sequence."""

    def assay(y):
        x = chain.x0(pyro.sample("path", chain))
        gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        level = gain * (1.0 + (x == 0).double().sum(-1))
        with pyro.plate("replicates", replicates):
            pyro.sample("y", dist.Normal(level, noise), obs=y)

    y = 3.0 + sd * torch.linspace(-1, 1, replicates, dtype=torch.float64)
    return assay, y


def smc(chain, potential, twist, seed, size, runs=4, **options):
    model = FeynmanKac(chain, potential, twist=twist)
    return run_smc(model, size, runs, generator=seeded(seed), **options)


@dataclass(frozen=True)
class Case:
    """How to make a posterior, what must fire, and in how many of twenty seeds at least."""

    kind: str
    make: Callable
    least: int = 18


def dead(seed):
    chain = first_hitting(random_joint(3, 6, seed=seed))
    return smc(chain, where(lambda x0: (x0 == 0).all(-1)), None, seed, 16)


def one_ancestor(seed):
    always = {"resampler": "multinomial", "ess_threshold": 1.1}
    return smc(markov(24), motif(2.0), "persistent", seed, 8, **always)


def collapsed_latent(seed):
    assay, y = program(12, 0.1, markov(6))
    method = SMC(assay, num_particles=64, num_runs=4, twist="argmax", method="smc", **NO_MOVES)
    return method.run(y, seed=seed)


def heavy_tail(seed):
    return smc(markov(24), linear(24, seed), None, seed, 512, ess_threshold=0.0)


def disagreeing(seed):
    return smc(markov(40), motif(3.0), "argmax", seed, 16)


def wrong_guide(seed):
    return smc(*steep(), "argmax", seed, 32)


def contradiction(seed):
    chain = first_hitting(random_joint(3, 6, seed=seed))
    return smc(chain, where(lambda x0: (x0 == 2).sum(-1) == 5), None, seed, 256)


def failing_reward(seed):
    def dock(x0):
        if (x0 == 0).any():
            raise TimeoutError("the simulation did not end")
        return x0.sum(-1).double()

    reward = Reward(dock, temperature=5.0, on_error="reject")
    return smc(markov(8), reward, None, seed, 128)


def too_few_steps(seed):
    return smc(markov(24, 2), motif(2.0), "argmax", seed, 64)


def duplicates(seed):
    options = {"resampler": BestThree(), "ess_threshold": 1.1}
    return smc(markov(12), motif(1.0), "argmax", seed, 64, **options)


BAD = [
    Case("dead", dead),
    Case("roots", one_ancestor),
    Case("latent", collapsed_latent),
    Case("khat", heavy_tail),
    Case("apart", disagreeing),
    Case("mass", wrong_guide),
    Case("constraint", contradiction),
    Case("reward", failing_reward),
    Case("steps", too_few_steps),
    Case("copies", duplicates),
]


def of_program(seed):
    assay, y = program(2, 0.8, markov(6))
    return SMC(assay, num_particles=512, num_runs=4).run(y, seed=seed)


def discrete(seed, *, gained=False):
    """A latent of two values, which are floats; beside one of many if that is asked for."""
    chain = markov(6)

    def leaky(y):
        x = chain.x0(pyro.sample("path", chain))
        leak = pyro.sample("leak", dist.Bernoulli(0.3))
        gain = pyro.sample("gain", dist.LogNormal(0.0, 0.5)) if gained else 1.0
        pyro.sample("y", dist.Normal(gain * (x == 0).double().sum(-1) + leak, 1.0), obs=y)

    return SMC(leaky, num_particles=256, num_runs=4).run(torch.tensor(2.0), seed=seed)


def uniform(seed):
    chain = toy_chain("uniform", length=3, num_steps=8)
    return smc(chain, toy_potential(length=3), TWIST, seed, 256)


def table(length, scale, twist, seed):
    chain = first_hitting(random_joint(3, length))
    return smc(chain, toy_potential(length=length, scale=scale), twist, seed, 256)


TWIST = "defensive"
"""The default of every method."""
GOOD = {
    "motif of 8": lambda seed: smc(markov(8), motif(0.5), TWIST, seed, 128),
    "motif of 16": lambda seed: smc(markov(16), motif(0.7), TWIST, seed, 256),
    "table of 27": lambda seed: table(3, 1.0, TWIST, seed),
    "table of 81": lambda seed: table(4, 0.7, None, seed),
    "multinomial": lambda seed: smc(
        markov(6), motif(1.0), None, seed, 256, resampler="multinomial"
    ),
    "twice the steps": lambda seed: smc(markov(12, 24), motif(0.8), "argmax", seed, 256),
    "uniform": uniform,
    "constraint": lambda seed: smc(
        markov(6), where(lambda x0: (x0 == 0).sum(-1) <= 2), None, seed, 256
    ),
    "program": of_program,
    "discrete latent": discrete,
    "both kinds": lambda seed: discrete(seed, gained=True),
    "ssp": lambda seed: smc(markov(20), motif(0.5), TWIST, seed, 256, resampler="ssp"),
}


def kinds(posterior):
    return {verdict.kind for verdict in posterior.warnings}


def count(case, seeds):
    return sum(case.kind in kinds(case.make(seed)) for seed in range(seeds))


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.kind)
def test_a_bad_posterior_gets_its_verdict(case):
    assert count(case, FEW) == FEW


@pytest.mark.parametrize("name", GOOD)
def test_a_good_posterior_gets_none(name):
    found = [posterior.warnings for posterior in map(GOOD[name], range(FEW))]
    assert found == [[]] * FEW


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD, ids=lambda case: case.kind)
def test_twenty_bad_posteriors(case):
    assert count(case, MANY) >= case.least


@pytest.mark.slow
def test_hundreds_of_good_posteriors():
    alarms = [kinds(make(seed)) for make in GOOD.values() for seed in range(MANY)]
    assert sum(map(bool, alarms)) == 0
