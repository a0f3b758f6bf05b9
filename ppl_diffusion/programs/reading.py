"""Read a Pyro program: what it draws, what depends on what, and its density for many particles.

Particles are one more plate, left of all plates of the program, so a program that broadcasts over
plates is evaluated for all of them at once; others are run particle by particle.

What depends on what is asked of Pyro (:func:`pyro.infer.inspect.get_dependencies`): one run in which
values remember where they come from. That is silently wrong where they are turned into Python
numbers on the way, so one batch of rows that differ in one respect each checks it: behind other
histories (does a density read more of a path than its end?), with other sequences, with other
latents. Two of the rows are run alone, too: do particles see each other?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import get_dependencies
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS
from ppl_diffusion.potentials.factor import PotentialFactor
from ppl_diffusion.programs.sites import (
    ChainSite,
    chain_of,
    chain_site,
    depth,
    is_chain,
    is_deterministic,
    is_plate,
    program_name,
    sample_sites,
)

PARTICLE_PLATE = "_ppl_diffusion_particles"
NUM_HISTORIES, NUM_SEQUENCES, NUM_LATENTS = 4, 8, 8
"""Rows of the check: histories per chain, other sequences, other latents."""

Place = Callable[[str, ReverseChain], Tensor]


class _GivenSites(Messenger):
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


class _Tracking(Messenger):
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
        return sum((0.0 * x.to(torch.float64).sum() for x in self.given.values()), torch.zeros(()))


class _SameRows(Messenger):
    """Give the first rows of every latent the value it had in the tracked run."""

    def __init__(self, values: Mapping[str, Tensor], rows: int) -> None:
        super().__init__()
        self.values, self.rows = values, rows

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = msg["value"].clone()
            value[: self.rows] = self.values[msg["name"]]
            msg["value"] = value


class Program:
    """A program with its arguments, ready to be evaluated for many particles.

    :param model: the Pyro program.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param vectorize: evaluate all particles at once, as one more plate on the left, instead of one
        after the other.
    :param owner: what errors call the method.
    :raises ValueError: if it has no unobserved chain site, or does not broadcast over particles.
    :raises CapabilityError: if it subsamples a plate, or is random from run to run.

    :ivar chains: its chain sites, in program order.
    :ivar latents: names of its other latents, in program order.
    :ivar parents: chains and latents that each chain and latent depends on directly.
    :ivar reads: chain sites of which a density reads more than the clean sequence.
    :ivar shows: deterministic sites whose values read more than that.
    :ivar num_rows: particles the program was evaluated for so far, those of the reading included.
    :ivar num_runs: how often the model was run.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorize: bool = True,
        owner: str = "inference",
    ) -> None:
        self.model, self.args, self.kwargs, self.vectorize = model, args, kwargs or {}, vectorize
        self.owner, self.num_rows, self.num_runs = owner, 0, 0
        sites, dependencies = self._tracked()
        self.chains = [chain_site(site) for site in sites if is_chain(site)]
        if not self.chains:
            raise ValueError(
                f"{owner}: {self.name} has no unobserved ReverseChain site; sample one as it is "
                "(no to_event), for instance pyro.sample('path', prior.chain(num_steps=64))."
            )
        self.shapes = {s["name"]: torch.as_tensor(s["value"]).shape for s in sites}
        self.ranks = {s["name"]: len(s["fn"].batch_shape) for s in sites}
        self.nesting = max(map(depth, sites))
        drawn = [s for s in sites if not s["is_observed"] and not is_deterministic(s)]
        self.order = [s["name"] for s in drawn]
        self.latents = [s["name"] for s in drawn if not is_chain(s)]
        self.parents = {
            s["name"]: (set(dependencies.get(s["name"], ())) | s["parents"])
            & set(self.order) - {s["name"]}
            for s in drawn
        }
        self.density_shapes: dict[str, torch.Size] = {}
        self.reads: frozenset[str] = frozenset()
        self.shows: frozenset[str] = frozenset()
        self._check(sites)

    @property
    def name(self) -> str:
        """The program's name."""
        return program_name(self.model)

    @property
    def chain_names(self) -> list[str]:
        """Names of the chain sites."""
        return [site.name for site in self.chains]

    def ancestors(self, name: str) -> set[str]:
        """Return all chains and latents that a site depends on, directly or not.

        :param name: a chain or a latent.
        """
        found: set[str] = set()
        todo = list(self.parents[name])
        while todo:
            parent = todo.pop()
            if parent not in found:
                found.add(parent)
                todo += self.parents[parent]
        return found

    def above(self, name: str) -> set[str]:
        """Return the chains that a site depends on.

        :param name: a chain or a latent.
        """
        return self.ancestors(name) & set(self.chain_names)

    @property
    def carried(self) -> list[str]:
        """Latents that particles inherit: drawn before a chain moves, or between two chains."""
        feeding = {a for chain in self.chain_names for a in self.ancestors(chain)}
        return [name for name in self.latents if name in feeding or not self.above(name)]

    @property
    def redrawn(self) -> list[str]:
        """Latents after the last chain: a draw given a guess may be impossible given the end."""
        carried = set(self.carried)
        return [name for name in self.latents if name not in carried]

    def evaluate(
        self, values: Mapping[str, Tensor], size: int, place: Place | None = None
    ) -> ProgramRun:
        """Run the program for ``size`` particles with given site values; others are drawn.

        :param values: values by site name, each ``(size, *plates, *event)``.
        :param size: number of particles.
        :param place: gives chain sites without a value a path; zeros by default.
        """
        if not self.vectorize:
            rows = [{name: value[i] for name, value in values.items()} for i in range(size)]
            return ProgramRun(self, [self.trace(row, place=place) for row in rows], size)
        padded = {name: self._pad(name, value) for name, value in values.items()}
        return ProgramRun(self, [self.trace(padded, size, place)], size)

    def _pad(self, name: str, value: Tensor) -> Tensor:
        """Insert the idle plates between the particles and the site's own plates."""
        idle = (1,) * (self.nesting - self.ranks[name])
        return value.reshape(value.shape[0], *idle, *value.shape[1:]) if idle else value

    def trace(
        self, values: Mapping[str, Tensor], size: int | None = None, place: Place | None = None
    ) -> Trace:
        """Run the program once.

        :param values: site values.
        :param size: number of particles on the left of all plates, or None for none.
        :param place: as in :meth:`evaluate`.
        :raises CapabilityError: if a chain is not the one of the first run.
        """
        self.num_rows += size or 1
        self.num_runs += 1
        with poutine.trace() as tracer, _GivenSites(values, place or _empty_path):
            self._call(size)
        self._require_same_chains(tracer.trace)
        return tracer.trace

    def _call(self, size: int | None = None) -> None:
        if size is None:
            self.model(*self.args, **self.kwargs)
            return
        with pyro.plate(PARTICLE_PLATE, size, dim=-1 - self.nesting):
            self.model(*self.args, **self.kwargs)

    def _require_same_chains(self, trace: Trace) -> None:
        for known in self.chains:
            site = trace.nodes.get(known.name)
            if site is None or not is_chain(site) or not _same_chain(site, known):
                raise CapabilityError(
                    f"{self.owner}: the chain at site {known.name!r} of {self.name} is not the "
                    "same on every run (it is chosen by, or built from, another site); pass what "
                    "changes as a condition of one chain, prior.labelled(label) or given=."
                )

    # Reading.

    def _tracked(self) -> tuple[list[dict[str, Any]], Mapping[str, Collection[str]]]:
        """Run the program once with values that know where they come from."""
        self.num_rows += 1
        self.num_runs += 1
        with _Tracking() as tracking:
            found = get_dependencies(self.model, self.args, self.kwargs)
        sites = [s for s in tracking.sites if s["type"] == "sample" and not is_plate(s, self.owner)]
        for site in sites:
            site["value"] = detach_provenance(site["value"])
            if is_chain(site):
                chain = chain_of(site["fn"])
                chain.given = detach_provenance(chain.given)
        return sites, found["prior_dependencies"]  # type: ignore[return-value]

    def _check(self, sites: list[dict[str, Any]]) -> None:
        """Run rows that differ in one respect each, and compare them with the tracked run."""
        first = {s["name"]: s["value"] for s in sites if s["name"] in self.order}
        scored = [s for s in sites if not is_chain(s) and not is_deterministic(s)]
        alone = {s["name"]: detach_provenance(_scored_log_prob(s, False)) for s in scored}
        self.density_shapes = {name: value.shape for name, value in alone.items()}
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            rows = _Rows(self, first)
            run = self._checked_run(rows)
            densities = run.log_densities(self.latents)
            self._require_alike(densities, rows, {n: v.sum() for n, v in alone.items()}, run)
            self._find_path_reading(densities, run, rows)
            self._find_missed_parents(densities, run, rows)

    def _checked_run(self, rows: _Rows) -> ProgramRun:
        try:
            return rows.run(rows.paths)
        except (CapabilityError, PotentialError):
            raise
        except Exception as error:
            self._explain(rows, error)
            if not self.reads:
                raise AssertionError from error
            return rows.run(rows.ends)

    def _explain(self, rows: _Rows, error: Exception) -> None:
        """Find out what a program fails at: whole paths, several particles, or another chain."""
        for name in self.chain_names:
            try:
                rows.run({**rows.ends, name: rows.paths[name]})
            except Exception:
                self.reads = self.reads | {name}
        try:
            rows.run(rows.ends)
        except Exception as failure:
            for row in rows.alone:
                self.trace(row)  # says so where the chain changes with what is drawn
            if not self.vectorize:
                raise
            raise ValueError(
                f"{self.owner}: {self.name} fails for several particles at once ({failure}); "
                f"{_BROADCAST}."
            ) from error

    def _require_alike(
        self,
        densities: Mapping[str, Tensor],
        rows: _Rows,
        tracked: Mapping[str, Tensor],
        run: ProgramRun,
    ) -> None:
        """Refuse densities that are random given all values, or depend on other particles."""
        absent = torch.zeros(run.size, dtype=torch.float64)
        for name in {*densities, *tracked}:
            here = float(densities.get(name, absent)[0])
            if not _close(here, float(tracked.get(name, 0.0))):
                self._refuse_unlike(name, rows)
        if not self.vectorize:
            return
        for row in rows.singles:
            trace = self.trace({name: value[row] for name, value in rows.values(run).items()})
            single = ProgramRun(self, [trace], 1).log_densities(self.latents)
            for name in {*densities, *single}:
                here = float(densities.get(name, absent)[row])
                if not _close(here, float(single.get(name, absent)[0])):
                    self._refuse_unlike(name, rows)

    def _refuse_unlike(self, name: str, rows: _Rows) -> None:
        again = [
            ProgramRun(self, [self.trace(rows.first)], 1).log_densities(self.latents)
            for _ in range(2)
        ]
        values = [float(run[name][0]) if name in run else 0.0 for run in again]
        if not self.vectorize or not _close(*values):
            raise CapabilityError(
                f"{self.owner}: site {name!r} of {self.name} has another density when the program "
                "runs again on the same values; draw what is random in it as a pyro.sample site, "
                "and switch a network with dropout to eval()."
            )
        raise ValueError(
            f"{self.owner}: site {name!r} of {self.name} has another density when several "
            f"particles are evaluated at once; {_BROADCAST}."
        )

    def _find_path_reading(
        self, densities: Mapping[str, Tensor], run: ProgramRun, rows: _Rows
    ) -> None:
        shown = {n: v for n in run.deterministic_names if (v := run.value(n)) is not None}
        for chain, behind in rows.histories.items():
            for value in densities.values():
                if not torch.allclose(value[behind], value[0], rtol=1e-4, atol=1e-5):
                    self.reads = self.reads | {chain}
            reading = {
                name
                for name, value in shown.items()
                if any(not _same(value[0], value[row]) for row in behind)
            }
            self.shows = self.shows | reading
        missing = {n for n in run.density_names if n not in self.density_shapes}
        if missing and len(run.traces) > 1:  # a site that only some rows have
            self._find_added_sites(run, rows)

    def _find_added_sites(self, run: ProgramRun, rows: _Rows) -> None:
        known = set(run.traces[0].nodes)
        for chain, behind in rows.histories.items():
            if any(set(run.traces[row].nodes) != known for row in behind):
                self.reads = self.reads | {chain}

    def _find_missed_parents(
        self, densities: Mapping[str, Tensor], run: ProgramRun, rows: _Rows
    ) -> None:
        """Take all earlier sites as parents where a law changes with what it is not known to read.

        Sound, since the order of a program is an order of ancestry; it costs waiting or redrawing.
        """
        for name in self.latents:
            if not self.above(name) and _varies(densities[name], rows.sequences):
                self._depends_on_all_before(name)
        for site in self.chains:
            given = run.given(site.name)
            known = self.ancestors(site.name)
            by_sequence = any(_varies(x, rows.sequences) for x in given.values())
            by_latent = any(_varies(x, rows.others) for x in given.values())
            if (by_sequence and not self.above(site.name)) or (by_latent and not known):
                self._depends_on_all_before(site.name)

    def _depends_on_all_before(self, name: str) -> None:
        self.parents[name] = set(self.order[: self.order.index(name)])


_BROADCAST = (
    "write it so that it broadcasts over one more plate on the left (values arrive as (particles, "
    "1 for each plate a site is not in, ...)), or pass vectorize_particles=False"
)


class _Rows:
    """The rows of the check: the tracked run first, then what differs from it in one respect.

    :ivar histories: rows whose chain has another history, by chain.
    :ivar sequences: rows with other sequences, and the first; latents are those of the first.
    :ivar others: rows with other latents, and the first.
    """

    def __init__(self, program: Program, first: Mapping[str, Tensor]) -> None:
        self.program, self.first = program, dict(first)
        chains = program.chains
        self.histories: dict[str, list[int]] = {}
        size = 1
        for site in chains:
            self.histories[site.name] = list(range(size, size + NUM_HISTORIES))
            size += NUM_HISTORIES
        self.sequences = [0, *range(size, size + NUM_SEQUENCES)]
        self.same_latents = size + NUM_SEQUENCES
        self.others = [0, *range(self.same_latents, self.same_latents + NUM_LATENTS)]
        self.size = self.same_latents + NUM_LATENTS
        self.ends, self.paths = {}, {}
        for site in chains:
            clean = self._clean(site)
            self.ends[site.name] = site.as_path(clean)
            paths = self.ends[site.name].clone()
            behind = self.histories[site.name]
            paths[behind] = _histories(clean[behind], site)
            self.paths[site.name] = paths

    def _clean(self, site: ChainSite) -> Tensor:
        first = site.chain.x0(self.first[site.name])
        clean = first.expand(self.size, *first.shape).clone()
        new = torch.cat(
            [torch.tensor(self.sequences[1:]), torch.arange(self.same_latents, self.size)]
        )
        trials = torch.cat([trial_sequences(site, NUM_SEQUENCES) for _ in range(2)])
        clean[new] = trials[: len(new)].to(clean.device)
        return clean

    @property
    def singles(self) -> list[int]:
        """Rows that are run alone, too; their sequences differ everywhere."""
        return self.sequences[1:3]

    @property
    def alone(self) -> list[dict[str, Tensor]]:
        """Single rows that draw their own latents."""
        rows = [0, *self.sequences[1:]]
        return [{name: path[row] for name, path in self.ends.items()} for row in rows]

    def values(self, run: ProgramRun) -> dict[str, Tensor]:
        """Return all values of a run of these rows."""
        drawn = {name: run.value(name) for name in self.program.latents}
        return {**self.paths, **{n: v for n, v in drawn.items() if v is not None}}

    def run(self, paths: Mapping[str, Tensor]) -> ProgramRun:
        """Run the program on these rows, with the latents of the tracked run in most of them."""
        program = self.program
        latents = {name: self.first[name] for name in program.latents}
        if program.vectorize:
            kept = {n: program._pad(n, v.expand(1, *v.shape)) for n, v in latents.items()}
            with _SameRows(kept, self.same_latents):
                return program.evaluate(paths, self.size)
        rows = [{name: path[i] for name, path in paths.items()} for i in range(self.size)]
        rows = [row | latents if i < self.same_latents else row for i, row in enumerate(rows)]
        return ProgramRun(program, [program.trace(row) for row in rows], self.size)


def trial_sequences(site: ChainSite, number: int) -> Tensor:
    """Return clean sequences to try a program on, int64 ``(number, *plates, L)``.

    At every position they have as many different tokens as can be, so that little is left to luck.

    :param site: the chain site.
    :param number: how many.
    """
    chain, row = site.chain, torch.arange(number)
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    if size <= number:
        tokens = torch.rand(*shape, size).argsort(-1)[..., row % size]
    else:  # orders of a large alphabet would not fit into memory
        tokens = (torch.randint(size, shape)[..., None] + row) % size
    tokens = tokens.movedim(-1, 0)
    if chain.prompt is None:
        return tokens
    prompt = chain.prompt.cpu()
    return torch.where(prompt >= 0, prompt, tokens)


def _histories(clean: Tensor, site: ChainSite) -> Tensor:
    """Return paths to clean sequences: noise until the end, and noise that gives way."""
    chain = site.chain
    shape = torch.Size((len(clean), *chain.batch_shape))
    noise = chain.kernel.init_carry(shape, chain.length, prompt=chain.prompt)["tokens"]
    step = torch.arange(chain.num_steps + 1)[:, None]
    late = torch.full_like(clean[:1], chain.num_steps)
    early = torch.randint(1, chain.num_steps + 1, clean[1:].shape)
    when = torch.cat([late, early.to(late.device)])
    return torch.where(
        step.to(clean.device) < when[..., None, :], noise[..., None, :], clean[..., None, :]
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

    def given(self, name: str) -> dict[str, Tensor]:
        """Return the conditions of a chain, each ``(size, *plates, *event)``.

        :param name: site name of the chain.
        """
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

    def is_latent_or_deterministic(self, name: str) -> bool:
        """Return whether a site belongs into the posterior's samples.

        :param name: site name.
        """
        site = self._node(name)
        return not site["is_observed"] or is_deterministic(site)

    def samples(self, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the values of all latent and deterministic sites that have one per particle.

        :param leave_out: names of sites not wanted.
        """
        names = [n for n in self.site_names if n not in leave_out]
        values = {n: self.value(n) for n in names if self.is_latent_or_deterministic(n)}
        return {name: value for name, value in values.items() if value is not None}

    def log_density(self, latents: Collection[str], *, lookahead: bool = False) -> Tensor:
        """Return the log-density of observations and some latents, float64 ``(size,)``.

        :param latents: the latents whose density counts; others are fresh draws of their own law.
        :param lookahead: score guesses: a mild penalty for each site that forbids the guess, and
            potentials by their own look-ahead.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for value in self.log_densities(latents, lookahead=lookahead).values():
            total = total + value
        return total

    def latent_log_density(self, latents: Collection[str]) -> Tensor:
        """Return the log-density of some latents alone, float64 ``(size,)``.

        :param latents: their names.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for name in latents:
            total = total + self.site_log_density(name)
        return total

    def log_densities(
        self, latents: Collection[str], *, lookahead: bool = False
    ) -> dict[str, Tensor]:
        """Return the log-density of each scored site, float64 ``(size,)`` each.

        :param latents: as in :meth:`log_density`.
        :param lookahead: as in :meth:`log_density`.
        """
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


def _random_path(chain: ReverseChain) -> Tensor:
    """Return a random clean sequence repeated: one that argmax guesses would not show."""
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    clean = torch.randint(size, shape)
    if chain.prompt is not None:
        prompt = chain.prompt.cpu()
        clean = torch.where(prompt >= 0, prompt, clean)
    return clean[..., None, :].expand(*shape[:-1], chain.num_steps + 1, -1).clone()


def _empty_path(name: str, chain: ReverseChain) -> Tensor:
    return torch.zeros((*chain.batch_shape, *chain.event_shape), dtype=torch.int64)


def _same_chain(site: dict[str, Any], known: ChainSite) -> bool:
    chain, first = chain_of(site["fn"]), known.chain
    if chain.length != first.length or not chain.kernel.same_as(first.kernel):
        return False
    if chain.prompt is None or first.prompt is None:
        return chain.prompt is first.prompt
    # Under the particle plate a prompt per row has one more dimension, of equal rows.
    prompt = chain.prompt.reshape(-1, *first.prompt.shape)
    return bool((prompt == first.prompt).all())


def _scored_log_prob(site: dict[str, Any] | None, lookahead: bool) -> Tensor:
    if site is None:
        return torch.zeros(())
    fn = site["fn"]
    if lookahead and isinstance(fn, PotentialFactor):
        log_p = fn.lookahead()
    else:
        log_p = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    return torch.as_tensor(scale_and_mask(log_p, site["scale"], site["mask"]))


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


def _close(value: float, other: float) -> bool:
    if math.isnan(value) or math.isnan(other):  # refused elsewhere, in other words
        return True
    return math.isclose(value, other, rel_tol=1e-3, abs_tol=1e-4)


def _same(value: Tensor, other: Tensor) -> bool:
    return torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _varies(values: Tensor, rows: list[int]) -> bool:
    some = values[rows]
    return any(not _same(some[0], row) for row in some[1:])
