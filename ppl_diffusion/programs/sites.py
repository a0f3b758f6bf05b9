"""The sites of a Pyro program as inference sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal, ProposedChain, Steering, as_steering, joined
from ppl_diffusion.kernels.blocks import TOKENS, arbitrary
from ppl_diffusion.smc.feynman_kac import Proposal
from ppl_diffusion.smc.law import Base


@dataclass(frozen=True)
class ChainSite:
    """A reverse-chain site of a program.

    :param name: site name.
    :param chain: its distribution, with the program's own plates as batch shape.
    :param clamp: tokens it is conditioned on, or None.
    :param steering: its ``infer={"steer": ...}`` hint, or None.
    :param twist: the proposal of a :func:`~ppl_diffusion.handlers.twist`, or None.
    """

    name: str
    chain: ReverseChain
    clamp: ClampProposal | None = None
    steering: Steering | None = None
    twist: Proposal | None = None

    def __post_init__(self) -> None:
        if self.clamp is not None:
            self.clamp.check_chain(self.chain.kernel.process)

    @property
    def proposal(self) -> Proposal | None:
        """How the site wants to be moved: by its twist, with the clamped tokens held."""
        return joined(self.twist, self.clamp)

    def base(self, *, drawn: bool = False) -> Base:
        """Return what it adds to a law.

        :param drawn: whether its conditions are drawn with it.
        """
        clamp = None if self.clamp is None else (self.clamp.tokens, self.clamp.mask)
        return Base.of(self.chain, self.name, clamp, drawn=drawn)

    def beside(self, tokens: Tensor) -> Tensor:
        """Return clean sequences with random blocks beside them, to try a program on.

        :param tokens: int64 ``(*batch, L)``.
        """
        return with_blocks(self.chain, tokens)

    def as_path(self, clean: Tensor) -> Tensor:
        """Return clean sequences repeated as if each were a whole path, ``(*batch, T + 1, L)``.

        :param clean: int64 ``(*batch, L)``, or flat with blocks, ``(*batch, W)``.
        """
        return clean[..., None, :].expand(*clean.shape[:-1], self.chain.num_steps + 1, -1)


def with_blocks(chain: ReverseChain, tokens: Tensor) -> Tensor:
    """Return clean sequences of a chain with random blocks beside them, ``(*batch, W)``.

    :param tokens: int64 ``(*batch, L)``.
    """
    blocks, batch = chain.kernel.blocks, tokens.shape[:-1]
    beside = {name: arbitrary(spec, batch, tokens.device) for name, spec in blocks.items()}
    return chain.kernel.flat({TOKENS: tokens, **beside}) if beside else tokens


@dataclass(frozen=True)
class DataSite:
    """An observed site that is no factor: data, and what is asked about them.

    :param value: the data.
    :param batch: shape of its elements, those of its log-density.
    :param seen: which elements were observed (``obs_mask``), or None for all.
    """

    name: str
    value: Tensor
    batch: torch.Size
    seen: Tensor | None = None

    @classmethod
    def of(cls, site: dict[str, Any], batch: torch.Size) -> DataSite:
        """Return what a site observes.

        :param site: the site of a trace.
        :param batch: shape of its log-density.
        """
        mask = detach_provenance(site["mask"])
        seen = mask.expand(batch) if isinstance(mask, Tensor) and not bool(mask.all()) else None
        return cls(site["name"], detach_provenance(site["value"]), batch, seen)

    def only_seen(self, values: Tensor, lead: int) -> Tensor:
        """Return values of elements, flattened and without the unseen where there are any.

        :param values: ``(*lead, *batch, *event)``.
        :param lead: dimensions before the elements.
        """
        if self.seen is None:
            return values
        flat = values.flatten(lead, lead + len(self.batch) - 1)
        return flat.index_select(lead, torch.nonzero(self.seen.flatten())[:, 0])


def is_data(site: dict[str, Any]) -> bool:
    """Return whether a site observes data: no factor, no deterministic value."""
    is_factor = site["fn"].event_shape == (0,)
    return bool(site["is_observed"]) and not is_deterministic(site) and not is_factor


def plate_names(site: dict[str, Any]) -> tuple[str, ...]:
    """Return the plates of a value's batch dimensions, left to right; "" where there is none."""
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    shape = getattr(site["value"], "shape", ())
    batch = shape[: max(len(shape) - site["fn"].event_dim, 0)]
    found = [frames.get(i - len(batch)) for i in range(len(batch))]
    sized = zip(found, batch, strict=True)
    return tuple(f.name if f is not None and f.size == size else "" for f, size in sized)


def program_name(model: Callable[..., Any]) -> str:
    """Return the name of a program, that of the inner one where handlers are wrapped around it."""
    while isinstance(model, partial):
        # Pyro binds a handler and the program it is called with as the arguments of one function.
        bound = bool(model.args) and isinstance(model.args[0], Messenger)
        model = model.args[1] if bound else model.func
    return str(getattr(model, "__name__", type(model).__name__))


def sample_sites(trace: Trace, owner: str) -> list[dict[str, Any]]:
    """Return the sample sites of a trace, plates left out."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return [site for site in sites if not is_plate(site, owner)]


def is_plate(site: dict[str, Any], owner: str) -> bool:
    """Return whether a site is a plate's own, which is no value of the program."""
    if not site_is_subsample(site):
        return False
    if (site["fn"].subsample_size or site["fn"].size) < site["fn"].size:
        raise CapabilityError(
            f"{owner}: plate {site['name']!r} is subsampled, which makes the potential random "
            "from run to run; use the whole plate."
        )
    return True


def is_deterministic(site: dict[str, Any]) -> bool:
    """Return whether a site is a :func:`pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic", False))


def is_chain(site: dict[str, Any]) -> bool:
    """Return whether a site is an unobserved reverse chain."""
    return isinstance(site["fn"], ReverseChain | ProposedChain) and not site["is_observed"]


def chain_of(fn: ReverseChain | ProposedChain) -> ReverseChain:
    """Return the chain below a site's distribution."""
    chain: ReverseChain = fn.chain if isinstance(fn, ProposedChain) else fn
    return chain


def chain_site(site: dict[str, Any]) -> ChainSite:
    """Return what a program says about one of its reverse chains."""
    fn, steering = site["fn"], site["infer"].get("steer")
    steering = getattr(fn, "steering", None) if steering is None else as_steering(steering)
    return ChainSite(
        site["name"], chain_of(fn), getattr(fn, "clamp", None), steering, getattr(fn, "twist", None)
    )


def data_of(site: dict[str, Any]) -> list[Any]:
    """Return what an observed site adds to the data: its value, and its mask where it has one."""
    value, mask = site["value"], site["mask"]
    if mask is None or mask is True:
        return [value]
    mask = torch.as_tensor(mask, device=value.device)
    event = site["fn"].event_dim
    # What is masked is no data: whatever stands there, NaN or zero, the law is the same.
    return [torch.where(mask.reshape(mask.shape + (1,) * event), value, 0), mask]


def depth(site: dict[str, Any]) -> int:
    """Return how many batch dimensions a site uses, counted from the right."""
    frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
    return max([len(site["fn"].batch_shape), *frames])
