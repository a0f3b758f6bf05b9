"""Write a reverse chain as one site per step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.reparam_messenger import ReparamMessenger
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.kernels.base import GIVEN, Carry
from ppl_diffusion.kernels.blocks import TOKENS


class Unroll(Reparam):
    """Replace a chain site ``x`` by the sites ``x_0`` (noisiest) to ``x_T`` (clean).

    The joint density is the same number, factor by factor, and the cost is the same ``T``
    network calls; the site ``x`` stays as the deterministic path. With an observed path the
    steps are observed.

    A chain with latents beside its tokens has a site for each of them wherever a step draws it:
    ``x_tok_k`` and ``x_lat_k``, without the prefix where the site is called ``"path"``.
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
        sample = _sample_blocks if chain.kernel.blocks else _sample_steps
        states = sample(name, chain, msg["value"])
        path = _joined(states, chain) if msg["value"] is None else msg["value"]
        site = Delta(path, event_dim=chain.event_dim).mask(False)
        return {"fn": site, "value": path, "is_observed": True}


def _sample_steps(name: str, chain: ReverseChain, path: Tensor | None) -> list[Tensor]:
    kernel: Any = chain.kernel
    given = [None] * (chain.num_steps + 1) if path is None else path.unbind(-2)
    step = kernel.prior_step(chain.batch_shape, chain.length, prompt=chain.prompt)
    states = [pyro.sample(f"{name}_0", step, obs=given[0])]
    # The one start that must wait for its tokens: Pyro draws, observes or enumerates them.
    carry = kernel.start_carry(_whole(states[0], chain, step))
    carry = _with_given(carry, states[0], chain)
    for k, value in enumerate(given[1:]):
        step = kernel.step(carry, k, fixed=chain.fixed)
        states.append(pyro.sample(f"{name}_{k + 1}", step, obs=value))
        carry = kernel.advance(carry, _whole(states[-1], chain, step), k, step=step)
        carry = _with_given(carry, states[-1], chain)
    return states


def _sample_blocks(name: str, chain: ReverseChain, path: Tensor | None) -> list[Tensor]:
    kernel: Any = chain.kernel
    prefix = "" if name == "path" else f"{name}_"
    known = [None] * (chain.num_steps + 1) if path is None else path.unbind(-2)
    observed = [None if x is None else kernel.split(x) for x in known]
    begun = {TOKENS: chain.start(chain.batch_shape)[TOKENS]}
    start = kernel.prior_blocks(chain.batch_shape, chain.length, prompt=chain.prompt)
    carry = kernel.resume(begun | _sample_laws(prefix, 0, start, {}, observed[0]), chain.given)
    states = [kernel.flat(carry)]
    for k in range(chain.num_steps):
        step = kernel.step(carry, k, fixed=chain.fixed)
        # Noise that a step leaves alone is no site: it would be resampled, and mean nothing.
        seen = observed[k + 1] or carry
        still = step.blocks.keys() - kernel.moved(k)
        held = {n: carry[n] for n in still if torch.equal(seen[n], carry[n])}
        laws = {n: law for n, law in step.blocks.items() if n not in held}
        value = _sample_laws(prefix, k + 1, laws, held, observed[k + 1])
        carry = kernel.advance(carry, value, k, step=step)
        states.append(kernel.flat(carry))
    return states


def _sample_laws(
    prefix: str,
    k: int,
    laws: Mapping[str, Any],
    held: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    drawn = {
        block: pyro.sample(
            f"{prefix}{block[:3]}_{k}", law, obs=None if observed is None else observed[block]
        )
        for block, law in laws.items()
    }
    return {**held, **drawn}


def _with_given(carry: Carry, state: Tensor, chain: ReverseChain) -> Carry:
    if not chain.given:
        return carry
    # Under enumeration every state has dimensions of its own.
    batch = torch.broadcast_shapes(state.shape[:-1], carry["tokens"].shape[:-1])
    return {**carry, GIVEN: chain.kernel.expand_given(chain.given, batch)}


def _whole(state: Tensor, chain: ReverseChain, step: Any) -> Tensor:
    if chain.kernel.markov and not chain.given:
        return state
    # What the carry remembers has all dimensions of the states.
    batch = torch.broadcast_shapes(state.shape[:-1], step.batch_shape)
    return state.expand(*batch, -1)


def _joined(states: list[Tensor], chain: ReverseChain) -> Tensor:
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
