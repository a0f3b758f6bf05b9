"""A chain with a latent, its unrolled sites and a loop by hand are one law."""

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.handlers import unroll
from ppl_diffusion.kernels.path import Path
from ppl_diffusion.models import LatentDiffusion
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents

PATHS = [Path.sequential(2, 2), Path.ordered(4), Path.joint(16), Path.masked(3)]


def codes():
    network = random_latents(3, 2, 3, 2, seed=1).denoiser()
    return LatentDiffusion(network, vocabulary="abc", length=2)


def vectors():
    problem = corr_bits(0.1).embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)
    return LatentDiffusion(problem.denoiser(Gaussian()), vocabulary="01", length=2)


def stepwise(chain):
    """Draw whatever a step moves, with the carry in plain sight."""
    kernel = chain.kernel
    start = kernel.prior_blocks((), chain.length)
    first = {name: pyro.sample(f"{name[:3]}_0", law) for name, law in start.items()}
    tokens = torch.full((chain.length,), kernel.process.vocab_size)
    carry = kernel.resume({**chain.start(()), **first, "tokens": tokens})
    for k in range(chain.num_steps):
        step, value = kernel.step(carry, k), dict(carry)
        for name in kernel.moved(k):
            value[name] = pyro.sample(f"{name[:3]}_{k + 1}", step.blocks[name])
        drawn = {name: value[name] for name in step.blocks}
        carry = kernel.advance(carry, drawn, k, step=step)
    return carry


def program(chain):
    return chain.x0(pyro.sample("path", chain))


@pytest.mark.parametrize("make", [codes, vectors])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_loop_by_hand_has_the_density_of_the_chain(make, path):
    chain = make().chain(path)
    unrolled = poutine.trace(unroll(program)).get_trace(chain)
    whole = unrolled.nodes["path"]["value"]
    by_hand = poutine.trace(poutine.replay(stepwise, trace=unrolled)).get_trace(chain)
    assert set(by_hand.stochastic_nodes) == set(unrolled.stochastic_nodes) - {"path"}
    torch.testing.assert_close(by_hand.log_prob_sum(), unrolled.log_prob_sum())
    torch.testing.assert_close(by_hand.log_prob_sum(), chain.log_prob(whole.clone()))
    carry = by_hand.nodes["_RETURN"]["value"]
    torch.testing.assert_close(carry["tokens"], chain.x0(whole))
    torch.testing.assert_close(carry["latent"], chain.latent(whole))


def test_a_latent_can_be_conditioned_on():
    chain = codes().chain(Path.sequential(1, 2))
    seen = torch.tensor([2, 0])
    held = pyro.condition(unroll(program), data={"lat_1": seen})
    trace = poutine.trace(held).get_trace(chain)
    whole = trace.nodes["path"]["value"]
    assert torch.equal(chain.latent(whole), seen)
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(whole.clone()))
