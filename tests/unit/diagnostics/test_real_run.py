"""The diagnostics on a posterior that the SMC engine made, saved and loaded."""

import json

import numpy as np
import pytest
import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.diagnostics import (
    plot_ancestry_data,
    plot_evidence_data,
    plot_token_entropy_data,
    summary,
)
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Absorbing, InterpolatingKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.smc import FeynmanKac, ParticlePosterior, run_smc

VOCAB, LENGTH, STEPS = 3, 5, 4


@pytest.fixture(scope="module")
def posterior():
    generator = torch.Generator().manual_seed(0)
    initial = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    transition = torch.rand((VOCAB, VOCAB), generator=generator, dtype=torch.float64)
    transition = transition / transition.sum(-1, keepdim=True)
    process = Absorbing(VOCAB)
    kernel = InterpolatingKernel(
        process, MarkovDenoiser(initial, transition, process), num_steps=STEPS
    )
    count = Potential(lambda x0: 0.8 * (x0 == 2).sum(-1).double())
    model = FeynmanKac(ReverseChain(kernel, length=LENGTH), count, twist="argmax")
    return run_smc(model, num_particles=64, num_runs=3, ess_threshold=0.8, generator=generator)


def test_the_family_tree_ends_at_the_eves_of_the_engine(posterior):
    assert posterior.resampled.any()
    for run in range(3):
        data = plot_ancestry_data(posterior, run=run)
        np.testing.assert_array_equal(data["root"][-1], posterior.eve[run])
        nodes = posterior.genealogy(run).nodes
        survives = [[nodes[k, n]["survives"] for n in range(64)] for k in range(STEPS + 1)]
        np.testing.assert_array_equal(data["survives"], survives)


def test_the_running_evidence_ends_at_the_evidence(posterior):
    pooled = plot_evidence_data(posterior)["pooled"]
    assert pooled[-1] == pytest.approx(posterior.pooled_log_evidence)
    assert summary(posterior)["log_evidence"] == pytest.approx(pooled[-1])


def test_entropy_starts_at_the_mask_and_ends_at_x0(posterior):
    data = plot_token_entropy_data(posterior)
    np.testing.assert_allclose(data["entropy_steps"][0], 0.0, atol=1e-12)
    np.testing.assert_array_equal(data["entropy_steps"][-1], data["entropy"])
    assert (data["entropy"] > 0.1).all()


def test_arviz_data_and_summary_survive_saving_the_posterior(posterior, tmp_path):
    loaded = ParticlePosterior.load(posterior.save(tmp_path))
    data, again = posterior.to_arviz(), loaded.to_arviz()
    for group in ("posterior", "sample_stats", "smc", "smc_history"):
        assert data[group].equals(again[group])
    assert dict(data.attrs) == dict(again.attrs)
    facts = summary(loaded)
    assert facts == summary(posterior)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
