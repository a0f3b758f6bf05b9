import jax
import numpy as np
import pytest
import torch

import ppl_diffusion.numpyro as ppn
from ppl_diffusion.inference import SMC
from ppl_diffusion.models import MaskedDiffusion
from ppl_diffusion.potentials import Potential

LAW = [0.0, 0.2, 0.3, 0.5]


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    shape = {"dim": 8, "depth": 1, "heads": 2}
    program = MaskedDiffusion.build("ab_", 3, lengths=LAW, **shape)
    torch.nn.init.normal_(program.denoiser.vocabulary.weight, std=0.5)
    return program.eval()


def test_paths_of_several_lengths_are_scored_alike(prior):
    chain = prior.chain(4)
    path = chain.sample((100,), generator=torch.Generator().manual_seed(0))
    twin = ppn.from_torch(chain)
    found, known = twin.log_prob(np.asarray(path)), chain.log_prob(path.clone()).detach()
    np.testing.assert_allclose(found, known, rtol=0, atol=1e-4)


def test_draws_have_the_law_of_lengths(prior):
    twin = ppn.from_torch(prior.chain(4))
    x0 = np.asarray(twin.x0(twin.sample(jax.random.key(0), (20_000,))))
    shares = np.bincount((x0 != 2).sum(-1), minlength=4) / 20_000
    # Four standard errors of a share: three of them fail by chance less than 2e-4.
    np.testing.assert_array_less(np.abs(shares - LAW), 4 * np.sqrt(0.25 / 20_000))


def test_evidence_agrees_between_backends(prior):
    chain = prior.chain(3)
    likes_a = Potential(lambda x0: (x0 == 0).sum(-1).double())
    runner = ppn.SMC(ppn.from_torch(chain), likes_a, num_particles=64, num_runs=50)
    ours = runner.run(jax.random.key(0)).log_evidence.exp()
    theirs = SMC(chain, likes_a, num_particles=64, num_runs=50).run(seed=0).log_evidence.exp()
    error = (ours.var() / 50 + theirs.var() / 50).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error  # fails by chance once in 16,000
