"""Simulation-based calibration (Talts et al. 2018): truth drawn from the prior, ranked in draws.

Data are drawn from the program itself, and the rank of what they were drawn from among posterior
draws is uniform. One chi-square test a quantity; its false alarm is that of 4 standard errors.
"""

from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_diffusion.inference import SMC, LatentMoves, ParticleGibbs
from ppl_diffusion.inference.particle_gibbs import GibbsSampler, GibbsState
from ppl_diffusion.testing.toys import toy_chain

CHAIN = toy_chain(vocab_size=3, length=3, num_steps=3, seed=2)
RATES = torch.tensor([0.3, 0.7], dtype=torch.float64)
DRAWS, SWEEPS = 15, 3
FIXED = {
    "step_size": 0.4,
    "adapt_step_size": False,
    "adapt_mass_matrix": False,
    "max_tree_depth": 2,
}


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def zeros(x):
    return (x == 0).sum(-1).double()


def assay(y=None):
    """Tokens, a continuous latent and a switch."""
    level = pyro.sample("level", dist.Normal(number(0.0), 1.0))
    on = pyro.sample("on", dist.Categorical(RATES))
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    with pyro.plate("measured", 2):
        pyro.sample("y", dist.Normal(level * (1 + on) + zeros(x), 0.5), obs=y)


def summed(y=None):
    """The same with the switch summed out, which NUTS cannot move."""
    level = pyro.sample("level", dist.Normal(number(0.0), 1.0))
    x = pyro.deterministic("x", CHAIN.x0(pyro.sample("path", CHAIN)), event_dim=1)
    each = [
        sum(dist.Normal(level * (1 + on) + zeros(x), 0.5).log_prob(value) for value in y)
        for on in (0, 1)
    ]
    pyro.factor("y", torch.logsumexp(torch.stack(each, -1) + RATES.log(), -1))


def smc(y, true):
    options = {"num_particles": 64, "moves": LatentMoves(number=2), "store_path": False}
    posterior = SMC(assay, ess_threshold=0.8, **options).run(y)
    return posterior.resample(DRAWS)


def gibbs(y, true):
    """Return a stationary Markov chain that the truth is somewhere in the middle of, as it is."""
    options = {"num_particles": 4, "num_runs": 1, "num_warmup": 0, "nuts": FIXED}
    sampler = GibbsSampler(ParticleGibbs(summed, **options), (y,), {})
    ess = torch.zeros(1, CHAIN.num_steps, dtype=torch.float64)
    latents = {"level": true["level"][None]}
    start = GibbsState({"path": true["path"][None]}, latents, ess[:, 0], ess, ess[:, :0])
    before, visited = int(torch.randint(SWEEPS + 1, ())), []
    for sweeps, reverse in ((before, True), (SWEEPS - before, False)):
        state = start
        for _ in range(sweeps):
            state = sampler.sweep(state, reverse=reverse)
            visited.append(state)
    paths = torch.cat([state.path for state in visited])
    return {"level": torch.cat([s.latents["level"] for s in visited]), "x": CHAIN.x0(paths)}


STATISTICS = {
    "level": lambda s: s["level"],
    "zeros": lambda s: zeros(s["x"]),
    "switch": lambda s: s["on"].double(),
    "both": lambda s: s["level"] + 0.3 * zeros(s["x"]),
}


@cache
def replicates(method, num):
    """Return what was true, and what was drawn given data from it, so many times."""
    found = []
    for seed in range(num):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(assay).get_trace()
        true = {name: trace.nodes[name]["value"] for name in ("level", "on", "x", "path")}
        found.append((true, method(trace.nodes["y"]["value"], true)))
    return found


def ranks(found):
    """Return the ranks of true values among draws, ties at random, int64 ``(n,)`` by quantity."""
    ranked = {}
    for true, draws in found:
        for name, statistic in STATISTICS.items():
            if name != "switch" or "on" in draws:
                here, among = statistic(true), statistic(draws)
                ties = int((among == here).sum())
                rank = int((among < here).sum()) + int(torch.randint(ties + 1, ()))
                ranked.setdefault(name, []).append(rank)
    return {name: torch.tensor(values) for name, values in ranked.items()}


def chi_square(rank, bins):
    size = SWEEPS + 1 if int(rank.max()) <= SWEEPS else DRAWS + 1
    counts = torch.bincount(rank * bins // size, minlength=bins).double()
    expected = len(rank) / bins
    return float(((counts - expected).square() / expected).sum())


def require_uniform(found, bins):
    for name, rank in found.items():
        # 4 standard errors of a chi-square with so few degrees of freedom, by Wilson and Hilferty.
        free = bins - 1
        limit = free * (1 - 2 / (9 * free) + 4 * (2 / (9 * free)) ** 0.5) ** 3
        assert chi_square(rank, bins) < limit, name


def test_smc_with_moves_is_calibrated():
    require_uniform(ranks(replicates(smc, 40)), bins=4)


def test_particle_gibbs_is_calibrated():
    require_uniform(ranks(replicates(gibbs, 40)), bins=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [smc, gibbs])
def test_calibration_over_many_replicates(method):
    require_uniform(ranks(replicates(method, 500)), bins=4 if method is gibbs else 8)


def test_draws_that_are_too_narrow_are_found_out():
    narrow = [
        (true, {**draws, "level": draws["level"].mean().expand(DRAWS)})
        for true, draws in replicates(smc, 40)
    ]
    with pytest.raises(AssertionError, match="level"):
        require_uniform({"level": 15 * (ranks(narrow)["level"] > 7)}, bins=4)
