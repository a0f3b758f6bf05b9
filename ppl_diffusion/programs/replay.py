"""A program run again on finished draws: under other arguments, element by element, without data.

Results keep one as their ``origin``; it is what :meth:`ParticlePosterior.reweight` and the groups
``log_likelihood``, ``prior`` and ``posterior_predictive`` of ArviZ ask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.run import ProgramRun
from ppl_diffusion.programs.sources import MAX_ROWS, ProgramSource
from ppl_diffusion.programs.tracking import Simulated
from ppl_diffusion.smc.law import Law
from ppl_diffusion.smc.origin import Pointwise, Scored, Sites

Read = Callable[[ProgramRun], dict[str, Tensor]]


class Replay:
    """A program at its arguments; fulfils :class:`ppl_diffusion.smc.origin.Origin`.

    :param program: the program.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def name(self) -> str:
        """What the program is called."""
        return self.program.name

    @property
    def law(self) -> Law:
        """The law of its posterior."""
        return ProgramSource(self.program, set()).law

    @property
    def plates(self) -> Mapping[str, tuple[str, ...]]:
        """The plates of each site that is in one, left to right."""
        # Data with elements that nobody saw lose their shape with them.
        torn = {site.name for site in self.program.data if site.seen is not None}
        every = self.program.plates.items()
        return {name: plates for name, plates in every if any(plates) and name not in torn}

    @property
    def num_calls(self) -> int:
        """Rows that it was evaluated for so far, its reading included."""
        return self.program.num_rows

    def at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Replay:
        """Return the same program at other arguments.

        :param args: positional arguments.
        :param kwargs: keyword arguments.
        """
        old = self.program
        return Replay(Program(old.model, args, kwargs, vectorize=old.vectorize, owner=old.owner))

    def score(self, sites: Sites) -> Scored:
        """Return the log-density and the values of all sites on draws.

        :param sites: values of latents and chains, each ``(B, ...)``; of a chain, its paths, or
            its clean sequences where the program reads no more.
        :raises ValueError: if a site is missing.
        """
        found = self._read(sites, self._scored)
        density = found.pop("density:")
        conditions = {n: found.pop(n) for n in list(found) if n.startswith("given:")}
        return Scored(density, found, conditions)

    def _scored(self, run: ProgramRun) -> dict[str, Tensor]:
        chains = self.program.chain_names
        # Names that no site can have: Pyro's own names hold no colon at their end or start.
        given = {f"given:{c}:{n}": v for c in chains for n, v in run.given(c).items()}
        density = run.log_density(self.program.latents)
        return {**run.samples(leave_out=chains), **given, "density:": density}

    def pointwise(self, sites: Sites) -> Pointwise:
        """Return the log-densities of all sites but the chains on draws, element by element.

        :param sites: as in :meth:`score`.
        :raises ValueError: if a site is missing.
        """
        data = {site.name: site for site in self.program.data}

        def read(run: ProgramRun) -> dict[str, Tensor]:
            names = [n for n in run.density_names if n in self.program.density_shapes]
            return {name: run.elementwise(name) for name in names}

        found = self._read(sites, read)
        seen = {n: site.only_seen(found.pop(n), 1) for n, site in data.items() if n in found}
        latents = {n: found.pop(n) for n in self.program.latents if n in found}
        return Pointwise(seen, latents, found)

    def data(self) -> dict[str, Tensor]:
        """Return what was observed, without the elements that nobody saw."""
        return {site.name: site.only_seen(site.value, 0).cpu() for site in self.program.data}

    def predict(self, sites: Sites, seed: int) -> dict[str, Tensor]:
        """Return new data for each draw, ``(B, ...)`` each.

        :param sites: as in :meth:`score`.
        :raises ValueError: if a site is missing, or its data are larger than what it draws.
        """
        with seeded(seed), Simulated(self._data_names):
            return self._read(sites, self._simulated)

    def prior(self, num: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return draws of all sites before any data were seen, and data for each of them.

        :param num: number of draws.
        """
        with seeded(seed), Simulated(self._data_names), torch.no_grad():
            run = self.program.evaluate({}, num, _sampled)
        return {n: v.cpu() for n, v in run.samples().items()}, self._simulated(run)

    @property
    def _data_names(self) -> list[str]:
        return [site.name for site in self.program.data]

    def _simulated(self, run: ProgramRun) -> dict[str, Tensor]:
        found = {}
        for site in self.program.data:
            value = run.value(site.name)
            if value is None or value.shape[1:] != site.value.shape:
                raise ValueError(
                    f"the site {site.name!r} of {self.program.name} draws fewer values than it "
                    "was given as data; put it into a plate."
                )
            found[site.name] = site.only_seen(value, 1).cpu()
        return found

    def _read(self, sites: Sites, read: Read) -> dict[str, Tensor]:
        """Run the program on draws, some at a time, and put together what is read of it."""
        known = self._known(sites)
        size = len(next(iter(known.values())))
        parts = []
        with torch.no_grad():
            for rows in torch.arange(size, device="cpu").split(MAX_ROWS):
                given = {n: v[rows].to(self.program.device) for n, v in known.items()}
                parts.append(read(self.program.evaluate(given, len(rows))))
        shared = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in shared}

    def _known(self, sites: Sites) -> dict[str, Tensor]:
        program = self.program
        missing = [n for n in [*program.chain_names, *program.latents] if n not in sites]
        if missing:
            raise ValueError(
                f"{program.name} cannot run again on these draws: they do not hold its site "
                f"{missing[0]!r}; run the inference with store_path=True."
            )
        known = {name: sites[name] for name in program.latents}
        for site in program.chains:
            value = sites[site.name].to(torch.int64)
            whole = value.shape[1:] == (*site.chain.batch_shape, *site.chain.event_shape)
            if not whole and site.name in program.reads:
                raise ValueError(
                    f"{program.name} reads whole paths at {site.name!r}, which these draws do not "
                    "hold; run the inference with store_path=True."
                )
            known[site.name] = value if whole else site.as_path(value)
        return known


def _sampled(name: str, chain: ReverseChain) -> Tensor:
    path: Tensor = chain.sample()
    return path


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed what happens inside and leave the global random state alone; None does neither."""
    if seed is None:
        yield
        return
    # Seeding seeds every accelerator, too.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
