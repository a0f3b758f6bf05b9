"""A run that was interrupted at any step goes on to the bits of the unbroken one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from interrupted import differences, kept, resumed_everywhere

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC, LatentMoves, methods
from ppl_diffusion.kernels import Absorbing, OrderedKernel
from ppl_diffusion.potentials import Potential
from ppl_diffusion.potentials.factor import factor
from ppl_diffusion.smc import Defensive
from ppl_diffusion.testing.toys import toy_chain, toy_markov_chain, toy_potential


def asked(method):
    """Return options with which runs resample often, where the method leaves that open."""
    usual = methods()[method].ess_threshold == 0.5
    options = {"ess_threshold": 0.9} if usual else {}
    beam = {"num_children": 2} if method == "beam" else {}
    return {"method": method, "num_particles": 8, "num_runs": 2, **options, **beam}


def ordered():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    probs, process = torch.softmax(logits, -1), Absorbing(3)
    denoiser = MarkovDenoiser(probs[0], probs[1:], process)
    return ReverseChain(OrderedKernel(process, denoiser, length=4), 4)


CHAINS = {
    "absorbing": lambda: toy_markov_chain(length=4, num_steps=4),
    "uniform": lambda: toy_markov_chain("uniform", length=4, num_steps=4),
    "ordered": ordered,
}


def goal():
    return Potential(lambda x0: 1.5 * (x0[..., :-1] == x0[..., 1:]).sum(-1), name="pairs")


def assay(chain):
    gain = pyro.sample("gain", dist.Normal(torch.tensor(0.0).double(), 1.0))
    x = pyro.deterministic("x", chain.x0(pyro.sample("path", chain)), event_dim=1)
    kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.3).double()))
    pyro.sample(
        "y", dist.Normal(gain + kind + (x == 0).sum(-1), 0.5), obs=torch.tensor(1.0).double()
    )
    factor("goal", goal(), x)


UNGUIDED = [name for name, cls in methods().items() if cls.needs.any_target]


def check(make, folder, every=1):
    whole = make()
    for last, posterior in resumed_everywhere(make, folder, every):
        assert not differences(whole, posterior), f"interrupted at boundary {last}"


@pytest.mark.parametrize("process", CHAINS)
@pytest.mark.parametrize("method", UNGUIDED)
def test_a_chain_with_a_potential(method, process, tmp_path):
    def make():
        return SMC(CHAINS[process](), goal(), **asked(method)).run(seed=0)

    check(make, tmp_path)


@pytest.mark.parametrize("method", UNGUIDED)
def test_a_program_with_latents(method, tmp_path):
    def make():
        chain = toy_markov_chain(length=3, num_steps=3)
        return SMC(assay, **asked(method)).run(chain, seed=0)

    check(make, tmp_path)
