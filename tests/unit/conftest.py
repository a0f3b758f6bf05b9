"""Posteriors made by hand."""

import pytest
import torch

from ppl_diffusion.smc import ParticlePosterior
from ppl_diffusion.smc.genealogy import eve_indices
from ppl_diffusion.smc.law import Base, Law, Tilt


def random_posterior(
    runs=3, particles=40, steps=5, length=6, vocab=4, plates=(), dead=(), path=False, seed=0
):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (runs, particles, *plates, steps + 1, length), generator=g)
    resampled = torch.rand((runs, steps), generator=g, dtype=torch.float64) < 0.5
    parents = torch.randint(particles, (steps, runs, particles), generator=g)
    identity = torch.arange(particles).expand_as(parents)
    ancestors = torch.where(resampled.T[:, :, None], parents.sort(-1).values, identity)
    log_potential = torch.randn((runs, particles), generator=g, dtype=torch.float64)
    increments = 0.3 * torch.randn((runs, steps), generator=g, dtype=torch.float64)
    died_at = torch.full((runs,), -1)
    log_weights = log_potential.log_softmax(-1)
    for run in dead:
        increments[run, steps - 2 :] = -torch.inf
        log_weights[run] = log_potential[run] = -torch.inf
        died_at[run] = steps - 2
    log_evidence_steps = increments.cumsum(-1)
    x0 = tokens[..., -1, :].contiguous()
    return ParticlePosterior(
        x0=x0,
        log_weights=log_weights,
        log_evidence=log_evidence_steps[:, -1],
        evidence_variance=torch.full((runs,), 0.09, dtype=torch.float64),
        ancestors=ancestors,
        eve=eve_indices(ancestors),
        ess=particles * torch.rand((runs, steps), generator=g, dtype=torch.float64),
        resampled=resampled,
        log_evidence_steps=log_evidence_steps,
        died_at=died_at,
        log_potential=log_potential,
        times=torch.linspace(1, 0, steps + 1, dtype=torch.float64),
        samples={"x0": x0},
        num_evaluations=1200,
        num_potential_calls=340,
        law=Law((Base("x", "a hand-made kernel", steps, length, plates),), (Tilt("hand-made"),)),
        seconds=1.5,
        compact_path=tokens if path else None,
        settings={"resampler": "systematic", "ess_threshold": 0.5, "seed": 7, "twist": None},
    )


@pytest.fixture
def make_posterior():
    return random_posterior
