"""Latents that a chain depends on: what moving them costs, what it gives, and where it stops."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import twist
from ppl_diffusion.inference import SMC, LatentMoves, latent_paths
from ppl_diffusion.inference.latent_paths import stops
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.testing.conditional import TiltedSites
from ppl_diffusion.testing.toys import toy_chain

MASKED, FREE = Absorbing(2), toy_chain("uniform", vocab_size=2, length=2, num_steps=5)


KERNEL = OrderedKernel(MASKED, TiltedSites(MASKED), length=3)
ONCE = OrderedKernel(MASKED, TiltedSites(MASKED), length=1)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def program():
    c = pyro.sample("c", dist.Normal(number(0.0), 1.0))
    chain = ReverseChain(KERNEL, 3, given={"cond": c})
    zeros = (chain.x0(pyro.sample("path", chain)) == 0).sum(-1)
    pyro.sample("y", dist.Normal(zeros - c, 0.7), obs=number(2.0))


def two_chains():
    """A chain that depends on a latent beside a longer one that does not."""
    c = pyro.sample("c", dist.LogNormal(number(0.0), 1.0))
    gain = pyro.sample("gain", dist.Normal(number(0.0), 1.0))
    chain = ReverseChain(KERNEL, 3, given={"cond": c - 1})
    zeros = (chain.x0(pyro.sample("path", chain)) == 0).sum(-1)
    other = (FREE.x0(pyro.sample("other", FREE)) == 0).sum(-1)
    pyro.sample("y", dist.Normal(gain + zeros + other - c, 0.7), obs=number(2.0))


def late():
    """A chain of one step, which is the last of five, depends on a latent."""
    c = pyro.sample("c", dist.Normal(number(0.0), 1.0))
    chain = ReverseChain(ONCE, 1, given={"cond": c})
    zeros = (chain.x0(pyro.sample("path", chain)) == 0).sum(-1)
    other = (FREE.x0(pyro.sample("other", FREE)) == 0).sum(-1)
    pyro.sample("y", dist.Normal(zeros + other - c, 0.7), obs=number(2.0))


def chained():
    """A chain that depends on a latent, and on another one's sequence."""
    c = pyro.sample("c", dist.Normal(number(0.0), 1.0))
    first = (FREE.x0(pyro.sample("other", FREE)) == 0).double().mean(-1)
    chain = ReverseChain(KERNEL, 3, given={"cond": c + first})
    zeros = (chain.x0(pyro.sample("path", chain)) == 0).sum(-1)
    pyro.sample("y", dist.Normal(zeros - c, 0.7), obs=number(2.0))


def test_rows_of_replayed_paths_are_counted(monkeypatch):
    """After 1 and 2 of 3 steps a candidate costs these and a completion, at the end 3 rows."""
    monkeypatch.setattr("ppl_diffusion.inference.scout.LOW", 0.0)
    size = {"num_particles": 8, "num_runs": 3, "ess_threshold": 0.0}
    moved = SMC(program, **size).run(seed=0)
    still = SMC(program, moves=None, **size).run(seed=0)
    candidates = 3 * 8 + 8 + 8  # the scout asks about one and, first, about where it stands
    per_candidate = (1 + 1) + (2 + 1) + 3
    along = moved.settings["latent_moves"]["along_paths"]
    assert along["schedule"] == [1, 2, 3]
    assert along["network_rows"] == candidates * per_candidate
    assert moved.num_evaluations >= still.num_evaluations + along["network_rows"]
    # Of the program: a row for the conditions, and five completions or the end.
    assert moved.num_move_rows == candidates * ((1 + 5) + (1 + 5) + (1 + 1))
    assert still.num_move_rows == 0
    assert still.settings["latent_moves"]["left"] == {"c": "moves=None"}


@pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}, {"method": "steering"}])
def test_there_are_more_distinct_values(options):
    size = {"num_particles": 16, "num_runs": 2, "ess_threshold": 2.0, **options}
    moved = SMC(program, **size).run(seed=0)
    still = SMC(program, moves=None, **size).run(seed=0)
    assert all(
        len(a.unique()) > len(b.unique())
        for a, b in zip(moved.samples["c"], still.samples["c"], strict=True)
    )


@pytest.mark.parametrize("tuning", ["scout", "own"])
def test_chains_that_nothing_feeds_and_latents_that_feed_nothing_stay_cheap(tuning):
    size = {"num_particles": 16, "num_runs": 2, "ess_threshold": 2.0}
    moves = LatentMoves(tuning=tuning, number=1)
    done = SMC(two_chains, moves=moves, **size).run(seed=0).settings["latent_moves"]
    assert done["kernels"] == {"gain": "random-walk", "c": "random-walk"}
    assert done["schedule"] == [1, 2, 3, 4, 5]
    assert done["along_paths"]["schedule"] == [2, 3, 4, 5]
    assert done["left"] == {}


def test_a_chain_that_has_not_moved_yet_costs_its_completions_alone():
    done = SMC(late, num_particles=16, ess_threshold=2.0).run(seed=0).settings["latent_moves"]
    assert done["along_paths"]["schedule"] == [2, 3, 4, 5]
    assert min(done["along_paths"]["acceptance"]) > 0


def test_stops_are_quarters_of_the_run():
    assert stops(1) == set()
    assert stops(4) == {1, 2, 3}
    assert stops(64) == {16, 32, 48}
    assert stops(6) == {2, 3, 5}


def left(model, **options):
    posterior = SMC(model, num_particles=4, **options).run(seed=0)
    return posterior.settings["latent_moves"]["left"]


def test_what_stays_is_said_by_name(monkeypatch):
    whose = "a chain depends on it, whose paths"
    assert left(program, method="twisted") == {"c": f"{whose} TwistedSampler does not replay"}
    assert left(chained) == {"c": "a chain depends on it, and chains on one another"}
    guided = twist(program, logits=lambda carry, log_probs, k: torch.zeros(3, 2))
    assert left(guided) == {"c": "a chain depends on it, which moves by a proposal"}
    proposed = left(program, proposal=lambda step, carry, k: step)
    assert proposed == {"c": "a chain depends on it, which moves by a proposal"}
    monkeypatch.setattr(OrderedKernel, "has_path_density", False)
    assert left(program) == {"c": f"{whose} have no density"}


def test_conditions_that_overflow_are_refused_as_candidates(monkeypatch):
    """A network is never asked about what is no number."""
    conditions = latent_paths.conditions

    def overflow(run, guess, latents):
        found = conditions(run, guess, latents)
        cond = found["path"]["cond"]
        return {"path": {"cond": torch.where(cond > 0, torch.inf, cond)}}

    monkeypatch.setattr(latent_paths, "conditions", overflow)
    monkeypatch.setattr(latent_paths.PathMover, "require_same_law", lambda *_: None)
    posterior = SMC(program, num_particles=16, ess_threshold=2.0).run(seed=0)
    assert bool(posterior.samples["c"].isfinite().all())


def test_paths_that_cannot_be_replayed_are_refused(monkeypatch):
    retrace = latent_paths.retrace

    def off(*args):
        told = retrace(*args)
        return {**told, "log_prob": told["log_prob"] + 1.0}

    monkeypatch.setattr(latent_paths, "retrace", off)
    with pytest.raises(CapabilityError, match="another probability when they are replayed"):
        SMC(program, num_particles=8).run(seed=0)
