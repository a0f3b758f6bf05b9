"""Particle Gibbs leaves the posterior of a whole program alone: tokens and a continuous latent.

Exact draws of the joint posterior (Gaussian given the tokens, tokens by enumeration) are swept and
compared with it; then simulation-based calibration with ranks that are uniform after any number of
sweeps. Each p-value is held against 1e-4, the false-alarm rate per comparison, once, at the fixed
seeds: below 0.2 % for the file.
"""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import chisquare, kstest, norm

from ppl_diffusion.denoisers import TableDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import particle_gibbs
from ppl_diffusion.inference.particle_gibbs import GibbsSampler, GibbsState, ParticleGibbs
from ppl_diffusion.kernels import OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac
from ppl_diffusion.smc.conditional import conditional_smc
from ppl_diffusion.smc.rejuvenation import OrderRefresh, SuffixRefresh
from ppl_diffusion.testing import random_joint, toy_process
from ppl_diffusion.testing.path_laws import PathLaw

LEVEL = 1e-4
LENGTH, NOISE, SLOPE = 3, 0.6, 1.0
FIXED = {"step_size": 0.7, "adapt_step_size": False, "adapt_mass_matrix": False}
DATA = torch.tensor(2.0)


def make_chain():
    process = toy_process("absorbing", 2)
    denoiser = TableDenoiser(random_joint(2, LENGTH), process)
    return ReverseChain(OrderedKernel(process, denoiser, length=LENGTH), LENGTH)


CHAIN = make_chain()


def program(y=None):
    """The sum of the tokens plus an offset, observed with noise."""
    path = pyro.sample("path", CHAIN)
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    mean = offset + SLOPE * CHAIN.x0(path).sum(-1)
    pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def given(x0, y):
    """Return mean and standard deviation of the offset given tokens and data."""
    shrink = 1 / (1 + NOISE**2)
    return shrink * (y - SLOPE * x0.sum(-1)), math.sqrt(shrink * NOISE**2)


def token_law(y=DATA):
    """Return the posterior law of whole paths, the offset summed out."""

    def log_marginal(x0):
        return dist.Normal(SLOPE * x0.sum(-1).double(), math.sqrt(1 + NOISE**2)).log_prob(y)

    return PathLaw.of(CHAIN, log_marginal)


def sampler_at(y=DATA, **options):
    settings = {"num_particles": 4, "num_runs": 1, "num_warmup": 0, "nuts": FIXED, **options}
    return GibbsSampler(ParticleGibbs(program, **settings), (y,), {})


def state_of(path, offset):
    ess = torch.zeros(len(path), LENGTH, dtype=torch.float64)
    return GibbsState({"path": path}, {"offset": offset}, ess[:, 0], ess, ess[:, :0])


def exact_draws(num, seed=0):
    law, generator = token_law(), torch.Generator().manual_seed(seed)
    path = law.draw(num, generator)
    mean, spread = given(path[:, -1], DATA)
    return law, state_of(path, mean + spread * torch.randn(num, generator=generator))


def p_values(law, state):
    """Return the p-values of the path law, and of the offset given the tokens."""
    mean, spread = given(state.path[:, -1], DATA)
    standard = (state.latents["offset"] - mean) / spread
    return law.p_value(state.path), float(kstest(standard.numpy(), norm.cdf).pvalue)


@pytest.mark.parametrize("moves", [(), (SuffixRefresh(2), OrderRefresh())])
def test_path_updates_are_invariant(moves):
    """Conditional SMC of 4000 chains side by side, each given its own offset."""
    law, state = exact_draws(4000)
    sampler, start = sampler_at(moves=moves, num_runs=4000), state.path
    for _ in range(2):
        state = sampler.update_paths(state)
    assert min(p_values(law, state)) > LEVEL
    assert float((state.path != start).flatten(1).any(-1).double().mean()) > 0.3


def test_latents_of_another_chain_are_not_invariant(monkeypatch):
    """The failing twin: every path weighed by the first chain's latents."""

    right = particle_gibbs._GivenLatents.__init__

    def first(self, run, latents, twist):
        right(self, run, {n: v[:1].expand_as(v) for n, v in latents.items()}, twist)

    monkeypatch.setattr(particle_gibbs._GivenLatents, "__init__", first)
    law, state = exact_draws(4000)
    assert min(p_values(law, sampler_at(num_runs=4000).update_paths(state))) < 1e-3 * LEVEL


def test_whole_sweeps_are_invariant():
    """Tokens by conditional SMC and the offset by NUTS, in turn."""
    law, start = exact_draws(150)
    sampler = sampler_at(num_runs=150)
    state = sampler.sweep(sampler.sweep(start, reverse=True))
    assert min(p_values(law, state)) > LEVEL
    assert float((state.latents["offset"] != start.latents["offset"]).double().mean()) > 0.8


def test_latents_given_a_stale_path_are_not_invariant(monkeypatch):
    """The failing twin of the sweep: NUTS still sees the path of another chain."""
    law, state = exact_draws(220)
    sampler = sampler_at(num_runs=220)
    shifted = replace(state, paths={"path": state.path.roll(1, 0)})
    for _ in range(2):
        shifted = sampler.update_latents(shifted)
    state = state_of(state.path, shifted.latents["offset"])
    assert p_values(law, state)[1] < 0.1 * LEVEL


def test_long_run_finds_the_posterior():
    """From the prior to the exact means, within five Monte Carlo standard errors."""
    options = {"num_runs": 2, "num_warmup": 30, "num_samples": 120, "num_particles": 8}
    post = ParticleGibbs(program, moves=[OrderRefresh()], **options).run(DATA, seed=0)
    law, tokens = token_law(), post.x0.double().sum(-1)
    exact_tokens = float((law.probs * law.paths[:, -1].sum(-1)).sum())
    exact_offset = float((law.probs * given(law.paths[:, -1], DATA)[0]).sum())
    for draws, exact in [(tokens, exact_tokens), (post.samples["offset"], exact_offset)]:
        means = draws.double().reshape(2, 12, 10).mean(-1)  # batches longer than the memory
        assert abs(float(means.mean()) - exact) < 5 * float(means.std() / 24**0.5) < 1.0


# ------------------------------------------------------------------------------------------------
# simulation-based calibration


def replicate(seed, num_sweeps, num_particles=3):
    """Return three ranks of one simulated truth, all uniform if the program is right.

    The truth is a draw of the posterior given the data it made. Placed at a uniform place in a
    stretch of the chain (forward sweeps after it, reversed ones before) its rank among the others
    is uniform however slowly the chain mixes (Gandy and Scott 2020, arXiv:2001.06465): this serves
    the offset and the tokens. And in the population of one conditional SMC around the truth, the
    slot of the truth is distributed as the weights: its *weighted* rank is uniform on [0, 1].
    """
    pyro.set_rng_seed(seed)
    truth = poutine.trace(program).get_trace()
    y = truth.nodes["y"]["value"].detach()
    state = state_of(truth.nodes["path"]["value"][None], truth.nodes["offset"]["value"][None])
    sampler = sampler_at(y, num_particles=num_particles)
    before = int(torch.randint(num_sweeps + 1, ()))
    states = []
    for size, reverse in ((before, True), (num_sweeps - before, False)):
        current = state
        for _ in range(size):
            current = sampler.sweep(current, reverse=reverse)
            states.append(current)
    offset = torch.stack([s.latents["offset"][0] for s in states])
    tokens = torch.stack([statistic(s.path[0, -1]) for s in states])
    return (
        tied_rank(offset, state.latents["offset"]),  # NUTS may stay where it is
        tied_rank(tokens, statistic(state.path[0, -1])),
        weighted_rank(y, state, num_particles),
    )


def statistic(x0):
    """Return a number that tells most sequences apart and goes along with the potential."""
    return x0.sum(-1).double() + 0.1 * x0[..., 0]


def tied_rank(values, truth):
    """Return the rank of the truth, its place among equals drawn at random."""
    ties = int((values == truth).sum())
    return int((values < truth).sum()) + int(torch.randint(ties + 1, ()))


def weighted_rank(y, state, num_particles):
    offset = state.latents["offset"]
    likelihood = Potential(
        lambda x0: dist.Normal(offset + SLOPE * x0.sum(-1), NOISE).log_prob(y), name="likelihood"
    )
    run = conditional_smc(FeynmanKac(CHAIN, likelihood), state.path, num_particles=num_particles)
    weights = run.trace.weights.normalised[0]
    values, truth = statistic(run.trace.carry["tokens"][0]), statistic(state.path[0, -1])
    below, ties = weights[values < truth].sum(), weights[values == truth].sum()
    return float(below + torch.rand(()) * ties)


def calibration_p_values(num_replicates, num_sweeps, bins, seed=0):
    ranks = [replicate(seed + i, num_sweeps) for i in range(num_replicates)]
    offset, tokens, weighted = (torch.tensor(column) for column in zip(*ranks, strict=True))
    counts = [torch.bincount(x, minlength=num_sweeps + 1) for x in (offset, tokens)]
    counts.append(torch.histc(weighted, bins, 0, 1))
    return [float(chisquare(c.numpy()).pvalue) for c in counts]


def test_small_calibration():
    """40 replicates, for every day; the slow test has the power."""
    assert min(calibration_p_values(40, 3, 4)) > LEVEL


@pytest.mark.slow
def test_calibration():
    """500 replicates of the whole program: tokens and a continuous latent, weighted ranks too."""
    assert min(calibration_p_values(500, 4, 10, seed=1000)) > LEVEL
