"""One evaluation of a program for several particles: values, conditions, densities."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol, cast

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_diffusion.deferred import refuse_if
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.potentials.factor import PotentialFactor
from ppl_diffusion.programs.sites import chain_of, is_chain, is_deterministic, sample_sites

PARTICLE_PLATE = "_ppl_diffusion_particles"


class Facts(Protocol):
    """What an evaluation needs to know of its program."""

    owner: str
    latents: list[str]
    shapes: dict[str, torch.Size]
    ranks: dict[str, int]
    nesting: int
    density_shapes: dict[str, torch.Size]
    bounded: set[str]

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...


class ProgramRun:
    """One evaluation of a program for several particles.

    :param program: the program.
    :param traces: one trace of all particles, or one per particle.
    :param size: number of particles.
    :param strict: refuse densities that are no numbers; otherwise they stay NaN.
    :raises CapabilityError: if latent sites come and go.
    """

    def __init__(
        self, program: Facts, traces: list[Trace], size: int, *, strict: bool = True
    ) -> None:
        self.program, self.traces, self.size, self.strict = program, traces, size, strict
        self._together = PARTICLE_PLATE in traces[0].nodes
        for trace in traces:
            self._require_same_latents(trace)

    def _require_same_latents(self, trace: Trace) -> None:
        sites = sample_sites(trace, self.program.owner)
        found = {
            s["name"]
            for s in sites
            if not s["is_observed"] and not is_chain(s) and not is_deterministic(s)
        }
        unknown = found ^ set(self.program.latents)
        if unknown:
            raise CapabilityError(
                f"{self.program.owner}: the latent sites {sorted(unknown)} of {self.program.name} "
                "come and go between runs; give the program the same sites on every run."
            )

    @property
    def site_names(self) -> list[str]:
        """Names of all sites with a value of their own, in program order."""
        owner = self.program.owner
        names = [s["name"] for trace in self.traces for s in sample_sites(trace, owner)]
        return list(dict.fromkeys(names))

    def _node(self, name: str) -> dict[str, Any]:
        nodes = (trace.nodes[name] for trace in self.traces if name in trace.nodes)
        return cast(dict[str, Any], next(nodes))

    def value(self, name: str) -> Tensor | None:
        """Return a site's value for every particle, ``(size, *plates, *event)``."""
        if not all(name in trace.nodes for trace in self.traces):
            return None
        values = [trace.nodes[name]["value"] for trace in self.traces]
        own = self.program.shapes.get(name)
        if own is None or not all(isinstance(value, Tensor) for value in values):
            return None
        if not self._together:
            return torch.stack(values)
        value = values[0]
        if value.numel() == own.numel():  # the same for every particle
            return value.reshape(own).expand(self.size, *own)
        return value.reshape(self.size, *own) if value.numel() == self.size * own.numel() else None

    def given(self, name: str) -> dict[str, Tensor]:
        """Return the conditions of a chain, each ``(size, *plates, *event)``."""
        chains = [chain_of(trace.nodes[name]["fn"]) for trace in self.traces]
        names = chains[0].given or {}
        return {c: self._condition(name, [chain.given[c] for chain in chains], c) for c in names}

    def _condition(self, name: str, values: list[Tensor], condition: str) -> Tensor:
        chain = chain_of(self._node(name)["fn"])
        event = chain.kernel.conditions[condition]
        if not self._together:
            return torch.stack(values)
        value = values[0]
        plates = self.program.ranks[name]
        batch = value.shape[: value.ndim - event]
        own = batch[len(batch) - plates :] if plates else torch.Size()
        inner = value.shape[value.ndim - event :]
        return value.reshape(-1, *own, *inner).expand(self.size, *own, *inner)

    def samples(self, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the values of all latent and deterministic sites that have one per particle."""
        nodes = {n: self._node(n) for n in self.site_names if n not in leave_out}
        # Deterministic sites are observed ones to Pyro; they are no data.
        kept = [n for n, s in nodes.items() if not s["is_observed"] or is_deterministic(s)]
        return {name: value for name in kept if (value := self.value(name)) is not None}

    def log_density(self, latents: Collection[str], *, lookahead: bool = False) -> Tensor:
        """Return the log-density of observations and some latents, float64 ``(size,)``."""
        return self._total(self.log_densities(latents, lookahead=lookahead).values())

    def latent_log_density(self, latents: Collection[str]) -> Tensor:
        """Return the log-density of some latents alone, float64 ``(size,)``."""
        return self._total(self.site_log_density(name) for name in latents)

    def _total(self, densities: Iterable[Tensor]) -> Tensor:
        zeros = torch.zeros(self.size, dtype=torch.float64, device=self.program.device)
        return sum(densities, zeros)

    def log_densities(
        self, latents: Collection[str], *, lookahead: bool = False
    ) -> dict[str, Tensor]:
        """Return the log-density of each scored site, float64 ``(size,)`` each."""
        unscored = set(self.program.latents) - set(latents)
        names = [name for name in self.density_names if name not in unscored]
        return {name: self.site_log_density(name, lookahead=lookahead) for name in names}

    @property
    def density_names(self) -> list[str]:
        """Names of all sites with a density, chains left out."""
        sites = [name for name in self.site_names if not is_chain(self._node(name))]
        return [name for name in sites if not is_deterministic(self._node(name))]

    @property
    def deterministic_names(self) -> list[str]:
        """Names of the deterministic sites."""
        return [name for name in self.site_names if is_deterministic(self._node(name))]

    def site_log_density(self, name: str, *, lookahead: bool = False) -> Tensor:
        """Return the log-density of one site, float64 ``(size,)``."""
        values = [self._scored(trace.nodes.get(name), name, lookahead) for trace in self.traces]
        if self._together:
            _require_own_dimensions(values[0], self.program, name)
            value = _per_particle(values[0], self.size, self.program.nesting, name)
        else:
            value = torch.stack([v.to(torch.float64).sum() for v in values])
        if lookahead:
            value = torch.where(value == -torch.inf, FORBIDDEN_GUESS, value)
        if not self.strict:
            return torch.where(value == torch.inf, torch.nan, value)
        refuse_if(
            (torch.isnan(value) | (value == torch.inf)).any(),
            lambda: PotentialError(
                f"{self.program.owner}: site {name!r} of {self.program.name} has log-density NaN "
                f"or +inf for {int((~(value < torch.inf)).sum())} of {self.size} particles; check "
                "it."
            ),
        )
        return value

    def _scored(self, site: dict[str, Any] | None, name: str, lookahead: bool) -> Tensor:
        if self.strict or site is None:
            return scored_log_prob(site, lookahead)
        with pyro.validation_enabled(False):  # densities read it when they are asked
            density = scored_log_prob(site, lookahead)
        if name not in self.program.bounded:
            return density
        # A bound moved past a latent: some densities have numbers there.
        return torch.where(site["fn"].support.check(site["value"]), density, -torch.inf)

    def elementwise(self, name: str) -> Tensor:
        """Return the log-density of each element of a site, unscaled, ``(size, *elements)``.

        :raises ValueError: if it has no such element for every particle.
        """
        own = self.program.density_shapes[name]
        sites = [trace.nodes[name] for trace in self.traces]
        values = [s["fn"].log_prob(s["value"], *s["args"], **s["kwargs"]) for s in sites]
        values = [value.to(torch.float64) for value in values]
        if not self._together:
            return torch.stack([value.expand(own) for value in values])
        if values[0].numel() == own.numel():  # the same for every particle
            return values[0].reshape(own).expand(self.size, *own)
        if values[0].numel() == self.size * own.numel():
            return values[0].reshape(self.size, *own)
        raise ValueError(
            f"{self.program.owner}: site {name!r} of {self.program.name} has a log-density of "
            f"shape {tuple(values[0].shape)} for {self.size} particles and {tuple(own)} for one, "
            "so that its elements cannot be told apart; put it into a plate."
        )


def same_values(value: Tensor, other: Tensor) -> bool:
    """Return whether values are equal, up to what float32 networks round off."""
    if not value.is_floating_point():
        return torch.equal(value, other)
    return torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def scored_log_prob(site: dict[str, Any] | None, lookahead: bool) -> Tensor:
    """Return the log-density of a site's value, scaled and masked; 0 where there is no site."""
    if site is None:
        return torch.zeros((), device="cpu")  # a scalar goes along with terms of any device
    fn = site["fn"]
    if lookahead and isinstance(fn, PotentialFactor):
        log_p = fn.lookahead()
    else:
        log_p = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    density: Tensor = scale_and_mask(log_p, site["scale"], site["mask"])
    return density


def _per_particle(value: Tensor, size: int, nesting: int, name: str) -> Tensor:
    """Sum a site's log-density over everything but the particle dimension."""
    value = value.to(torch.float64)
    if value.ndim <= nesting:  # does not depend on the particle
        return value.sum().expand(size)
    if value.ndim > nesting + 1 or value.shape[0] not in (1, size):
        raise ValueError(
            f"site {name!r} has a log-density of shape {tuple(value.shape)}, expected {size} "
            f"particles and {nesting} plates"
        )
    return value.reshape(value.shape[0], -1).sum(-1).expand(size)


def _require_own_dimensions(value: Tensor, program: Facts, name: str) -> None:
    """Refuse particles in the place of a plate, which would be summed over as its elements."""
    if name not in program.density_shapes:
        return
    own = program.density_shapes[name]
    found = value.shape[max(value.ndim - program.nesting, 0) :]
    allowed = [*[1] * len(found), *own][-len(found) :] if found else []
    if any(n not in (1, m) for n, m in zip(found, allowed, strict=True)):
        raise ValueError(
            f"site {name!r} has a log-density of shape {tuple(value.shape)} for several particles "
            f"and {tuple(own)} for one: where it is in no plate, keep a dimension of size 1"
        )
