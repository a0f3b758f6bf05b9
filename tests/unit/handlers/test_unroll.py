"""unroll writes a chain as one site per step and changes no number."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from ppl_diffusion.handlers import Unroll, unroll
from ppl_diffusion.testing.oracles import ExactChain, chi_square_p_value
from ppl_diffusion.testing.toys import counted, toy_chain, toy_potential


def program(chain):
    path = pyro.sample("path", chain)
    return chain.x0(path)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("prompt", [None, torch.tensor([1, -1])])
def test_density_is_the_same_number(process, prompt):
    chain = toy_chain(process, prompt=prompt)
    trace = poutine.trace(unroll(program)).get_trace(chain)
    assert [n for n in trace.nodes if n.startswith("path")] == [
        "path_0",
        "path_1",
        "path_2",
        "path_3",
        "path",
    ]
    path = trace.nodes["path"]["value"]
    assert path.shape == chain.event_shape
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path.clone()))


def test_it_costs_one_network_call_per_step():
    chain, counter = counted(toy_chain("uniform", num_steps=3))
    poutine.trace(unroll(program)).get_trace(chain).log_prob_sum()
    assert counter.calls == 3


def test_an_observed_path_observes_its_steps():
    chain = toy_chain()
    path = chain.sample()
    conditioned = poutine.condition(program, data={"path": path})
    trace = poutine.trace(unroll(conditioned)).get_trace(chain)
    assert trace.nodes["path_2"]["is_observed"]
    torch.testing.assert_close(trace.log_prob_sum(), chain.log_prob(path))


def test_steps_broadcast_over_plates():
    chain = toy_chain()

    def plated(chain):
        with pyro.plate("n", 5):
            return program(chain)

    trace = poutine.trace(unroll(plated)).get_trace(chain)
    assert trace.nodes["path_1"]["fn"].batch_shape == (5,)
    path = trace.nodes["path"]["value"]
    assert path.shape == (5, *chain.event_shape)
    trace.compute_log_prob()
    total = sum(trace.nodes[f"path_{k}"]["log_prob"] for k in range(4))
    torch.testing.assert_close(total, chain.log_prob(path.clone()))


def test_sites_can_be_chosen_and_others_are_refused_by_the_reparam():
    chain = toy_chain()
    trace = poutine.trace(unroll(program, sites=["other"])).get_trace(chain)
    assert "path_0" not in trace.nodes
    wrong = poutine.reparam(
        lambda: pyro.sample("z", pyro.distributions.Normal(0, 1)), {"z": Unroll()}
    )
    with pytest.raises(ValueError, match="'z' is a Normal, not a ReverseChain"):
        wrong()


def test_unrolled_chains_have_the_exact_law():
    chain = toy_chain("uniform")
    with pyro.plate("n", 20000):
        x0 = unroll(program)(chain)
    exact = ExactChain.of(chain)
    counts = exact.histogram(x0) * 20000
    assert chi_square_p_value(counts, exact.x0_law()) > 1e-4  # the false-alarm rate


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("plate", [None, 2])
def test_enumeration_sums_over_the_steps(process, plate):
    """``TraceEnum_ELBO`` eliminates the steps one by one: minus log evidence, exactly."""
    chain, potential = toy_chain(process, num_steps=3), toy_potential()

    def score():
        x0 = program(chain).clamp_max(2)  # sequences with a mask have probability zero
        pyro.factor("reward", potential(x0))

    def enumerated():
        if plate is None:
            score()
        else:
            with pyro.plate("n", plate):
                score()

    elbo = TraceEnum_ELBO(max_plate_nesting=0 if plate is None else 1)
    loss = elbo.loss(config_enumerate(unroll(enumerated)), lambda: None)
    exact = math.log(ExactChain.of(chain).evidence(potential))
    assert -loss == pytest.approx((plate or 1) * exact, abs=1e-9)
