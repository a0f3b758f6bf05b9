"""Simulation-based calibration (Talts et al. 2018): truth drawn from the prior, ranked in draws.

Data are drawn from the program itself, and the rank of what they were drawn from among posterior
draws is uniform. One chi-square test a quantity; its false alarm is that of 4 standard errors.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_diffusion.inference import SMC, LatentMoves, ParticleGibbs
from ppl_diffusion.testing.toys import toy_chain

CHAIN = toy_chain(vocab_size=3, length=3, num_steps=3, seed=2)
RATES = torch.tensor([0.3, 0.7], dtype=torch.float64)
DRAWS = 15


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
    each = [dist.Normal(level * k + zeros(x), 0.5).log_prob(y[:, None].squeeze(-1)[..., None]) for k in (1, 2)]
    sums = torch.stack([e.reshape(2, -1).sum(0) for e in each], -1) + RATES.log()
    pyro.factor("y", torch.logsumexp(sums, -1).reshape(level.shape))


def smc(y):
    options = {"num_particles": 96, "moves": LatentMoves(number=3)}
    posterior = SMC(assay, ess_threshold=0.8, **options).run(y)
    return posterior.resample(DRAWS)


def gibbs(y):
    options = {"num_particles": 8, "num_runs": 1, "num_warmup": 20, "nuts": {"max_tree_depth": 3}}
    posterior = ParticleGibbs(summed, num_samples=4 * DRAWS, **options).run(y)
    return {name: value[0, ::4] for name, value in posterior.samples.items()}


STATISTICS = {
    "level": lambda s: s["level"],
    "zeros": lambda s: zeros(s["x"]),
    "switch": lambda s: s["on"].double(),
    "both": lambda s: s["level"] + 0.3 * zeros(s["x"]),
}


def ranks(method, replicates):
    """Return the ranks of true values among draws, ties at random, int64 ``(quantities, n)``."""
    found = {}
    for seed in range(replicates):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(assay).get_trace()
        true = {name: trace.nodes[name]["value"] for name in ("level", "on", "x")}
        draws = method(trace.nodes["y"]["value"])
        for name, statistic in STATISTICS.items():
            if name != "switch" or "on" in draws:
                here, among = statistic(true), statistic(draws)
                ties = int((among == here).sum())
                rank = int((among < here).sum()) + int(torch.randint(ties + 1, ()))
                found.setdefault(name, []).append(rank)
    return {name: torch.tensor(values) for name, values in found.items()}


def chi_square(rank, bins):
    counts = torch.bincount(rank * bins // (DRAWS + 1), minlength=bins).double()
    expected = len(rank) / bins
    return float(((counts - expected).square() / expected).sum())


def require_uniform(found, bins):
    for name, rank in found.items():
        # 4 standard errors of a chi-square with so few degrees of freedom, by Wilson and Hilferty.
        free = bins - 1
        limit = free * (1 - 2 / (9 * free) + 4 * (2 / (9 * free)) ** 0.5) ** 3
        assert chi_square(rank, bins) < limit, name


def test_smc_with_moves_is_calibrated():
    require_uniform(ranks(smc, 40), bins=4)


def test_particle_gibbs_is_calibrated():
    require_uniform(ranks(gibbs, 40), bins=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [smc, gibbs])
def test_calibration_over_many_replicates(method):
    require_uniform(ranks(method, 500), bins=16)


def test_draws_that_are_too_narrow_are_found_out():
    def narrow(y):
        draws = smc(y)
        level = draws["level"]
        return {**draws, "level": level.mean() + 0.3 * (level - level.mean())}

    with pytest.raises(AssertionError, match="level"):
        require_uniform(ranks(narrow, 40), bins=4)
