"""The program that came back with one value of each latent: now its runs agree, and with the truth.

Means are compared before they are normalised, or weighted by the evidence of their runs: a mean of
one run alone is biased by ``1 / N``.
"""

import pytest
import torch

from ppl_diffusion.inference import SMC, ParticleGibbs
from ppl_diffusion.testing.oracles import z_score
from tests.helpers.promoters import LONG, ROUGH, SHORT, promoters, truth

NAMES = ("gain", "sd")


def test_moves_agree_with_a_grid_on_the_tiny_twin():
    posterior = SMC(promoters, num_particles=64, num_runs=48).run(SHORT, ROUGH, seed=0)
    log_z, *means = truth()
    estimate = (posterior.log_evidence - log_z).exp()
    assert abs(z_score(estimate, 1.0)) < 3
    for name, mean in zip(NAMES, means, strict=True):
        found = posterior.expectation(lambda s, name=name: s[name])
        assert abs(z_score(estimate * (found - mean), 0.0)) < 3
        distinct = [len(run.unique()) for run in posterior.samples[name]]
        assert min(distinct) >= 32
    assert posterior.settings["latent_moves"]["kernels"] == dict.fromkeys(NAMES, "random-walk")


def test_without_moves_few_values_are_left():
    posterior = SMC(promoters, num_particles=64, num_runs=8, moves=None).run(SHORT, ROUGH, seed=0)
    distinct = [len(run.unique()) for run in posterior.samples["gain"]]
    assert sum(distinct) / 8 < 32


@pytest.mark.slow
def test_particle_gibbs_agrees_with_the_grid():
    options = {"num_particles": 16, "num_runs": 6, "num_samples": 200, "num_warmup": 50}
    posterior = ParticleGibbs(promoters, **options).run(SHORT, ROUGH, seed=0)
    for name, mean in zip(NAMES, truth()[1:], strict=True):
        assert abs(z_score(posterior.samples[name].mean(1), mean)) < 3


@pytest.mark.slow
def test_moves_agree_with_a_long_particle_gibbs_run():
    posterior = SMC(promoters, num_particles=1024, num_runs=16).run(LONG, seed=0)
    spread = posterior.log_evidence.max() - posterior.log_evidence.min()
    assert float(spread) < 3
    weights = torch.softmax(posterior.log_evidence, 0)
    options = {"num_particles": 32, "num_runs": 6, "num_samples": 200, "num_warmup": 50}
    gibbs = ParticleGibbs(promoters, **options).run(LONG, seed=0)
    for name in NAMES:
        assert min(len(run.unique()) for run in posterior.samples[name]) >= 512
        found = posterior.expectation(lambda s, name=name: s[name])
        mean, chains = (weights * found).sum(), gibbs.samples[name].mean(1)
        error = (weights.square() * (found - mean).square()).sum() * 16 / 15
        error = (error + chains.var() / len(chains)).sqrt()
        assert abs(float((mean - chains.mean()) / error)) < 3
