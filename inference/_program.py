"""Read a Pyro program: its chain sites, its other latents, and the potential it defines.

Particles are one more plate, left of all plates of the program, so a program that broadcasts over
plates is evaluated for all particles at once; others are run particle by particle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.inference._sites import (
    NUM_TRIALS,
    chain_site,
    depth,
    is_chain,
    is_deterministic,
    program_name,
    same_chain,
    sample_sites,
    trial_sequences,
)
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.potentials.factor import PotentialFactor

PARTICLE_PLATE = "_ppl_diffusion_particles"
NUM_PROBES = 4
"""How many random guesses a program is tried on before it is run."""


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

    Latents are told apart by what their law depends on. Those before the first one that reacts to
    the sequences are ``carried``: drawn once, at the start, and inherited with the particle. That
    one and all after it are ``redrawn`` from their own law in every evaluation, since a draw given
    a first guess may be impossible given the sequence.

    :param model: the Pyro program.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param vectorize: evaluate all particles at once, as one more plate on the left, instead of one
        after the other.
    :param owner: what errors call the method.
    :param otherwise: what they advise for a program that does not broadcast.
    :raises ValueError: if it has no unobserved chain site, or does not broadcast over particles.
    :raises CapabilityError: if it subsamples a plate, or is random from run to run.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        vectorize: bool = True,
        owner: str = "inference",
        otherwise: str = "use ppl_diffusion.inference.SMC(..., vectorize_particles=False)",
    ) -> None:
        self.model, self.args, self.kwargs, self.vectorize = model, args, kwargs, vectorize
        self.owner, self.otherwise = owner, otherwise
        self.num_rows = 0
        """Particles the program was evaluated for so far, trials included."""
        sites = sample_sites(self.trace({}), owner)
        self.chains = [chain_site(site) for site in sites if is_chain(site)]
        if not self.chains:
            raise ValueError(
                f"{owner}: {self.name} has no unobserved ReverseChain site; sample one as it is "
                "(no to_event), for instance pyro.sample('path', prior.chain(num_steps=64))."
            )
        self.shapes = {s["name"]: torch.as_tensor(s["value"]).shape for s in sites}
        self.ranks = {s["name"]: len(s["fn"].batch_shape) for s in sites}
        self.latents = [s["name"] for s in sites if not s["is_observed"] and not is_chain(s)]
        self.nesting = max(map(depth, sites))
        self.carried = self.latents  # until the probe knows better
        self.redrawn: list[str] = []
        self.trials: dict[str, Tensor] = {}
        """Clean sequences of every chain site that the program is tried on."""
        self.density_shapes: dict[str, torch.Size] = {}
        """Shape of each scored site's log-density for one particle, once that is known."""
        self._probe()

    @property
    def name(self) -> str:
        """The program's name."""
        return program_name(self.model)

    def evaluate(self, values: Mapping[str, Tensor], size: int) -> ProgramRun:
        """Run the program for ``size`` particles with given site values.

        :param values: values by site name, each ``(size, *plates, *event)``.
        :param size: number of particles.
        """
        if not self.vectorize:
            rows = [{name: value[i] for name, value in values.items()} for i in range(size)]
            return ProgramRun(self, [self.trace(row) for row in rows], size)
        padded = {name: self._pad(name, value) for name, value in values.items()}
        return ProgramRun(self, [self.trace(padded, size)], size)

    def _pad(self, name: str, value: Tensor) -> Tensor:
        """Insert the idle plates between the particles and the site's own plates."""
        idle = (1,) * (self.nesting - self.ranks[name])
        return value.reshape(value.shape[0], *idle, *value.shape[1:]) if idle else value

    def trace(self, values: Mapping[str, Tensor], size: int | None = None) -> Trace:
        """Run the program once.

        :param values: site values.
        :param size: number of particles on the left of all plates, or None for none.
        :raises CapabilityError: if a chain is not the one of the first run.
        """
        self.num_rows += size or 1
        with poutine.trace() as tracer, _GivenSites(values):
            if size is None:
                self.model(*self.args, **self.kwargs)
            else:
                with pyro.plate(PARTICLE_PLATE, size, dim=-1 - self.nesting):
                    self.model(*self.args, **self.kwargs)
        self._require_same_chains(tracer.trace)
        return tracer.trace

    def _require_same_chains(self, trace: Trace) -> None:
        for bound in getattr(self, "chains", []):
            site = trace.nodes.get(bound.name)
            if site is None or not is_chain(site) or not same_chain(site, bound):
                raise CapabilityError(
                    f"{self.owner}: the chain at site {bound.name!r} of {self.name} is not the "
                    "same on every run (it depends on another site, or is built around a new "
                    "network); build it outside of the program, or use pyro.infer.Importance."
                )

    def _probe(self) -> None:
        """Sort the latents, and check that particles do not see each other."""
        paths = self._random_paths()
        singles = [self.trace(paths)]
        ProgramRun(self, singles, 1)  # the same latents as in the first run
        given = {name: singles[0].nodes[name]["value"] for name in self.latents}
        self._require_repeatable(singles[0], self.trace({**paths, **given}))
        singles += [self.trace({**self._random_paths(), **given}) for _ in range(NUM_PROBES - 1)]
        with torch.random.fork_rng(devices=[]):  # a trial must not change what is drawn later
            self.trials = {site.name: trial_sequences(site) for site in self.chains}
            singles += self._on_trials(given)
        for number, name in enumerate(self.latents):
            if len({_density_or_nan(trace, name) for trace in singles}) > 1:
                self.carried, self.redrawn = self.latents[:number], self.latents[number:]
                break
        if self.vectorize:
            self._require_broadcasting(singles)

    def _on_trials(self, given: Mapping[str, Tensor]) -> list[Trace]:
        paths = {site.name: site.as_path(self.trials[site.name]) for site in self.chains}
        rows = [{name: path[i] for name, path in paths.items()} for i in range(NUM_TRIALS)]
        return [self.trace({**row, **given}) for row in rows]

    def _require_repeatable(self, first: Trace, second: Trace) -> None:
        """Refuse densities that are random given all values."""
        for name in ProgramRun(self, [first, second], 2).density_names:
            values = _density_or_nan(first, name), _density_or_nan(second, name)
            bad = any(map(math.isnan, values))  # which is refused in other words
            if not bad and not math.isclose(*values, rel_tol=1e-3, abs_tol=1e-4):
                raise CapabilityError(
                    f"{self.owner}: site {name!r} of {self.name} has another density when the "
                    "program runs again on the same values; draw what is random in it as a "
                    "pyro.sample site, and switch a network with dropout to eval()."
                )

    def _random_paths(self) -> dict[str, Tensor]:
        return {
            site.name: torch.randint(
                site.chain.kernel.process.vocab_size,
                (*site.chain.batch_shape, *site.chain.event_shape),
            )
            for site in self.chains
        }

    def _require_broadcasting(self, singles: list[Trace]) -> None:
        names = [site.name for site in self.chains] + self.latents
        stacked = {n: torch.stack([trace.nodes[n]["value"] for trace in singles]) for n in names}
        alone = ProgramRun(self, singles, len(singles))
        advice = (
            "write it so that it broadcasts over one more plate on the left (values arrive as "
            f"(particles, 1 for each plate a site is not in, ...)), or {self.otherwise}"
        )
        self.density_shapes = alone.density_shapes()
        try:
            together = self.evaluate(stacked, len(singles)).log_densities()
        except (CapabilityError, PotentialError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.owner}: {self.name} fails for several particles at once ({error}); "
                f"{advice}."
            ) from error
        expected, absent = alone.log_densities(), torch.zeros(len(singles), dtype=torch.float64)
        for name in together | expected:
            values = together.get(name, absent), expected.get(name, absent)
            if not torch.allclose(*values, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise ValueError(
                    f"{self.owner}: site {name!r} of {self.name} has another density when several "
                    f"particles are evaluated at once; {advice}."
                )


class ProgramRun:
    """One evaluation of a program for several particles.

    :param program: the program.
    :param traces: one trace of all particles, or one per particle.
    :param size: number of particles.
    :raises CapabilityError: if latent sites come and go.
    """

    def __init__(self, program: Program, traces: list[Trace], size: int) -> None:
        self.program, self.traces, self.size = program, traces, size
        self._together = PARTICLE_PLATE in traces[0].nodes
        for trace in traces:
            self._require_same_latents(trace)

    def _require_same_latents(self, trace: Trace) -> None:
        sites = sample_sites(trace, self.program.owner)
        sites = [s for s in sites if not s["is_observed"] and not is_chain(s)]
        unknown = {s["name"] for s in sites} ^ set(self.program.latents)
        if unknown:
            raise CapabilityError(
                f"{self.program.owner}: the latent sites {sorted(unknown)} of {self.program.name} "
                "come and go between runs; give the program the same sites on every run."
            )

    @property
    def site_names(self) -> list[str]:
        """Names of all sites with a value of their own, in program order.

        A site that some particles do not have is one of density one for them.
        """
        owner = self.program.owner
        names = [s["name"] for trace in self.traces for s in sample_sites(trace, owner)]
        return list(dict.fromkeys(names))

    def _node(self, name: str) -> dict[str, Any]:
        nodes = (trace.nodes[name] for trace in self.traces if name in trace.nodes)
        return cast(dict[str, Any], next(nodes))

    def value(self, name: str) -> Tensor | None:
        """Return a site's value for every particle, ``(size, *plates, *event)``.

        :param name: site name.
        :returns: None where the value is not a tensor of the expected size, or not always there.
        """
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

    def is_latent_or_deterministic(self, name: str) -> bool:
        """Return whether a site belongs into the posterior's samples.

        :param name: site name.
        """
        site = self._node(name)
        return not site["is_observed"] or is_deterministic(site)

    def log_density(self, *, lookahead: bool = False) -> Tensor:
        """Return the log-density of observations and carried latents, float64 ``(size,)``.

        :param lookahead: score guesses: a mild penalty for each site that forbids the guess, and
            potentials by their own look-ahead.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for value in self.log_densities(lookahead=lookahead).values():
            total = total + value
        return total

    def latent_log_density(self) -> Tensor:
        """Return the log-density of the carried latents alone, float64 ``(size,)``."""
        densities = self.log_densities()
        total = torch.zeros(self.size, dtype=torch.float64)
        for name in self.program.carried:
            total = total + densities[name]
        return total

    def log_densities(self, *, lookahead: bool = False) -> dict[str, Tensor]:
        """Return the log-density of each scored site, float64 ``(size,)`` each.

        :param lookahead: as in :meth:`log_density`.
        """
        return {name: self.site_log_density(name, lookahead=lookahead) for name in self._scored()}

    def density_shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each scored site's log-density in the first trace that has it."""
        return {name: _scored_log_prob(self._node(name), False).shape for name in self._scored()}

    @property
    def density_names(self) -> list[str]:
        """Names of all sites with a density, chains left out."""
        sites = [name for name in self.site_names if not is_chain(self._node(name))]
        return [name for name in sites if not is_deterministic(self._node(name))]

    @property
    def deterministic_names(self) -> list[str]:
        """Names of the deterministic sites."""
        return [name for name in self.site_names if is_deterministic(self._node(name))]

    def _scored(self) -> list[str]:
        return [name for name in self.density_names if name not in self.program.redrawn]

    def site_log_density(self, name: str, *, lookahead: bool = False) -> Tensor:
        """Return the log-density of one site, float64 ``(size,)``.

        :param name: site name.
        :param lookahead: as in :meth:`log_density`.
        :raises PotentialError: if it is NaN or ``+inf``.
        """
        values = [_scored_log_prob(trace.nodes.get(name), lookahead) for trace in self.traces]
        if self._together:
            _require_own_dimensions(values[0], self.program, name)
            value = _per_particle(values[0], self.size, self.program.nesting, name)
        else:
            value = torch.stack([v.to(torch.float64).sum() for v in values])
        if lookahead:
            value = torch.where(value == -torch.inf, FORBIDDEN_GUESS, value)
        if bool((torch.isnan(value) | (value == torch.inf)).any()):
            raise PotentialError(
                f"{self.program.owner}: site {name!r} of {self.program.name} has log-density NaN "
                f"or +inf for {int((~(value < torch.inf)).sum())} of {self.size} particles; check "
                "it."
            )
        return value


def _scored_log_prob(site: dict[str, Any] | None, lookahead: bool) -> Tensor:
    if site is None:
        return torch.zeros(())
    fn = site["fn"]
    if lookahead and isinstance(fn, PotentialFactor):
        log_p = fn.lookahead()
    else:
        log_p = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    return torch.as_tensor(scale_and_mask(log_p, site["scale"], site["mask"]))


def _density_or_nan(trace: Trace, name: str) -> float:
    """Return a site's log-density; a value out of its support must not end the probe."""
    try:
        return round(float(_scored_log_prob(trace.nodes.get(name), False).sum()), 6)
    except ValueError:
        return -math.inf


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


def _require_own_dimensions(value: Tensor, program: Program, name: str) -> None:
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
