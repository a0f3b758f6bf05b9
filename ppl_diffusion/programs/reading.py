"""Read a Pyro program: what it draws, what depends on what, and its density for many particles.

Particles are one more plate, left of all plates of the program, so a program that broadcasts over
plates is evaluated for all of them at once; others are run particle by particle.

What depends on what is asked of Pyro (:func:`pyro.infer.inspect.get_dependencies`): one run in
which values remember where they come from. That is silently wrong where they are turned into Python
numbers on the way, so one batch of rows that differ in one respect each checks it: behind other
histories (does a density read more of a path than its end?), with other sequences, with other
latents. Two of the rows are run alone, too: do particles see each other?
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.ops.provenance import detach_provenance
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.handlers.conditioned import require_unconditioned
from ppl_diffusion.kernels.blocks import are_discrete
from ppl_diffusion.programs.run import PARTICLE_PLATE, ProgramRun, same_values, scored_log_prob
from ppl_diffusion.programs.sites import (
    ChainSite,
    DataSite,
    chain_of,
    chain_site,
    data_of,
    depth,
    is_chain,
    is_data,
    is_deterministic,
    is_plate,
    plate_names,
    program_name,
)
from ppl_diffusion.programs.tracking import (
    GivenSites,
    OwnLaws,
    Place,
    SameRows,
    Tracking,
    is_bounded_by_others,
    is_discrete,
)
from ppl_diffusion.smc.run_memory import remembers

NUM_HISTORIES, NUM_SEQUENCES, NUM_LATENTS = 2, 8, 16
"""Rows of the check: histories per chain, other sequences, other latents."""


@remembers("num_rows", "num_runs")
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
    :ivar bounded: latents whose support depends on other sites.
    :ivar discrete: latents that take values from a countable set, of whatever type.
    :ivar masked: latents that the program masks; they have the law that they are drawn from.
    :ivar observed: values of the observed sites, the data.
    :ivar data: observed sites that are no factors.
    :ivar plates: the plates of each site's batch dimensions, left to right; "" for none.
    :ivar reads: chain sites of which a density reads more than the clean sequence.
    :ivar shows: deterministic sites whose values read more than that.
    :ivar unread: latents that no chain and no density but their own reads: predictions.
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
        self._require_unscaled(sites)
        chains = {
            site["name"]: (chain_of(site["fn"]), site["value"]) for site in sites if is_chain(site)
        }
        require_unconditioned(f"{owner}: in {self.name}", sites, chains)
        self.shapes = {s["name"]: torch.Size(getattr(s["value"], "shape", ())) for s in sites}
        self.ranks = {s["name"]: len(s["fn"].batch_shape) for s in sites}
        self.nesting = max(map(depth, sites))
        self.plates = {s["name"]: plate_names(s) for s in sites}
        drawn = [s for s in sites if not s["is_observed"] and not is_deterministic(s)]
        data = [s for s in sites if s["is_observed"] and not is_deterministic(s)]
        self.observed = [part for site in data for part in data_of(site)]
        self.order = [s["name"] for s in drawn]
        self.latents = [s["name"] for s in drawn if not is_chain(s)]
        self.parents = {
            s["name"]: (set(dependencies.get(s["name"], ())) | s["parents"])
            & set(self.order) - {s["name"]}
            for s in drawn
        }
        self._followed = set(dependencies)
        self._scored_parents = {s["name"]: set(dependencies.get(s["name"], ())) for s in data}
        self.bounded = {s["name"] for s in drawn if is_bounded_by_others(s["fn"])}
        self.discrete = [s["name"] for s in drawn if not is_chain(s) and is_discrete(s["fn"])]
        self.density_shapes: dict[str, torch.Size] = {}
        self.data: list[DataSite] = []
        self.reads: frozenset[str] = frozenset()
        self.shows: frozenset[str] = frozenset()
        self.unread: frozenset[str] = frozenset()
        self._check(sites)

    @property
    def device(self) -> torch.device:
        """Where particles live: where the network of the first chain does."""
        device: torch.device = self.chains[0].chain.kernel.device
        return device

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

    def require_clean_sequences(self) -> None:
        """Refuse densities that read more of a path than its end.

        :raises CapabilityError: if there are any.
        """
        if self.reads:
            raise CapabilityError(
                f"{self.owner}: {self.name} reads the path at site {min(self.reads)!r}, not only "
                "its clean sequence chain.x0(path); use ppl_diffusion.inference.SMC with "
                "method='smc' and store_path=True."
            )

    @property
    def carried(self) -> list[str]:
        """Latents that particles inherit: drawn before a chain moves, or between two chains."""
        # What a chain reads must travel with the particle: drawn anew it would be another's.
        feeding = {a for chain in self.chain_names for a in self.ancestors(chain)}
        kept = [name for name in self.latents if name in feeding or not self.above(name)]
        return [name for name in kept if name not in self.unread]

    @property
    def feeding(self) -> set[str]:
        """Latents that the law of a chain depends on."""
        return {a for chain in self.chain_names for a in self.ancestors(chain)} & set(self.latents)

    @property
    def redrawn(self) -> list[str]:
        """Latents after the last chain: a draw given a guess may be impossible given the end.

        And those that nothing reads, which are drawn at the end for every particle anew.
        """
        carried = set(self.carried)
        return [name for name in self.latents if name not in carried]

    def evaluate(
        self,
        values: Mapping[str, Tensor],
        size: int,
        place: Place | None = None,
        *,
        strict: bool = True,
    ) -> ProgramRun:
        """Run the program for ``size`` particles with given site values; others are drawn.

        :param values: values by site name, each ``(size, *plates, *event)``.
        :param size: number of particles.
        :param place: gives chain sites without a value a path; zeros by default.
        :param strict: refuse values outside of a support, and densities that are no numbers.
        """
        with contextlib.nullcontext() if strict else pyro.validation_enabled(False):
            traces = self._traces(values, size, place)
        return ProgramRun(self, traces, size, strict=strict)

    def _traces(self, values: Mapping[str, Tensor], size: int, place: Place | None) -> list[Trace]:
        if not self.vectorize:
            rows = [{name: value[i] for name, value in values.items()} for i in range(size)]
            return [self.trace(row, place=place) for row in rows]
        padded = {name: self._pad(name, value) for name, value in values.items()}
        return [self.trace(padded, size, place)]

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
        given = GivenSites(values, place or _empty_path)
        with poutine.trace() as tracer, OwnLaws(), given:
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
                    "same on every run; build its denoiser outside of the program, and pass what "
                    "changes as a condition of one chain, prior.labelled(label) or given=."
                )

    # Reading.

    def _require_unscaled(self, sites: list[dict[str, Any]]) -> None:
        for site in sites:
            free = not site["is_observed"] and not is_deterministic(site)
            if free and float(torch.as_tensor(site["scale"], device="cpu").max()) != 1.0:
                raise CapabilityError(
                    f"{self.owner}: the site {site['name']!r} of {self.name} is scaled, but "
                    "particles are drawn by its own law; scale observations only."
                )

    def _tracked(self) -> tuple[list[dict[str, Any]], Mapping[str, Collection[str]]]:
        """Run the program once with values that know where they come from."""
        self.num_rows += 1
        self.num_runs += 1
        with Tracking() as tracking, OwnLaws() as laws:
            found = get_dependencies(self.model, self.args, self.kwargs)
        self.masked = laws.masked
        sites = [s for s in tracking.sites if s["type"] == "sample" and not is_plate(s, self.owner)]
        for site in sites:
            site["value"] = detach_provenance(site["value"])
            if is_chain(site):
                chain = chain_of(site["fn"])
                chain.given = detach_provenance(chain.given)
        return sites, found["prior_dependencies"]

    def _check(self, sites: list[dict[str, Any]]) -> None:
        """Run rows that differ in one respect each, and compare them with the tracked run."""
        first = {s["name"]: s["value"] for s in sites if s["name"] in self.order}
        scored = [s for s in sites if not is_chain(s) and not is_deterministic(s)]
        alone = {s["name"]: detach_provenance(scored_log_prob(s, False)) for s in scored}
        self.density_shapes = {name: value.shape for name, value in alone.items()}
        self.data = [DataSite.of(s, alone[s["name"]].shape) for s in scored if is_data(s)]
        # Reading must not move the draws that follow, nor stop at values it made up itself.
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            rows = _Rows(self, first)
            tracked = {name: float(value.sum()) for name, value in alone.items()}
            run = self._checked_run(rows)
            if self._unlike(run, tracked) and self._upset_by_paths(rows, tracked):
                run = rows.run(rows.ends)
            densities = self._densities(run)
            self._require_alike(densities, rows, tracked, run)
            self._find_path_reading(densities, run, rows)
            self._find_missed_parents(densities, run, rows)
            self.unread = self._find_unread(rows, tracked)

    def _find_unread(self, rows: _Rows, tracked: Mapping[str, float]) -> frozenset[str]:
        """Find the latents that nothing scored reads; other draws of them must change nothing."""
        read = {u for parents in self._scored_parents.values() for u in parents}
        read = read & set(self.order) | set(self.chain_names)
        read = read.union(*(self.ancestors(name) for name in read))
        # What Pyro does not follow (a Delta, which stands for what it was made of) may be read.
        candidates = set(self.latents) & self._followed - read
        if not candidates:
            return frozenset()
        kept = {n: v.expand(2, *v.shape) for n, v in rows.first.items() if n not in candidates}
        run = self.evaluate(kept, 2)
        densities = self._densities(run)
        for name in densities.keys() - candidates:
            known = tracked.get(name, 0.0)
            if not all(_close(float(value), known) for value in densities[name]):
                return frozenset()
        return frozenset(candidates)

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
            raise self._no_broadcast(failure) from error

    def _upset_by_paths(self, rows: _Rows, tracked: Mapping[str, float]) -> bool:
        """Find the chains whose histories change other rows: a branch all particles share."""
        if self._unlike(rows.run(rows.ends), tracked):
            return False
        for name in self.chain_names:
            if self._unlike(rows.run({**rows.ends, name: rows.paths[name]}), tracked):
                self.reads = self.reads | {name}
        return bool(self.reads)

    def _unlike(self, run: ProgramRun, tracked: Mapping[str, float]) -> list[str]:
        """Return the sites whose densities are not, in the first row, what they were before."""
        densities = self._densities(run)
        here = {name: float(value[0]) for name, value in densities.items()}
        names = {**here, **tracked}
        return [n for n in names if not _close(here.get(n, 0.0), tracked.get(n, 0.0))]

    def _densities(self, run: ProgramRun) -> dict[str, Tensor]:
        try:
            return run.log_densities(self.latents)
        except PotentialError:
            raise
        except ValueError as failure:  # a shape that does not fit the particles
            raise self._no_broadcast(failure) from failure

    def _no_broadcast(self, failure: Exception) -> ValueError:
        return ValueError(
            f"{self.owner}: {self.name} fails for several particles at once ({failure}); "
            f"{_BROADCAST}."
        )

    def _require_alike(
        self,
        densities: Mapping[str, Tensor],
        rows: _Rows,
        tracked: Mapping[str, float],
        run: ProgramRun,
    ) -> None:
        """Refuse densities that are random given all values, or depend on other particles."""
        for name in self._unlike(run, tracked):
            self._refuse_unlike(name, rows)
        if not self.vectorize:
            return
        absent = torch.zeros(run.size, dtype=torch.float64, device=self.device)
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
            if not all(
                same_values(value[behind], value[rows.pairs]) for value in densities.values()
            ):
                self.reads = self.reads | {chain}
            reading = {n for n, v in shown.items() if not same_values(v[behind], v[rows.pairs])}
            self.shows = self.shows | reading
        missing = {n for n in run.density_names if n not in self.density_shapes}
        if missing and len(run.traces) > 1:  # a site that only some rows have
            self._find_added_sites(run, rows)

    def _find_added_sites(self, run: ProgramRun, rows: _Rows) -> None:
        sites = [set(trace.nodes) for trace in run.traces]
        for chain, behind in rows.histories.items():
            if any(sites[a] != sites[b] for a, b in zip(behind, rows.pairs, strict=True)):
                self.reads = self.reads | {chain}

    def _find_missed_parents(
        self, densities: Mapping[str, Tensor], run: ProgramRun, rows: _Rows
    ) -> None:
        """Take all earlier sites as parents where a law changes with what it should not read."""
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
        # Program order is an order of ancestry: too many parents cost waiting, too few the truth.
        self.parents[name] = set(self.order[: self.order.index(name)])


_BROADCAST = (
    "write it so that it broadcasts over one more plate on the left (values arrive as (particles, "
    "1 for each plate a site is not in, ...)), or pass vectorize_particles=False"
)


class _Rows:
    """The rows of the check: the tracked run first, then what differs from it in one respect.

    :ivar sequences: rows with other sequences, and the first; latents are those of the first.
    :ivar histories: rows whose chain has another history, by chain.
    :ivar pairs: the rows that those of a history repeat but for it.
    :ivar others: rows with other latents, and the first.
    """

    def __init__(self, program: Program, first: Mapping[str, Tensor]) -> None:
        self.program, self.first = program, dict(first)
        chains = program.chains
        self.sequences = list(range(1 + 2 + NUM_SEQUENCES))
        trials, size = self.sequences[1:], len(self.sequences)
        self.pairs = trials * NUM_HISTORIES
        self.histories: dict[str, list[int]] = {}
        for site in chains:
            self.histories[site.name] = list(range(size, size + len(self.pairs)))
            size += len(self.pairs)
        self.same_latents = size
        self.others = [0, *range(size, size + NUM_LATENTS)]
        self.size = size + NUM_LATENTS
        self.ends, self.paths = {}, {}
        for site in chains:
            clean = self._clean(site)
            self.ends[site.name] = site.as_path(clean)
            paths = self.ends[site.name].clone()
            paths[self.histories[site.name]] = _histories(clean[trials], site).flatten(0, 1)
            self.paths[site.name] = paths

    def _clean(self, site: ChainSite) -> Tensor:
        first = self.first[site.name][..., -1, :]
        clean = first.expand(self.size, *first.shape).clone()
        trials = torch.cat([_two_constants(site), trial_sequences(site, NUM_SEQUENCES)])
        clean[self.sequences[1:]] = trials.to(clean.device)
        for behind in self.histories.values():
            clean[behind] = clean[self.pairs]
        clean[self.same_latents :] = trial_sequences(site, NUM_LATENTS).to(clean.device)
        return clean

    @property
    def singles(self) -> list[int]:
        """Rows that are run alone, too: whichever token a branch asks for, one has it nowhere."""
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
            with SameRows(kept, self.same_latents):
                return program.evaluate(paths, self.size)
        rows = [{name: path[i] for name, path in paths.items()} for i in range(self.size)]
        rows = [row | latents if i < self.same_latents else row for i, row in enumerate(rows)]
        return ProgramRun(program, [program.trace(row) for row in rows], self.size)


def trial_sequences(site: ChainSite, number: int) -> Tensor:
    """Return clean sequences to try a program on, int64 ``(number, *plates, L)``."""
    chain = site.chain
    device = chain.kernel.device
    row = torch.arange(number, device=device)
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    if size <= number:  # one order of the alphabet after the other
        orders = torch.rand(-(-number // size), *shape, size, device=device).argsort(-1)
        tokens = torch.cat(list(orders), -1)[..., :number]
    else:  # orders of a large alphabet would not fit into memory
        tokens = (torch.randint(size, shape, device=device)[..., None] + row) % size
    return site.beside(_prompted(tokens.movedim(-1, 0), site))


def _two_constants(site: ChainSite) -> Tensor:
    """Return two sequences, each of one token."""
    chain = site.chain
    size, shape = chain.kernel.process.vocab_size, (*chain.batch_shape, chain.length)
    device = chain.kernel.device
    first = torch.randint(size, (), device=device)
    tokens = (first + torch.arange(2, device=device)) % size
    two = _prompted(tokens.reshape(2, *[1] * len(shape)).expand(2, *shape), site)
    return site.beside(two)


def _prompted(tokens: Tensor, site: ChainSite) -> Tensor:
    if site.chain.prompt is None:
        return tokens
    prompt = site.chain.prompt
    return torch.where(prompt >= 0, prompt, tokens)


def _histories(clean: Tensor, site: ChainSite) -> Tensor:
    """Return paths to clean sequences, noise until the end first, then noise that gives way."""
    chain, shape = site.chain, torch.Size((NUM_HISTORIES, *clean.shape))
    carry = chain.kernel.init_carry(shape[:-1], chain.length, prompt=chain.prompt)
    noise = chain.kernel.flat(carry)
    step = torch.arange(chain.num_steps + 1, device=clean.device)[:, None]
    when = torch.randint(1, chain.num_steps + 1, shape, device=clean.device)
    when[0] = chain.num_steps
    return torch.where(step < when[..., None, :], noise[..., None, :], clean[..., None, :])


def _empty_path(name: str, chain: ReverseChain) -> Tensor:
    shape = (*chain.batch_shape, *chain.event_shape)
    kind = torch.int64 if are_discrete(chain.kernel.blocks) else torch.float64
    return torch.zeros(shape, dtype=kind, device=chain.kernel.device)


def _same_chain(site: dict[str, Any], known: ChainSite) -> bool:
    chain, first = chain_of(site["fn"]), known.chain
    if chain.length != first.length or not chain.kernel.same_as(first.kernel):
        return False
    if chain.prompt is None or first.prompt is None:
        return chain.prompt is first.prompt
    # Under the particle plate a prompt per row has one more dimension, of equal rows.
    prompt = chain.prompt.reshape(-1, *first.prompt.shape)
    return bool((prompt == first.prompt).all())


def _close(value: float, other: float) -> bool:
    if math.isnan(value) or math.isnan(other):  # refused elsewhere, in other words
        return True
    return math.isclose(value, other, rel_tol=1e-3, abs_tol=1e-4)


def _varies(values: Tensor, rows: list[int]) -> bool:
    some = values[rows]
    return any(not same_values(some[0], row) for row in some[1:])
