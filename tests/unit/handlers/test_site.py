"""Proposed chain sites score what they drew, wherever the tensor went meanwhile."""

import copy

import pyro
import pytest
import torch
from pyro import poutine

from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import clamp, steer
from ppl_diffusion.potentials import Potential
from ppl_diffusion.testing import toy_chain

HANDLERS = {
    "clamp": lambda fn: clamp(fn, tokens=torch.tensor([1, 0]), mask=torch.tensor([True, False])),
    "steer": lambda fn: steer(
        fn, potential=Potential(lambda x0: -x0.sum(-1).double()), num_particles=4
    ),
}


@pytest.fixture(params=sorted(HANDLERS))
def trace(request):
    chain = toy_chain("uniform")
    with pyro.plate("n", 3):
        return poutine.trace(
            HANDLERS[request.param](lambda: pyro.sample("path", chain))
        ).get_trace()


def test_detached_and_copied_traces_keep_their_density(trace):
    twin = copy.deepcopy(trace)
    expected = trace.nodes["path"]["fn"].log_prob(trace.nodes["path"]["value"])
    torch.testing.assert_close(twin.log_prob_sum(), expected.sum())
    trace.detach_()
    torch.testing.assert_close(trace.log_prob_sum(), expected.sum())


def test_an_edited_draw_is_refused(trace):
    site, path = trace.nodes["path"]["fn"], trace.nodes["path"]["value"]
    path[..., -1, -1] = (path[..., -1, -1] + 1) % 3
    with pytest.raises(CapabilityError, match="its own draw only"):
        site.log_prob(path)
    with pytest.raises(CapabilityError, match="its own draw only"):
        site.log_prob(path[:2])
