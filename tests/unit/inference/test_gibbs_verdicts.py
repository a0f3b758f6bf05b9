"""What is wrong with Markov chains: hand-made draws on both sides of every limit."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.inference import ParticleGibbs
from ppl_diffusion.potentials import Reward
from ppl_diffusion.smc.chain_rules import split_ess, split_rhat
from ppl_diffusion.testing import toy_markov_chain

CHAINS, DRAWS = 4, 500


def draws(seed=0, chains=CHAINS, num=DRAWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chains, num, generator=generator, dtype=torch.float64)


def autoregressive(rho, seed=0):
    noise, found = draws(seed), [draws(seed + 1)[:, 0]]
    for step in range(1, DRAWS):
        found.append(rho * found[-1] + (1 - rho**2) ** 0.5 * noise[:, step])
    return torch.stack(found, 1)


@pytest.fixture(scope="module")
def sampled():
    """Return a real result, the numbers of which are then replaced by others."""
    chain = toy_markov_chain(length=4, num_steps=4)

    def counted(y):
        x = chain.x0(pyro.sample("path", chain))
        gain = pyro.sample("gain", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(gain + (x == 0).double().sum(-1), 1.0), obs=y)

    method = ParticleGibbs(counted, num_particles=4, num_runs=2, num_samples=3, num_warmup=2)
    return method.run(torch.tensor(1.0), seed=0)


@pytest.fixture
def good(sampled):
    return replace(
        sampled,
        samples={"gain": draws(1)},
        log_density=draws(2),
        updated=torch.ones(CHAINS, DRAWS, 5, dtype=torch.bool),
        num_divergences=0,
    )


def kinds(posterior):
    return [verdict.kind for verdict in posterior.warnings]


def test_nothing_is_wrong_with_chains_that_agree(good):
    assert good.warnings == []
    assert "warnings: none" in repr(good)


def test_few_draws_are_not_enough(sampled):
    (verdict,) = [v for v in sampled.warnings if v.kind == "ess"]
    assert (verdict.value, verdict.limit) == (6.0, 100.0)


@pytest.mark.parametrize(("shift", "fires"), [(0.0, False), (0.5, True)])
def test_rhat(good, shift, fires):
    gain = draws(1)
    gain[0] += shift
    posterior = replace(good, samples={"gain": gain})
    assert kinds(posterior) == ["rhat"] * fires
    if fires:
        (verdict,) = posterior.warnings
        assert (verdict.where, verdict.limit) == ("gain", 1.01)
        assert verdict.startswith("R-hat of gain is 1.0")


def test_chains_of_other_spreads_do_not_agree(good):
    """Their ranks agree in the mean; folded ones do not. The failing twin looks at ranks alone."""
    gain = draws(1)
    gain[0] *= 2
    assert kinds(replace(good, samples={"gain": gain})) == ["rhat"]
    assert split_rhat(gain) > 1.01


@pytest.mark.parametrize(("rho", "fires"), [(0.5, False), (0.97, True)])
def test_bulk_ess(good, rho, fires):
    """An autoregressive chain of 2000 draws is worth 2000 (1 - rho) / (1 + rho): 667, or 30.

    Estimates from so short a chain are too high by up to a factor of two.
    """
    posterior = replace(good, log_density=autoregressive(rho))
    expected = CHAINS * DRAWS * (1 - rho) / (1 + rho)
    assert 0.7 * expected < split_ess(posterior.log_density) < 2 * expected
    assert ("ess" in kinds(posterior)) == fires


def test_divergences(good):
    (verdict,) = replace(good, num_divergences=1).warnings
    assert (verdict.kind, verdict.value) == ("divergences", 1.0)


@pytest.mark.parametrize(("changed", "fires"), [(26, False), (24, True)])
def test_frozen(good, changed, fires):
    """The first state that shows a token changes in a twentieth of 500 sweeps, or in fewer.

    The state of masks before it never changes, and is no sign of anything.
    """
    path = torch.full((CHAINS, DRAWS, 5, 4), 3, dtype=torch.uint8)
    for step in range(1, 5):
        path[:, :, step, :step] = 0
    updated = torch.ones(CHAINS, DRAWS, 5, dtype=torch.bool)
    updated[:, :, 0] = False
    updated[:, changed:, 1] = False
    posterior = replace(good, updated=updated, compact_path=path)
    assert kinds(posterior) == ["frozen"] * fires
    if fires:
        assert posterior.warnings[0].where == "step 1"


@pytest.mark.parametrize("chains", [1, CHAINS])
def test_a_latent_that_never_moves_is_frozen(good, chains):
    """Its R-hat and effective sample size are NaN, which is no pass."""
    gain = torch.arange(chains).double()[:, None].expand(chains, DRAWS) + 0.5
    posterior = replace(
        good,
        x0=good.x0[:1].expand(chains, *good.x0.shape[1:]),
        samples={"gain": gain},
        log_density=draws(2, chains),
        updated=good.updated[:chains],
    )
    (verdict,) = [v for v in posterior.warnings if v.kind == "frozen"]
    assert (verdict.level, verdict.where, verdict.value) == ("broken", "gain", chains)
    assert posterior.warnings[0] is verdict
    # Moving at all is enough; so is being the same in all chains (an atom), or discrete.
    moving, known = gain.clone(), {"discrete_latents": ["gain"]}
    moving[:, -1] += 1.0
    fine = [replace(posterior, samples={"gain": moving}), replace(posterior, settings=known)]
    if chains > 1:
        fine.append(replace(posterior, samples={"gain": torch.full_like(gain, 0.5)}))
    assert all("frozen" not in kinds(one) for one in fine)


def test_what_is_not_known_is_no_pass(good):
    """The failing twin compares NaN with the limit, and hears nothing."""
    few = draws(3, chains=100, num=3)  # enough of them, too short to be cut in two
    posterior = replace(good, samples={"gain": few}, log_density=few)
    assert kinds(posterior) == ["rhat"]
    assert "R-hat of log_density is not known (limit 1.01)" in posterior.warnings[0]
    same = torch.zeros_like(good.log_density)  # of a constraint that holds
    assert replace(good, log_density=same).warnings == []


def test_a_reward_that_fails_is_told(good):
    told = {"dock": {"asked": 10, "failed": 6, "first": "ValueError: no"}}
    assert kinds(replace(good, settings={"failures": told})) == ["reward"]


def test_failures_are_counted_wherever_the_function_stands():
    """Inside a program, made anew whenever it runs; distinct sequences count once."""
    chain = toy_markov_chain(length=3, num_steps=3)

    def dock(x0):
        if (x0 == 0).any():
            raise ValueError("no zeros")
        return x0.sum(-1).double()

    def docked():
        x = chain.x0(pyro.sample("path", chain))
        pyro.factor("dock", Reward(dock, on_error="reject")(x))

    options = {"num_samples": 5, "num_warmup": 0, "num_particles": 64, "num_runs": 1}
    told = ParticleGibbs(docked, twist=None, **options).run(seed=0).settings["failures"]["dock"]
    assert 0 < told["failed"] < told["asked"] <= 27
    assert told["failed"] <= 19  # with a zero; 8 of 27 have none
    assert told["first"].startswith("ValueError: no zeros")
