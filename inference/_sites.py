"""The sites of a Pyro program as inference programs see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal, Steering
from ppl_diffusion.handlers.site import ProposedChain
from ppl_diffusion.handlers.steer import as_steering
from ppl_diffusion.handlers.twist import joined
from ppl_diffusion.smc.feynman_kac import Proposal

NUM_TRIALS = 8
"""Clean sequences a program is tried on before it is run."""


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
    clamp: ClampProposal | None
    steering: Steering | None
    twist: Proposal | None = None

    @property
    def proposal(self) -> Proposal | None:
        """How the site wants to be moved: by its twist, with the clamped tokens held."""
        return joined(self.twist, self.clamp)

    def as_path(self, clean: Tensor) -> Tensor:
        """Return clean sequences repeated as if each were a whole path.

        :param clean: int64 ``(*batch, L)``.
        """
        return clean[..., None, :].expand(*clean.shape[:-1], self.chain.num_steps + 1, -1)


def trial_sequences(site: ChainSite) -> Tensor:
    """Return clean sequences to try a program on, int64 ``(NUM_TRIALS, *plates, L)``.

    At every position they have as many different tokens as can be, so that little is left to luck.

    :param site: the chain site.
    """
    chain, number = site.chain, torch.arange(NUM_TRIALS)
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    if size <= NUM_TRIALS:
        tokens = torch.rand(*shape, size).argsort(-1)[..., number % size]
    else:  # orders of a large alphabet would not fit into memory
        tokens = (torch.randint(size, shape)[..., None] + number) % size
    tokens = tokens.movedim(-1, 0)
    return tokens if chain.prompt is None else torch.where(chain.prompt >= 0, chain.prompt, tokens)


def held_positions(chains: Sequence[tuple[ReverseChain, ClampProposal | None]]) -> list[str]:
    """Say how many positions are clamped, and prompted, to be named in targets.

    :param chains: chains with their clamps, or None.
    """
    size = clamped = prompted = 0
    for chain, clamp in chains:
        shape = (*chain.batch_shape, chain.length)
        size += torch.Size(shape).numel()
        clamped += 0 if clamp is None else int(clamp.mask.expand(shape).sum())
        prompted += 0 if chain.fixed is None else int(chain.fixed.expand(shape).sum())
    counts = {"clamped": clamped, "prompted": prompted}
    return [f"{what} at {n} of {size} positions" for what, n in counts.items() if n]


def program_name(model: Callable[..., Any]) -> str:
    """Return the name of a program, that of the inner one where handlers are wrapped around it.

    :param model: the program.
    """
    while isinstance(model, partial):
        # Pyro binds a handler and the program it is called with as the arguments of one function.
        bound = bool(model.args) and isinstance(model.args[0], Messenger)
        model = model.args[1] if bound else model.func
    return str(getattr(model, "__name__", type(model).__name__))


def sample_sites(trace: Trace, owner: str) -> list[dict[str, Any]]:
    """Return the sample sites of a trace, plates left out.

    :param trace: a trace of the program.
    :param owner: what refusals call the method.
    :raises CapabilityError: if a plate is subsampled.
    """
    sites = []
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        if not site_is_subsample(site):
            sites.append(site)
        elif (site["fn"].subsample_size or site["fn"].size) < site["fn"].size:
            raise CapabilityError(
                f"{owner}: plate {site['name']!r} is subsampled, which makes the potential random "
                "from run to run; use the whole plate."
            )
    return sites


def is_deterministic(site: dict[str, Any]) -> bool:
    """Return whether a site is a :func:`pyro.deterministic`.

    :param site: a site of a trace.
    """
    return bool(site["infer"].get("_deterministic", False))


def is_chain(site: dict[str, Any]) -> bool:
    """Return whether a site is an unobserved reverse chain.

    :param site: a site of a trace.
    """
    return isinstance(site["fn"], ReverseChain | ProposedChain) and not site["is_observed"]


def _chain_of(site: dict[str, Any]) -> ReverseChain:
    chain: ReverseChain = site["fn"].chain if isinstance(site["fn"], ProposedChain) else site["fn"]
    return chain


def chain_site(site: dict[str, Any]) -> ChainSite:
    """Return what a program says about one of its reverse chains.

    :param site: a site of a trace.
    """
    steering = site["infer"].get("steer")
    return ChainSite(
        site["name"],
        _chain_of(site),
        getattr(site["fn"], "clamp", None),
        None if steering is None else as_steering(steering),
        getattr(site["fn"], "twist", None),
    )


def same_chain(site: dict[str, Any], bound: ChainSite) -> bool:
    """Return whether a site has the chain it had in the first run.

    :param site: a site of a trace.
    :param bound: the site of the first run.
    """
    chain, known = _chain_of(site), bound.chain
    if chain.length != known.length or not chain.kernel.same_as(known.kernel):
        return False
    if chain.prompt is None or known.prompt is None:
        return chain.prompt is known.prompt
    return torch.equal(chain.prompt, known.prompt)


def depth(site: dict[str, Any]) -> int:
    """Return how many batch dimensions a site uses, counted from the right.

    :param site: a site of a trace.
    """
    frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
    return max([len(site["fn"].batch_shape), *frames])
