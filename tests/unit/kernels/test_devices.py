"""Tensors live where their inputs or their network live."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import ppl_diffusion
from ppl_diffusion.denoisers import (
    EvaluatedDenoiser,
    Guided,
    Labelled,
    Nucleus,
    Transformer,
    TransformerConfig,
)
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import (
    Absorbing,
    ClassifierKernel,
    ConfidenceKernel,
    ExtrapolatedKernel,
    InterpolatingKernel,
    OrderedKernel,
)
from ppl_diffusion.processes.noise import uniforms
from ppl_diffusion.smc import FeynmanKac, run_smc
from ppl_diffusion.testing import DeviceDiscipline, toy_chain, toy_potential


def inside_the_library(source):
    """Run a line as if it stood in a file of the library."""
    file = f"{ppl_diffusion.__path__[0]}/planted.py"
    module = ModuleType("planted")
    exec(compile(source, file, "exec"), {**vars(module), "torch": torch, "np": np})


@pytest.mark.parametrize(
    "call",
    [
        "torch.zeros(2)",
        "torch.rand(2)",
        "torch.arange(2)",
        "torch.tensor(2.0)",
        "torch.as_tensor([2.0])",
        "torch.from_numpy(np.zeros(2))",
        "torch.full((2,), 1.0, device=None)",
        "import array_api_compat.torch as xp; xp.arange(2)",
    ],
)
def test_a_tensor_without_a_device_is_seen(call):
    with DeviceDiscipline(), pytest.raises(AssertionError, match=r"planted\.py:1 calls torch\."):
        inside_the_library(call)
    inside_the_library(call)  # outside of the mode nothing has changed


@pytest.mark.parametrize(
    "call",
    [
        "torch.zeros(2, device='cpu')",
        "torch.as_tensor(torch.ones(1, device='cpu'))",
        "torch.ones(2, device='cpu').new_zeros(3)",
    ],
)
def test_what_says_or_inherits_its_device_is_not(call):
    with DeviceDiscipline():
        inside_the_library(call)
        torch.zeros(2)  # a user's own tensor


def network(**options):
    torch.manual_seed(0)
    config = TransformerConfig(3, 4, 2, dim=8, depth=1, heads=2, **options)
    return Transformer(config).eval()


CHAINS = {
    "events": lambda: toy_chain("absorbing"),
    "uniform": lambda: toy_chain("uniform"),
    "skewed psi": lambda: toy_chain("skewed", kappa=[0.9, 1.0, 0.8]),
    "psi per site": lambda: toy_chain("absorbing", kappa=np.full((3, 2), 0.8)),
    "prompt": lambda: toy_chain("absorbing", prompt=torch.tensor([1, -1])),
    "ordered": lambda: around(lambda p, d: OrderedKernel(p, d, length=2)),
    "confidence": lambda: around(lambda p, d: ConfidenceKernel(p, d, num_steps=3)),
    "extrapolated": lambda: around(lambda p, d: ExtrapolatedKernel(p, d, num_steps=3)),
    "classifier": lambda: around(
        lambda p, d: ClassifierKernel(
            InterpolatingKernel(p, d, num_steps=3), lambda z, t: -z.sum(-1).double()
        )
    ),
    "network": lambda: with_network(network(time_conditioning=True)),
    "guided": lambda: with_network(guided(network(num_classes=2))),
}


def around(make):
    denoiser = toy_chain("absorbing").kernel.denoiser
    return ReverseChain(make(denoiser.process, denoiser), 2)


def guided(base):
    return Nucleus(Guided(Labelled(base, 1), Labelled(base, None), 2.0), 0.95)


def with_network(denoiser):
    return ReverseChain(InterpolatingKernel(Absorbing(3), denoiser, num_steps=3), 2)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_run_clean(name):
    chain = CHAINS[name]()
    with DeviceDiscipline(), torch.no_grad():
        path = chain.sample((5,))
        chain.log_prob(path.clone())
        if chain.kernel.markov and name not in ("classifier", "ordered"):
            for method in (chain.marginal().log_prob_bound, chain.marginal().log_prob_estimate):
                method(path[:, -1])
            chain.marginal().log_prob(path[:, -1])
        for twist in (None, "argmax", "persistent", lambda carry, k: torch.zeros(2, 4)):
            run_smc(FeynmanKac(chain, toy_potential(), twist=twist), 4, 2, ess_threshold=2.0)


@pytest.mark.parametrize("where", ["prior", "law"])
def test_step_distributions_run_clean(where):
    chain = toy_chain("uniform")
    with DeviceDiscipline():
        step = chain.kernel.prior_step((2,), 2)
        if where == "law":
            step = chain.kernel.step(chain.start((2,)), 0)
        step.log_prob(step.sample((3,)))
        step.enumerate_support()
        chain.marginal().enumerate_support()


def test_a_chain_begins_where_its_network_lives():
    """On the meta device, which has shapes and no numbers."""
    base = network(num_classes=2)
    chain = with_network(guided(base))
    assert chain.kernel.device == torch.device("cpu")
    held = ReverseChain(chain.kernel, 2, prompt=torch.tensor([1, -1])).expand((3,))
    moved = held.to("meta")
    assert moved.batch_shape == (3,)
    assert moved.kernel.device.type == "meta"
    assert moved.prompt.device.type == "meta"
    carry = moved.start((3,))
    assert carry["tokens"].device.type == "meta"
    assert base(carry["tokens"], 0.5).device.type == "meta"


@pytest.mark.parametrize("name", ["events", "uniform", "classifier"])
def test_every_denoiser_moves(name):
    chain = CHAINS[name]()
    wrapped = chain.kernel.with_denoiser(EvaluatedDenoiser(chain.kernel.denoiser))
    moved = ReverseChain(wrapped, 2).to("meta")
    assert moved.kernel.device.type == "meta"
    assert all(isinstance(p, Tensor) and p.is_meta for p in moved.kernel.denoiser.parameters())


def test_a_seed_means_the_same_on_every_device():
    """A generator draws where it lives, and the numbers are moved."""
    here, there = (torch.Generator().manual_seed(1) for _ in range(2))
    assert uniforms((3,), generator=here, device="meta").is_meta
    uniforms((3,), generator=there, device="cpu")
    assert torch.equal(here.get_state(), there.get_state())
