"""Chains of tokens and a latent as one site, unrolled, and by hand with an explicit carry."""

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import unroll
from ppl_diffusion.kernels import Absorbing, LatentKernel, Path
from ppl_diffusion.processes.gaussian import Gaussian
from ppl_diffusion.testing.latent_toys import corr_bits, random_latents

BITS, NOISE = Absorbing(2), Gaussian("linear", t_min=0.2)
VECTORS = corr_bits(0.2).embedded(lambda x: 2.0 * x[:, :1, None] - 1.0)
PATHS = {
    "joint": (Path.joint(2), {"tok_1", "lat_1", "tok_2", "lat_2"}),
    "ordered": (Path.ordered(2), {"lat_1", "tok_2", "lat_3", "tok_4"}),
    "seq": (Path.sequential(2, 1), {"lat_1", "lat_2", "tok_3"}),
    "masked": (Path.masked(2), {"tok_1", "tok_2"}),
    "a fifth": (
        Path([(1, 1), (0.5, 0.2), (0.1, 0), (0, 0)]),
        {"tok_1", "lat_1", "tok_2", "lat_2", "tok_3"},
    ),
}


def chain_of(path, continuous=False):
    if continuous:
        return ReverseChain(LatentKernel(BITS, NOISE, VECTORS.denoiser(NOISE), path), 2)
    codes = random_latents(2, 2, 2, 2, seed=3)
    return ReverseChain(LatentKernel(BITS, BITS, codes.denoiser(), path), 2)


def stepwise(chain):
    kernel, carry = chain.kernel, chain.start(())
    for k in range(kernel.num_steps):
        step, moved = kernel.step(carry, k), kernel.moved(k)
        drawn = {
            block: pyro.sample(f"{block[:3]}_{k + 1}", law) if block in moved else carry[block]
            for block, law in step.blocks.items()
        }
        carry = kernel.advance(carry, drawn, k, step=step)
    return carry["tokens"]


def stochastic(trace):
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if name[:4] in ("lat_", "tok_") and node["type"] == "sample"
    }


@pytest.mark.parametrize("name", PATHS)
def test_the_path_changes_the_names_of_sites_and_nothing_else(name):
    path, sites = PATHS[name]
    chain = chain_of(path)
    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain))).get_trace()
    assert set(stochastic(trace)) == sites
    value = trace.nodes["path"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(value.clone()))
    by_hand = poutine.trace(poutine.condition(stepwise, data=stochastic(trace))).get_trace(chain)
    assert set(stochastic(by_hand)) == sites
    torch.testing.assert_close(by_hand.log_prob_sum(), chain.log_prob(value.clone()))
    assert torch.equal(by_hand.nodes["_RETURN"]["value"], chain.x0(value))


def test_a_vector_has_a_site_for_its_noise():
    chain = chain_of(Path.sequential(2, 1), continuous=True)
    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain))).get_trace()
    assert set(stochastic(trace)) == {"lat_0", "lat_1", "lat_2", "tok_3"}
    value = trace.nodes["path"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(value.clone()))


@pytest.mark.parametrize("name", PATHS)
def test_vectors_by_hand_have_the_density_of_the_chain(name):
    chain = chain_of(PATHS[name][0], continuous=True)
    kernel = chain.kernel

    def by_hand():
        laws = kernel.prior_blocks((), chain.length)
        noise = {"latent": pyro.sample("lat_0", laws["latent"])}
        carry = kernel.resume(chain.start(()) | noise)
        for k in range(kernel.num_steps):
            step = kernel.step(carry, k)
            moved = {b: pyro.sample(f"{b[:3]}_{k + 1}", step.blocks[b]) for b in kernel.moved(k)}
            value = {block: moved.get(block, carry[block]) for block in step.blocks}
            carry = kernel.advance(carry, value, k, step=step)
        return carry

    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain))).get_trace()
    again = poutine.trace(poutine.condition(by_hand, data=stochastic(trace))).get_trace()
    value = trace.nodes["path"]["value"]
    assert stochastic(again).keys() == stochastic(trace).keys()
    torch.testing.assert_close(again.log_prob_sum(), chain.log_prob(value.clone()))
    assert torch.equal(again.nodes["_RETURN"]["value"]["tokens"], chain.x0(value))
    assert torch.equal(again.nodes["_RETURN"]["value"]["latent"], chain.latent(value))


def test_an_observed_path_observes_its_steps():
    chain = chain_of(Path.ordered(2))
    value = chain.sample()
    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain, obs=value))).get_trace()
    assert all(trace.nodes[name]["is_observed"] for name in stochastic(trace))
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(value.clone()))
    # A latent that moves where the path holds it is impossible, and says so.
    wrong = value.clone()
    wrong[2, 2:] = 1 - wrong[1, 2:].clamp_max(1)
    trace = poutine.trace(unroll(lambda: pyro.sample("path", chain, obs=wrong))).get_trace()
    assert float(trace.log_prob_sum()) == float(chain.log_prob(wrong)) == -torch.inf


def test_a_latent_can_be_conditioned_in_the_middle():
    chain = chain_of(Path.sequential(2, 2))
    held = {"lat_2": torch.tensor([0, 1])}
    program = poutine.condition(unroll(lambda: pyro.sample("path", chain)), data=held)
    trace = poutine.trace(program).get_trace()
    assert torch.equal(chain.latent(trace.nodes["path"]["value"]), held["lat_2"])


def test_another_site_name_is_a_prefix():
    chain = chain_of(Path.joint(1))
    trace = poutine.trace(unroll(lambda: pyro.sample("left", chain))).get_trace()
    assert {"left_tok_1", "left_lat_1"} <= set(trace.nodes)
