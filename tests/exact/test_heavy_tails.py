"""What intervals of the evidence cover where single runs have a heavy tail.

One latent that precise data pin down: few particles come near it, and runs in which none of the
best did agree on too little. The truth is enumerated; ``pytest -s -m slow`` prints the counts.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.inference import SMC
from ppl_diffusion.smc.evidence import ABOVE
from ppl_diffusion.testing import ExactChain, toy_markov_chain

SEEDS, SIZE, SD, Y = 150, 256, 0.05, torch.tensor(2 / 3)
CHAIN = toy_markov_chain("absorbing", vocab_size=3, length=6, num_steps=6)


def precise(y):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    x = CHAIN.x0(pyro.sample("path", CHAIN))
    pyro.sample("y", dist.Normal(level + (x == 0).sum(-1), SD), obs=y)


def log_evidence():
    """The latent is summed out by hand."""

    def log_g(x0):
        total = dist.Normal((x0 == 0).double().sum(-1), math.sqrt(1 + SD**2))
        return total.log_prob(Y.double())

    return math.log(float(ExactChain.of(CHAIN).evidence(log_g)))


def shares(found, truth):
    """Return how many intervals hold the truth: as they are, and as far up as down."""
    ends = [(low, high, low + 2 * (high - low) / (1 + ABOVE)) for low, high in found]
    return [sum(low <= truth <= end[at] for low, *end in ends) for at in (0, 1)]


@pytest.mark.slow
def test_intervals_reach_up_to_a_heavy_tail():
    """At least 90 % of those given, or silent; the failing twin, even ones, have not 85 %."""
    truth, given, silent = log_evidence(), [], []
    for seed in range(SEEDS):
        posterior = SMC(precise, num_particles=SIZE, num_runs=4).run(Y, seed=seed)
        if posterior.evidence.interval is not None:
            given.append(posterior.evidence.interval)
            silent += [] if posterior.warnings else [given[-1]]
    wide, even = shares(given, truth)
    calm = shares(silent, truth)
    print(f"{wide} of {len(given)} intervals hold the truth, {even} as far up as down;")
    print(f"without any warning {calm[0]} of {len(silent)}, and {calm[1]}")
    assert wide >= 0.9 * len(given)
    assert calm[0] >= 0.9 * len(silent)
    assert even < 0.85 * len(given)
