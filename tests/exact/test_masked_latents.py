"""Latents that a program masks have the law that they are drawn from (4 standard errors: 6e-5)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.programs.tracking import OwnLaws
from ppl_diffusion.testing.oracles import z_score
from tests.helpers.program_e import CHAIN, LAW, zero

Y, SD = zero(5.0), 0.5
PARTLY = torch.tensor([True, False])


def by_distribution(level):
    return pyro.sample("g", dist.Normal(level, SD).mask(False))


def by_handler(level):
    with poutine.mask(mask=False):
        return pyro.sample("g", dist.Normal(level, SD))


def partly(level):
    with pyro.plate("two", 2), poutine.mask(mask=PARTLY):
        g = pyro.sample("g", dist.Normal(level, SD))
    return g.mean(-1, keepdim=g.ndim > 1)


def inside(level):
    loc = level[..., None].expand(*level.shape, 2)
    return pyro.sample("g", dist.Normal(loc, SD).mask(PARTLY).to_event(1)).mean(-1)


WAYS = {"distribution": by_distribution, "handler": by_handler, "plate": partly, "event": inside}


def program(way):
    def masked():
        level = pyro.sample("level", dist.Normal(zero(), 1.0))
        seen = WAYS[way](level) + (CHAIN.x0(pyro.sample("path", CHAIN)) == 0).sum(-1)
        pyro.sample("y", dist.Normal(seen, SD), obs=Y)

    return masked


def truth(way):
    """Return the evidence and the mean of the level."""
    variance = 1 + SD**2 + SD**2 / (1 if way in ("distribution", "handler") else 2)
    count = (torch.cartesian_prod(*[torch.arange(3)] * 3) == 0).sum(-1)
    cells = LAW * dist.Normal(count.double(), variance**0.5).log_prob(Y).exp()
    return cells.sum(), (cells * (Y - count) / variance).sum() / cells.sum()


def scores(way):
    posterior = SMC(program(way), num_particles=8, num_runs=2000, store_path=False).run(seed=1)
    evidence, level = truth(way)
    ratio = posterior.log_evidence.exp() / evidence
    means = posterior.expectation(lambda s: s["level"].reshape(2000, 8))
    told = posterior.settings["latent_moves"]
    return told, [z_score(ratio, 1.0), z_score(ratio * (means - level), 0.0)]


@pytest.mark.parametrize("way", WAYS)
def test_masked_latents_are_left_and_those_above_them_move_exactly(way):
    told, found = scores(way)
    assert told["left"] == {"g": "the program masks it"}
    assert told["kernels"] == {"level": "random-walk"}
    assert all(abs(z) < 4 for z in found)


def test_flat_laws_are_found_out(monkeypatch):
    monkeypatch.setattr(OwnLaws, "_pyro_sample", lambda self, msg: None)
    assert max(abs(z) for z in scores("handler")[1]) > 8


def test_particle_gibbs_gives_masked_latents_their_own_law():
    """Under a flat one the level would not hear of the data: its mean would be 0, not 2.6."""
    size = {"num_particles": 4, "num_runs": 1, "num_warmup": 3, "num_samples": 15}
    draws = ParticleGibbs(program("distribution"), **size).run(seed=0).samples["level"]
    assert float(draws.mean()) > float(truth("distribution")[1]) / 2
