"""A source bound to one run: particles as dictionaries of named sites, and how they move.

The state of the particles is nested: ``state["sites"][name]`` is the carry of a chain, a dict of
arrays ``(R, N, *plates, ...)``; ``state["latents"][name]`` the value of another latent; ``log_r``
the log-density that latents were drawn with. Methods put slots of their own beside them. The engine
gathers all of it, so whatever a particle remembers it keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import EventKernel
from ppl_diffusion.kernels.base import Carry, Kernel
from ppl_diffusion.kernels.blocks import TOKENS, are_discrete
from ppl_diffusion.programs.ahead import Ahead, Levels, Rated
from ppl_diffusion.programs.schedule import Group, Item, Plan, groups_of, stages
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.sources import ChainSource, Moved, ProgramSource, Rng, Source, State
from ppl_diffusion.programs.trails import remember
from ppl_diffusion.smc.evaluated_potential import Pending
from ppl_diffusion.smc.feynman_kac import BoundFeynmanKac, FeynmanKac, per_particle, take_particles
from ppl_diffusion.smc.rejuvenation import tilt
from ppl_diffusion.smc.run_memory import remembers
from ppl_diffusion.smc.twists import (
    LOG_BASE,
    FillTwist,
    SampledFill,
    floored,
    log_mean_exp,
    mean_lookahead,
)


class Mover(Protocol):
    """How the particles of one chain site start, move, and are completed.

    :class:`~ppl_diffusion.smc.feynman_kac.BoundFeynmanKac` is one.
    """

    @property
    def kernel(self) -> Kernel: ...
    @property
    def num_evaluations(self) -> int: ...
    def init(
        self, runs: int, particles: int, generator: Rng, given: Mapping[str, Tensor] | None = None
    ) -> Carry: ...
    def move(self, carry: Carry, k: int, generator: Rng) -> tuple[Carry, Tensor | float]: ...
    def fills(self, twist: FillTwist, carry: Carry, k: int, generator: Rng) -> Tensor: ...


@remembers("counted_notes")
@dataclass
class Bound:
    """What a method may ask about its particles during one run.

    States are returned anew, never changed in place: the engine still holds the old ones.

    :param source: what is sampled.
    :param movers: how the particles of each site move.
    :param plan: who moves at each step.
    :param fill: how unfinished sequences are completed.
    :param shape: runs and particles ``(R, N)``.
    :param normalised: whether particles without all twists have mean weight one (``LOG_BASE``).
    """

    source: Source
    movers: Mapping[str, Mover]
    plan: Plan
    fill: FillTwist
    shape: tuple[int, int]
    normalised: bool = True

    def __post_init__(self) -> None:
        self.sites = {site.name: site for site in self.source.chains}
        self.program = program = self.source.program
        above = {n: set() if program is None else program.above(n) for n in self.sites}
        self.stages = stages(above)
        self.steps = {name: mover.kernel.num_steps for name, mover in self.movers.items()}
        self.groups: list[Group] = groups_of(self.plan, self.stages, self.steps)
        on_grid = dict(self.steps)
        on_grid |= {n: self.sites[n].chain.num_steps for n in self.sites if self._keeper(n)}
        same = on_grid == self.steps
        self.num_steps = len(self.groups if same else groups_of(self.plan, self.stages, on_grid))
        """Steps of the chains on their grids, which their rounds of reveals stand for."""
        self.openings = self._openings()
        self.notes: dict[str, Any] = {}
        """What a method wants to remember of the run itself."""
        self.levels: Levels | None = None
        """What look-aheads are tempered by and floored at where latents move."""
        self.remembered: frozenset[str] = frozenset()
        """Chains whose particles remember the states of their paths (``TRAIL``)."""
        if isinstance(self.source, ProgramSource):
            self.source.place = self.place

    @property
    def counted_notes(self) -> dict[str, Any]:
        """The notes that are numbers and words: what changes while the particles move."""
        plain = (bool, int, float, str)
        return {name: note for name, note in self.notes.items() if isinstance(note, plain)}

    @counted_notes.setter
    def counted_notes(self, notes: Mapping[str, Any]) -> None:
        self.notes.update(notes)

    @property
    def only(self) -> ChainSite:
        """The only chain site."""
        (site,) = self.source.chains
        return site

    @property
    def on_events(self) -> bool:
        """Whether a chain goes from reveal to reveal, so that rounds stand for its steps."""
        return any(self._keeper(name) is not None for name in self.sites)

    @property
    def num_evaluations(self) -> int:
        """Network rows evaluated so far, over all chains."""
        return sum(mover.num_evaluations for mover in self.movers.values())

    @property
    def times(self) -> Tensor:
        """The time grid of the chain that moves at every step, or the share of steps to go."""
        total = self.num_steps
        for name, mover in self.movers.items():
            kernel = mover.kernel if self._keeper(name) is None else self.sites[name].chain.kernel
            if kernel.num_steps == total:
                return torch.as_tensor(kernel.times, device="cpu")
        return torch.linspace(1.0, 0.0, total + 1, dtype=torch.float64, device="cpu")

    def at(self, shape: tuple[int, int]) -> Bound:
        """Return the same run with other numbers of runs and particles; all else is shared.

        :param shape: runs and particles.
        """
        other = copy.copy(self)
        other.shape = shape
        return other

    @property
    def device(self) -> torch.device:
        """Where the particles live: where the network of the first chain does."""
        device: torch.device = next(iter(self.movers.values())).kernel.device
        return device

    @property
    def zeros(self) -> Tensor:
        """A zero for every particle, float64 ``(R, N)``."""
        return torch.zeros(self.shape, dtype=torch.float64, device=self.device)

    @property
    def needs_program(self) -> bool:
        """Whether something is drawn before the chains, or they depend on something."""
        program = self.program
        return program is not None and bool(
            program.carried or any(program.ancestors(name) for name in self.sites)
        )

    def chain(self, name: str, given: Mapping[str, Tensor] | None = None) -> ReverseChain:
        """Return a chain around its counted network, under the conditions of particles.

        :param given: conditions ``(R, N, *plates, *event)``; None takes the chain's own.
        """
        chain = self.sites[name].chain
        own = chain.given if given is None else given
        kernel = self.movers[name].kernel
        kernel = kernel.grid if isinstance(kernel, EventKernel) else kernel
        known = ReverseChain(kernel, chain.length, prompt=chain.prompt, given=own)
        return known if given is not None else known.expand(chain.batch_shape)

    # Opening: what is drawn before a chain can start.

    def _openings(self) -> dict[int, list[str]]:
        """Return the sites of each stage by the group before which they open."""
        # Not before: a chain that began on its parent's guess would move by another law.
        found, start = {}, 0
        for sites in self.stages:
            found[start] = list(sites)
            moved = {site: self.steps[site] for site in sites}
            while start < len(self.groups) and any(moved.values()):
                for item in self.groups[start]:
                    moved[item.site] -= 1
                start += 1
        return found

    def start(self, generator: Rng, latents: Mapping[str, Tensor] | None = None) -> State:
        """Return the noisiest states, each with its draw of what comes before them.

        :param latents: values of latents that are not to be drawn, each ``(R, N, ...)``.
        """
        state: State = {"sites": {}, "latents": dict(latents or {}), "log_r": self.zeros}
        state |= {"done": {}, "noisiest": {}, LOG_BASE: self.zeros}
        return self.open(state, 0, generator)

    def open(self, state: State, group: int, generator: Rng) -> State:
        """Return states in which the chains that start at a group have begun.

        :param group: index of the group that is made next.
        """
        names = self.openings.get(group)
        if names is None or all(name in state["sites"] for name in names):
            return state
        program = self.program
        # Chains that nothing feeds begin without a run of the program, which costs a row each.
        free = [n for n in names if program is None or not program.ancestors(n)]
        state = self._begin(state, {name: None for name in free}, generator)
        if program is None:
            return state
        # A latent below an unfinished chain waits: its law is not known before its parents are.
        finished = {n for n, k in state["done"].items() if k == self.steps[n]}
        latents = [
            n for n in program.carried if n not in state["latents"] and program.above(n) <= finished
        ]
        bound = [name for name in names if name not in free]
        if not latents and not bound:
            return state
        return self._open_by_program(state, latents, bound, generator)

    def _begin(
        self, state: State, given: Mapping[str, Mapping[str, Tensor] | None], generator: Rng
    ) -> State:
        begun = {n: self.movers[n].init(*self.shape, generator, g) for n, g in given.items()}
        done = {**state["done"], **dict.fromkeys(begun, 0)}
        noisiest = {**state["noisiest"], **{n: self._flat(n, carry) for n, carry in begun.items()}}
        return {**state, "sites": {**state["sites"], **begun}, "done": done, "noisiest": noisiest}

    def _open_by_program(
        self, state: State, latents: list[str], bound: list[str], generator: Rng
    ) -> State:
        """Run the program once: it draws its latents and computes the conditions of its chains."""
        # The program is the only description there is of how conditions come about.
        program = self.program
        assert program is not None
        size = torch.Size(self.shape).numel()
        guess = {n: f[:, :, 0].flatten(0, 1) for n, f in self.guess(state, generator).items()}
        values = {name: self.sites[name].as_path(clean) for name, clean in guess.items()}
        values |= {name: value.flatten(0, 1) for name, value in state["latents"].items()}
        run = program.evaluate(values, size, self.place)
        drawn = {}
        for name in latents:
            value = run.value(name)
            assert value is not None  # latents are tensors
            drawn[name] = value.reshape(*self.shape, *value.shape[1:])
        # What they were drawn with is kept, and divided by: a law that was misread in part then
        # costs variance, never truth (importance sampling on the extended space).
        log_r = state["log_r"] + run.latent_log_density(latents).reshape(self.shape)
        given = {
            name: {c: x.reshape(*self.shape, *x.shape[1:]) for c, x in run.given(name).items()}
            for name in bound
        }
        state = {**state, "latents": {**state["latents"], **drawn}, "log_r": log_r}
        return self._begin(state, given, generator)

    def place(self, name: str, chain: ReverseChain) -> Tensor:
        """Return a guessed path of a chain that has not begun, under the condition it has here.

        :param chain: its distribution in this evaluation of the program.
        """
        # Any look-ahead telescopes away, so that the likeliest tokens are good enough.
        kernel = self.movers[name].kernel
        carry = kernel.init_carry(
            chain.batch_shape, chain.length, prompt=chain.prompt, given=chain.given
        )
        clean = kernel.completions(carry, 0).likeliest()
        return self.sites[name].as_path(kernel.flat({TOKENS: clean, **kernel.guess(carry, 0)}))

    # Moving.

    def foresee(self, state: State, group: int, generator: Rng) -> tuple[State, int]:
        """Return states that know the rounds of their chains, and the group that is made next.

        :param group: the group that would be; the last one is where the only chain is complete
            after it.
        """
        sites, found = {}, group
        for name, carry in state["sites"].items():
            keeper = self._keeper(name)
            if keeper is not None and state["done"][name] < self.steps[name]:
                sites[name], found = keeper.foresee(carry, group, generator)
        if not sites:
            return state, group
        return {**state, "sites": {**state["sites"], **sites}}, (
            found if len(self.sites) == 1 else group
        )

    def step(self, state: State, item: Item, generator: Rng) -> Moved:
        """Return states after one move of one site, and ``log K - log M``, ``(R, N)`` or 0."""
        carry, ratio = self.movers[item.site].move(state["sites"][item.site], item.k, generator)
        return self.moved(state, item, carry), ratio

    def moved(self, state: State, item: Item, carry: Carry) -> State:
        """Return states in which one site has another carry.

        :param item: the move that was made.
        :param carry: its carry after the move.
        """
        done = {**state["done"], item.site: item.k + 1}
        state = {**state, "sites": {**state["sites"], item.site: carry}, "done": done}
        return remember(state, self.sites[item.site]) if item.site in self.remembered else state

    def ends_with(self, state: State, site: str) -> bool:
        """Return whether nothing is left to be guessed once a site is complete.

        The elements of a plate of a program share one density, so that each waits for the others.
        """
        others = (name for name in self.sites if name != site)
        finished = all(state["done"].get(name) == self.steps[name] for name in others)
        return finished and not (self.source.is_program and self.sites[site].chain.batch_shape)

    # Looking ahead.

    def guess(
        self, state: State, generator: Rng, fill: FillTwist | None = None
    ) -> dict[str, Tensor]:
        """Return completions of every site that has begun, ``(R, N, F, *plates, L)``.

        :param fill: how they are completed.
        """
        twist, found = fill or self.fill, {}
        for name, carry in state["sites"].items():
            k = state["done"][name]
            if k == self.steps[name]:  # finished: all completions are the sequence itself
                clean = self._flat(name, carry)[:, :, None]
                found[name] = clean.expand(*clean.shape[:2], twist.num_fills, *clean.shape[3:])
            else:
                fills = self.movers[name].fills(twist, carry, k, generator)
                found[name] = self._completed(name, carry, k, fills)
        return found

    def _flat(self, name: str, carry: Carry) -> Tensor:
        return self.movers[name].kernel.flat(carry)

    def _completed(self, name: str, carry: Carry, k: int, fills: Tensor) -> Tensor:
        """Return completions of the tokens with the blocks beside them as they are guessed."""
        kernel = self.movers[name].kernel
        if not kernel.blocks:
            return fills
        lead = (*fills.shape[:2], fills.shape[2], *fills.shape[3:-1])
        beside = {
            block: x[:, :, None].expand(*lead, *kernel.blocks[block].event_shape)
            for block, x in kernel.guess(carry, k).items()
        }
        return kernel.flat({TOKENS: fills, **beside})

    def score(self, state: State, fills: Mapping[str, Tensor]) -> Tensor:
        """Return ``log h`` of states whose completions are known, float64 ``(R, N)``."""
        return per_particle(log_mean_exp(self.source.look(fills, state), 2))

    def submit(self, fills: Mapping[str, Tensor]) -> Pending:
        """Begin to score completions of a bare chain, and return what waits for ``log h``.

        :param fills: the completions.
        """
        source = self.source
        assert isinstance(source, ChainSource)
        pending = source.submit(fills)
        return lambda: per_particle(log_mean_exp(pending(), 2))

    def look(self, state: State, generator: Rng) -> Tensor:
        """Return ``log h`` of states by new completions, float64 ``(R, N)``."""
        return self.defended(state, self.score(state, self.guess(state, generator)))

    def defended(self, state: State, log_f: Tensor, log_law: Tensor | None = None) -> Tensor:
        """Return look-aheads over the floor of the twist, in the shape they have.

        :param log_f: look-aheads ``(R, N)``, or of children, ``(R, N, ..., s)``.
        :param log_law: log-probabilities of the children, where they are such.
        """
        if not self.fill.floor and self.levels is None:
            return log_f
        made = self.moves_made(state) + (log_law is not None)
        raised, each = log_f * self._power(made), log_f * self._power(made)
        if log_law is not None:
            each = torch.logsumexp(log_law + raised, -1, keepdim=True)

        def found() -> Tensor:
            log_c = mean_lookahead(each, state[LOG_BASE])
            if self.normalised:
                return log_c
            return log_c - mean_lookahead(torch.zeros_like(each), state[LOG_BASE])

        if self.levels is None:
            return floored(raised, found(), self.fill.floor)
        log_c = self.levels.constant(made, found)
        return self._floored(raised, log_c)

    def _floored(self, raised: Tensor, log_c: Tensor) -> Tensor:
        """Return look-aheads over one floor for all of a run's particles."""
        level = log_c.to(raised.device).reshape(len(log_c), *[1] * (raised.ndim - 1))
        return floored(raised, level, self.fill.floor) if self.fill.floor else raised

    @staticmethod
    def moves_made(state: State) -> int:
        """Return how many moves of single sites were made so far."""
        return sum(state["done"].values())

    def _power(self, made: int) -> float:
        if self.levels is None:
            return 1.0
        share, before = 0.0, 0
        for group in self.groups:
            share += min(max(made - before, 0), len(group)) / len(group)
            before += len(group)
        return self.levels.power(share, len(self.groups))

    # Looking ahead with other latents.

    def ahead(
        self, state: State, fills: Mapping[str, Tensor] | None = None, made: int | None = None
    ) -> Ahead | None:
        """Return the look-ahead of states as a function of their latents; None if it is none.

        :param fills: the completions behind the carried twist; None makes them again, which is
            possible where they are a function of the state.
        :param made: moves that were made when it was computed; None takes those made so far.
        """
        source, twist = self.source, self.fill
        if not isinstance(source, ProgramSource) or source.is_hinted:
            return None
        if fills is None and isinstance(twist, SampledFill):  # nobody has kept their noise
            return None
        at = self.moves_made(state) if made is None else made

        def rate(kept: State, latents: Mapping[str, Tensor]) -> Rated:
            return self.rated(kept, latents, at)

        drawn = len(state["latents"]) == len(source.program.latents)
        begun = len(state["sites"]) == len(self.sites)
        known = dict(self.guess(state, None) if fills is None else fills)
        return Ahead(known, rate, smooth=drawn and begun)

    def rated(self, fills: Mapping[str, Tensor], latents: Mapping[str, Tensor], made: int) -> Rated:
        """Return the look-ahead by completions with any latents.

        :param fills: the completions.
        :param latents: values of the latents that are drawn.
        :param made: moves made so far.
        """
        source = self.source
        assert isinstance(source, ProgramSource)
        log_joint, log_r = source.joint(fills, latents)
        raised = (log_mean_exp(log_joint, 2) - log_r) * self._power(made)
        known = None if self.levels is None else self.levels.log_c.get(made)
        return Rated(raised if known is None else self._floored(raised, known), log_r, {})

    def ends(
        self, state: State, power: float = 1.0, paths: Mapping[str, Tensor] | None = None
    ) -> Ahead:
        """Return the potential of finished states, to a power, as a function of their latents.

        :param power: the power.
        :param paths: whole paths of every site, where they are kept.
        """
        kept = {"sites": state["sites"], "paths": dict(paths or {})}

        def rate(kept: State, latents: Mapping[str, Tensor]) -> Rated:
            return self.rated_ends(kept["sites"], latents, kept["paths"], power)

        assert self.program is not None
        return Ahead(kept, rate, smooth=not self.program.redrawn)

    def rated_ends(
        self,
        sites: Mapping[str, Carry],
        latents: Mapping[str, Tensor],
        paths: Mapping[str, Tensor],
        power: float = 1.0,
    ) -> Rated:
        """Return the potential of finished carries, to a power, with any latents.

        :param sites: the carry of each chain.
        :param latents: values of all latents that are carried.
        :param paths: whole paths of every site, or nothing.
        :param power: the power.
        """
        source, here = self.source, {"sites": sites, "latents": dict(latents)}
        assert isinstance(source, ProgramSource)
        log_joint, log_r, values = source.ends(here, paths or None, strict=False)
        log_g = log_joint - log_r
        return Rated(tilt(log_g, power), log_r, {"log_g": log_g, "values": values})

    def final(self, state: State, paths: Mapping[str, Tensor] | None = None) -> State:
        """Return finished states that know ``log_g`` and the values of all sites (``values``).

        :param paths: whole paths of every site, where they are kept.
        """
        log_g, values = self.source.final(state, paths)
        return {**state, "log_g": log_g, "values": values}

    # Paths.

    def record(self, state: State) -> dict[str, Tensor]:
        """Return what is kept of the states after every group, of chains that keep nothing."""
        return {n: self._state(state, n) for n in self.sites if self._keeper(n) is None}

    def _keeper(self, name: str) -> BoundFeynmanKac | None:
        """Return the mover of a chain whose carry holds its path, if it does."""
        mover = self.movers[name]
        return mover if isinstance(mover, BoundFeynmanKac) and mover.knows_path else None

    def _state(self, state: State, name: str) -> Tensor:
        if name in state["sites"]:
            return self._flat(name, state["sites"][name])
        chain = self.sites[name].chain
        shape = (*self.shape, *chain.batch_shape, chain.event_shape[-1])
        discrete = are_discrete(chain.kernel.blocks)
        kind = torch.uint8 if discrete else torch.float64
        return torch.zeros(shape, dtype=kind, device=self.device)

    def own_paths(self, state: State, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the path of every chain, its own steps alone, ``(R, N, *plates, T + 1, L)``.

        :param recorded: states after every group, the start first.
        """
        kept = {n: m for n in self.sites if (m := self._keeper(n)) is not None}
        found = {n: mover.path(state["sites"][n]) for n, mover in kept.items()}
        for name, path in recorded.items():
            # The record has an entry for every group, also for those that moved other chains.
            own = [
                g + 1 for g, group in enumerate(self.groups) if any(i.site == name for i in group)
            ]
            first = state["noisiest"][name].to(path.dtype)
            found[name] = torch.cat([first[..., None, :], path[..., own, :]], -2)
        return {name: found[name] for name in self.sites if name in found}

    @staticmethod
    def gather(state: State, ancestors: Tensor) -> State:
        """Return the states of the chosen ancestors.

        :param ancestors: int64 ``(R, N')``.
        """
        gathered: State = take_particles(state, ancestors)
        return gathered


def chain_mover(
    site: ChainSite,
    fill: Any,
    proposal: Any = None,
    *,
    max_rows: int | None = None,
    on_events: bool = False,
) -> BoundFeynmanKac:
    """Return the mover of a site by its own chain, or by a proposal.

    :param fill: the twist whose noise travels with the particles, or None.
    :param proposal: how particles move; None is the chain itself.
    :param max_rows: largest number of rows sent to the network at once, None for what suits it.
    :param on_events: go from reveal to reveal where that can be done.
    """
    model = FeynmanKac(site.chain, no_potential, twist=fill, proposal=proposal)
    return model.bind(max_rows=max_rows, on_events=on_events)


def no_potential(x0: Tensor) -> Tensor:
    """Return zeros: movers of sites have nothing to weigh.

    :param x0: int64 ``(*batch, L)``.
    """
    return torch.zeros(x0.shape[:-1], dtype=torch.float64, device=x0.device)
