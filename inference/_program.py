"""Read a Pyro program: its chain sites, its other latents, and the potential it defines.

Particles are one more plate, left of all plates of the program, so a program that broadcasts over
plates is evaluated for all particles at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_diffusion._errors import CapabilityError, PotentialError
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ClampProposal, Steering
from ppl_diffusion.handlers._site import ProposedChain
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.potentials.factor import PotentialFactor

PARTICLE_PLATE = "_ppl_diffusion_particles"


@dataclass(frozen=True)
class ChainSite:
    """A reverse-chain site of a program.

    :param name: site name.
    :param chain: its distribution, with the program's own plates as batch shape.
    :param clamp: tokens it is conditioned on, or None.
    :param steering: its ``infer={"steer": ...}`` hint, or None.
    """

    name: str
    chain: ReverseChain
    clamp: ClampProposal | None
    steering: Steering | None


class _GivenSites(Messenger):
    """Set the values of unobserved sites; chain sites that are missing get a placeholder path."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif isinstance(msg["fn"], ReverseChain):
            shape = (*msg["fn"].batch_shape, *msg["fn"].event_shape)
            msg["value"], msg["done"] = torch.zeros(shape, dtype=torch.int64), True


class Program:
    """A program with its arguments, ready to be evaluated for many particles.

    :param model: the Pyro program.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :raises ValueError: if it has no unobserved chain site.
    :raises CapabilityError: if it subsamples a plate.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        sites = _sample_sites(self._trace({}, None))
        self.chains = [_chain_site(site) for site in sites if _is_chain(site)]
        if not self.chains:
            raise ValueError(
                f"SMC: {self.name} has no unobserved ReverseChain site; "
                "sample one, for instance pyro.sample('path', prior.chain(num_steps=64))."
            )
        self.shapes = {s["name"]: torch.as_tensor(s["value"]).shape for s in sites}
        self.latents = [s["name"] for s in sites if not s["is_observed"] and not _is_chain(s)]
        self.nesting = max(map(_depth, sites))

    @property
    def name(self) -> str:
        """The program's name."""
        return getattr(self.model, "__name__", type(self.model).__name__)

    def plates(self, site: ChainSite) -> tuple[int, ...]:
        """Return the batch shape of a chain site, padded to all plates of the program.

        :param site: one of ``chains``.
        """
        own = tuple(site.chain.batch_shape)
        return (1,) * (self.nesting - len(own)) + own

    def evaluate(self, values: Mapping[str, Tensor], size: int) -> Trace:
        """Run the program for ``size`` particles with given site values.

        :param values: values by site name, each ``(size, *plates, *event)``.
        :param size: number of particles.
        """
        return self._trace(values, size)

    def _trace(self, values: Mapping[str, Tensor], size: int | None) -> Trace:
        with poutine.trace() as tracer, _GivenSites(values):
            if size is None:
                self.model(*self.args, **self.kwargs)
            else:
                with pyro.plate(PARTICLE_PLATE, size, dim=-1 - self.nesting):
                    self.model(*self.args, **self.kwargs)
        return tracer.trace

    def log_density(self, trace: Trace, size: int, *, lookahead: bool) -> Tensor:
        """Return the log-density of all sites but the chains, float64 ``(size,)``.

        :param trace: a run of :meth:`evaluate`.
        :param size: number of particles.
        :param lookahead: score guesses: a mild penalty for each site that forbids the guess, and
            potentials by their own look-ahead.
        """
        total = torch.zeros(size, dtype=torch.float64)
        for site in self._scored(trace):
            total = total + self._site_log_density(site, size, lookahead)
        return total

    def latent_log_density(self, trace: Trace, size: int) -> Tensor:
        """Return the log-density of the other latents alone, float64 ``(size,)``.

        :param trace: a run of :meth:`evaluate`.
        :param size: number of particles.
        """
        total = torch.zeros(size, dtype=torch.float64)
        for site in self._scored(trace):
            if not site["is_observed"]:
                total = total + self._site_log_density(site, size, lookahead=False)
        return total

    def _scored(self, trace: Trace) -> list[dict[str, Any]]:
        sites = [s for s in _sample_sites(trace) if not _is_chain(s)]
        unknown = {s["name"] for s in sites if not s["is_observed"]} ^ set(self.latents)
        if unknown:
            raise CapabilityError(
                f"SMC: the latent sites {sorted(unknown)} of {self.name} come and go between "
                "runs; give the program the same sites on every run."
            )
        return sites

    def _site_log_density(self, site: dict[str, Any], size: int, lookahead: bool) -> Tensor:
        fn = site["fn"]
        if lookahead and isinstance(fn, PotentialFactor):
            value = fn.lookahead() * site["scale"]
        else:
            value = _scored_log_prob(site)
        value = _per_particle(value, size, self.nesting, site["name"])
        if lookahead:
            value = torch.where(value == -torch.inf, FORBIDDEN_GUESS, value)
        if bool((torch.isnan(value) | (value == torch.inf)).any()):
            raise PotentialError(
                f"SMC: site {site['name']!r} of {self.name} has log-density NaN or +inf for "
                f"{int((~(value < torch.inf)).sum())} of {size} particles; check its distribution."
            )
        return value


def _scored_log_prob(site: dict[str, Any]) -> Tensor:
    log_p = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_p, site["scale"], site["mask"])


def _per_particle(value: Tensor, size: int, nesting: int, name: str) -> Tensor:
    """Sum a site's log-density over everything but the particle dimension."""
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.ndim <= nesting:  # does not depend on the particle
        return value.sum().expand(size)
    if value.shape[0] not in (1, size):
        raise ValueError(
            f"SMC: site {name!r} has log-density of shape {tuple(value.shape)}, which does not "
            f"start with the {size} particles; write the program so that it broadcasts over plates."
        )
    return value.reshape(value.shape[0], -1).sum(-1).expand(size)


def _sample_sites(trace: Trace) -> list[dict[str, Any]]:
    sites = []
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        if not site_is_subsample(site):
            sites.append(site)
        elif (site["fn"].subsample_size or site["fn"].size) < site["fn"].size:
            raise CapabilityError(
                f"SMC: plate {site['name']!r} is subsampled, which makes the potential random from "
                "run to run; use the whole plate."
            )
    return sites


def _is_chain(site: dict[str, Any]) -> bool:
    return isinstance(site["fn"], ReverseChain | ProposedChain) and not site["is_observed"]


def _chain_site(site: dict[str, Any]) -> ChainSite:
    fn, steering = site["fn"], site["infer"].get("steer")
    chain = fn.chain if isinstance(fn, ProposedChain) else fn
    return ChainSite(site["name"], chain, getattr(fn, "clamp", None), steering)


def _depth(site: dict[str, Any]) -> int:
    """Return how many batch dimensions a site uses, counted from the right."""
    frames = [-f.dim for f in site["cond_indep_stack"] if f.vectorized]
    return max([len(site["fn"].batch_shape), *frames])
