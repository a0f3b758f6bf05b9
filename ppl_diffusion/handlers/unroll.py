"""Write a reverse chain as one site per step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.reparam_messenger import ReparamMessenger

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.distributions.reverse_chain import ReverseChain
from ppl_diffusion.kernels.base import GIVEN, Carry


class Unroll(Reparam):
    """Replace a chain site ``x`` by the sites ``x_0`` (noisiest) to ``x_T`` (clean).

    The joint density is the same number, factor by factor, and the cost is the same ``T``
    network calls; the site ``x`` stays as the deterministic path. With an observed path the
    steps are observed.
    """

    def apply(self, msg: Any) -> Any:
        """Return the deterministic path after sampling its steps (Pyro's protocol)."""
        name, chain = msg["name"], msg["fn"]
        if not isinstance(chain, ReverseChain):
            kind = type(chain).__name__
            raise ValueError(f"unroll: site {name!r} is a {kind}, not a ReverseChain.")
        if not chain.kernel.has_path_density:
            raise CapabilityError(
                f"unroll: the steps of {type(chain.kernel).__name__} ({chain.kernel.claim}) have "
                "no density given the tokens; use a kernel that has one."
            )
        given = None if msg["value"] is None else msg["value"].unbind(-2)
        kernel, fixed = chain.kernel, chain.fixed
        step: Any = kernel.prior_step(chain.batch_shape, chain.length, prompt=chain.prompt)
        states: list[torch.Tensor] = []
        carry: Carry = {}
        for k in range(chain.num_steps + 1):
            if k > 0:
                step = kernel.step(carry, k - 1, fixed=fixed)
            value = None if given is None else given[k]
            states.append(pyro.sample(f"{name}_{k}", step, obs=value))
            state = states[-1]
            # What the carry remembers has all dimensions of the states.
            if not kernel.markov or chain.given:
                batch = torch.broadcast_shapes(state.shape[:-1], step.batch_shape)
                state = state.expand(*batch, -1)
            if k == 0:
                carry = kernel.start_carry(state)
            else:
                carry = kernel.advance(carry, state, k - 1, step=step)
            if chain.given:  # under enumeration every state has dimensions of its own
                carry[GIVEN] = kernel.expand_given(chain.given, state.shape[:-1])
        path = _joined(states, chain) if msg["value"] is None else msg["value"]
        site = Delta(path, event_dim=chain.event_dim).mask(False)
        return {"fn": site, "value": path, "is_observed": True}


def _joined(states: list[torch.Tensor], chain: ReverseChain) -> torch.Tensor:
    # Under enumeration every step has a batch dimension of its own, and plates have size one.
    shape = torch.broadcast_shapes(chain.batch_shape, *(state.shape[:-1] for state in states))
    return torch.stack([state.expand(*shape, -1) for state in states], -2)


def unroll(fn: Callable[..., Any] | None = None, *, sites: Collection[str] | None = None) -> Any:
    """Unroll the chain sites of a program; density and proposal are unchanged.

    :param fn: a program to wrap; without it, use ``unroll`` as a context manager.
    :param sites: names of the chain sites (all by default).
    """

    def config(msg: Any) -> Reparam | None:
        chosen = sites is None or msg["name"] in sites
        return Unroll() if chosen and isinstance(msg["fn"], ReverseChain) else None

    messenger = ReparamMessenger(config=config)
    return messenger if fn is None else messenger(fn)
