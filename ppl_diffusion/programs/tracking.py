"""Messengers that set, note and stand in for the sites of a program while it is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution, TorchDistribution
from pyro.ops.provenance import get_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.programs.sites import chain_of, is_chain, with_blocks

Place = Callable[[str, ReverseChain], Tensor]


class GivenSites(Messenger):
    """Set the values of unobserved sites; chain sites that are missing are placed."""

    def __init__(self, values: Mapping[str, Tensor], place: Place) -> None:
        super().__init__()
        self.values, self.place = values, place

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif is_chain(msg):
            msg["value"], msg["done"] = self.place(msg["name"], chain_of(msg["fn"])), True


class OwnLaws(Messenger):
    """Give latents that the program masks, in part or whole, the law that they are drawn from.

    To Pyro a masked latent has a flat law, along which Markov moves would drift, and so would the
    latents above it. What ``obs_mask`` leaves to be drawn is masked, too.

    :ivar masked: latents that the program masks itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._observed: set[str] = set()
        self.masked: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"]:
            self._observed.add(name)
            return
        own = msg["fn"] if is_chain(msg) else _unmasked(msg["fn"])
        if (msg["mask"] is None or msg["mask"] is True) and own is msg["fn"]:
            return
        msg["mask"], msg["fn"] = None, own
        if f"{name.removesuffix('_unobserved')}_observed" not in self._observed:
            self.masked.add(name)


def _unmasked(fn: Any) -> Any:
    """Return a distribution without masks, itself where it has none."""
    if isinstance(fn, MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


class Simulated(Messenger):
    """Draw some observed sites anew, as if nobody had seen them."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True


class Tracking(Messenger):
    """The tracked run: chains end in random tokens at no network call, and every site is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[dict[str, Any]] = []

    def _pyro_sample(self, msg: Any) -> None:
        if is_chain(msg) and msg["value"] is None:
            msg["value"], msg["done"] = _random_path(chain_of(msg["fn"])), True

    def _pyro_post_sample(self, msg: Any) -> None:
        # Copied here, before provenance is put on: a Delta's value shows what it was made of.
        self.sites.append({**msg, "parents": get_provenance(msg["value"])})
        if is_chain(msg):
            msg["fn"] = _StandIn(chain_of(msg["fn"]))


class _StandIn(TorchDistribution):
    """A chain whose density depends on its conditions, and costs nothing."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's class protocol)

    def __init__(self, chain: ReverseChain) -> None:
        self.given = chain.given or {}
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        none = torch.zeros((), device=value.device)
        return sum((0.0 * x.to(torch.float64).sum() for x in self.given.values()), none)


class SameRows(Messenger):
    """Give the first rows of every latent the value it had in the tracked run."""

    def __init__(self, values: Mapping[str, Tensor], rows: int) -> None:
        super().__init__()
        self.values, self.rows = values, rows

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = msg["value"].clone()
            value[: self.rows] = self.values[msg["name"]]
            msg["value"] = value


def is_bounded_by_others(fn: Any) -> bool:
    """Return whether the support of a tracked distribution depends on other sites."""
    try:
        return bool(_parents_of(fn.support))
    except NotImplementedError:  # it has none
        return False


def is_discrete(fn: Any) -> bool:
    """Return whether a distribution draws from a countable set, whatever type its values have."""
    try:
        return bool(getattr(fn.support, "is_discrete", False))
    except NotImplementedError:  # it has none
        return False


def _parents_of(bound: Any) -> frozenset[str]:
    if isinstance(bound, Tensor):
        parents: frozenset[str] = get_provenance(bound)
        return parents
    parts = bound if isinstance(bound, list | tuple) else getattr(bound, "__dict__", {}).values()
    return frozenset().union(*(_parents_of(part) for part in parts))


def _random_path(chain: ReverseChain) -> Tensor:
    """Return a random clean sequence repeated: one that argmax guesses would not show."""
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    clean = torch.randint(size, shape, device=chain.kernel.device)
    if chain.prompt is not None:
        clean = torch.where(chain.prompt >= 0, chain.prompt, clean)
    clean = with_blocks(chain, clean)
    return clean[..., None, :].expand(*shape[:-1], chain.num_steps + 1, -1).clone()
