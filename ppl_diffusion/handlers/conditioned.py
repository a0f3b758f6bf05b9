"""Conditioned deterministic sites, which Pyro gives no density: they observe nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError

Chains = Mapping[str, tuple[ReverseChain, Any]]
"""Chains and their paths by site name."""


def overwritten(msg: Any) -> Tensor | None:
    """Return what a deterministic site was computed as, if :func:`pyro.condition` replaced it.

    :param msg: a site after it was run, of a trace or in a handler.
    """
    computed = _computed(msg)
    return None if computed is None or _same(msg["value"], computed) else computed


def _computed(msg: Any) -> Tensor | None:
    if msg["type"] != "sample" or not msg["infer"].get("_deterministic", False):
        return None
    if msg.get("_intervener_id") is not None:  # pyro.do asks another question, and answers it
        return None
    computed: Tensor = msg["fn"].base_dist.v
    return computed


def clean_sequence_of(computed: Tensor, chains: Chains) -> str:
    """Return the name of the chain whose clean sequence a value is, or nothing."""
    for name, (chain, path) in chains.items():
        if computed.shape[-1:] == (chain.length,) and _same(computed, chain.x0(path)):
            return name
    return ""


def refuse_condition(where: str, name: str, chain: str, length: int) -> CapabilityError:
    """Return the error that sends a condition on a clean sequence to ``clamp``."""
    return CapabilityError(
        f"{where}: pyro.condition of the deterministic site {name!r} observes nothing, for Pyro "
        f"gives it no density; it is the clean sequence of the chain {chain!r}, so hold its tokens "
        f"by ppl_diffusion.handlers.clamp(model, tokens=..., mask=torch.ones({length}, "
        f"dtype=torch.bool), sites=[{chain!r}])."
    )


def require_unconditioned(where: str, sites: Iterable[Any], chains: Chains) -> None:
    """Refuse conditions on sites that are computed from latents, which would weigh nothing.

    :param where: what to call the method and the program.
    :param sites: the sites of one run, in which values remember where they come from; what those
        of a site came from are its ``parents``.
    :raises CapabilityError: if there are any.
    """
    for site in sites:
        computed, name = _computed(site), site["name"]
        # By what they were made of: values might agree by chance.
        if computed is None or not get_provenance(computed) - site["parents"]:
            continue
        if chain := clean_sequence_of(computed, chains):
            raise refuse_condition(where, name, chain, chains[chain][0].length)
        raise CapabilityError(
            f"{where}: pyro.condition of the deterministic site {name!r} observes nothing, for "
            "Pyro gives it no density; observe it through a pyro.sample site that has one, or set "
            "it with pyro.do."
        )


def _same(value: Any, other: Tensor) -> bool:
    if value is other:
        return True
    value, other = detach_provenance(value), detach_provenance(other)
    try:  # a plate expands what was computed, not the value
        value, other = torch.broadcast_tensors(torch.as_tensor(value), other)
    except RuntimeError:
        return False
    equal = (value == other) | ((value != value) & (other != other))  # NaN is as it was computed
    return bool(torch.all(equal))
