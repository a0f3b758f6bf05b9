"""What weighs particles: a potential of one chain, or everything a program scores.

Both answer the same three questions about a state: what do its completions promise, what would
each child promise, and what is it worth at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_diffusion.deferred import refuse_if
from ppl_diffusion.distributed import shared_rows
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError, PotentialError
from ppl_diffusion.kernels.base import GIVEN, Kernel
from ppl_diffusion.kernels.blocks import TOKENS, tokens_of
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS, AbstractPotential, Potential
from ppl_diffusion.programs.reading import Program
from ppl_diffusion.programs.run import ProgramRun, same_values
from ppl_diffusion.programs.sites import ChainSite
from ppl_diffusion.programs.tracking import Place
from ppl_diffusion.row_memory import RowMemory
from ppl_diffusion.rows import DistinctRows
from ppl_diffusion.smc.evaluated_potential import EvaluatedPotential, Pending, UncachedPotential
from ppl_diffusion.smc.feynman_kac import ends, per_particle
from ppl_diffusion.smc.law import Law, Tilt, digest
from ppl_diffusion.smc.twists import log_mean_exp

MAX_ROWS = 4096
"""Particles that a program is evaluated for at once."""

Fills = Mapping[str, Tensor]
"""Completions of every open site, int64 ``(R, N, F, *plates, L)``."""

State = dict[str, Any]
"""A particle's state: ``sites`` (the carry of each chain), ``latents``, ``log_r``, and slots."""

Rng = torch.Generator | None
"""Source of randomness; None is the global one."""

Moved = tuple[State, Tensor | float]
"""States after a move, and the log of what they are weighed by, ``(R, N)`` or a number."""


class Changes(NamedTuple):
    """Tokens that positions of one site might be set to, each of them alone.

    :param site: name of the chain site.
    :param positions: int64 ``(R, N, *plates, m)``.
    :param tokens: int64 ``(R, N, *plates, m, s)``.
    """

    site: str
    positions: Tensor
    tokens: Tensor


PotentialLike = AbstractPotential | Callable[[Tensor], Tensor]


class Source(ABC):
    """What is sampled: its chains, and how states are weighed.

    :ivar chains: the chain sites, in program order.
    :ivar program: the Pyro program that it reads, or None.
    """

    chains: list[ChainSite]
    program: Program | None = None

    @property
    def is_program(self) -> bool:
        """Whether it is a Pyro program."""
        return self.program is not None

    def is_free(self, site: ChainSite) -> bool:
        """Return whether a chain depends on nothing that is drawn before it."""
        return self.program is None or not self.program.ancestors(site.name)

    @property
    @abstractmethod
    def law(self) -> Law:
        """What weighted particles are exact for."""

    @property
    @abstractmethod
    def num_calls(self) -> int:
        """Sequences, or particles of a program, that were asked about so far."""

    @abstractmethod
    def look(self, fills: Fills, state: State, *, last: bool = False) -> Tensor:
        """Return what completions promise, float64 ``(R, N, F, *elements)``.

        Elements are the plates of a bare chain, whose potentials multiply, and nothing for a
        program, whose density is that of all of them.

        :param last: they are no guesses but the ends themselves, which may be forbidden.
        """

    @abstractmethod
    def children(
        self, fills: Fills, changes: Changes, state: State, *, last: bool = False
    ) -> Tensor:
        """Return what completions promise with one position set, float64 ``(R, N, *plates, m, s)``.

        :param changes: what is set, all else being as completed.
        :param last: nothing is left to be guessed then.
        """

    @abstractmethod
    def final(
        self, state: State, paths: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``log G`` of finished states, float64 ``(R, N)``, and the values of all sites.

        :param paths: whole paths of every site, ``(R, N, *plates, T + 1, L)``, where they are kept.
        """


class ChainSource(Source):
    """One chain and one potential: a program of one site, which nobody has to read.

    :param chain: the reverse chain.
    :param cache: ask the potential once per distinct sequence.
    """

    def __init__(
        self, chain: ReverseChain, potential: PotentialLike, *, cache: bool = True
    ) -> None:
        self.chains = [ChainSite("x", chain)]
        self.given = as_potential(potential)
        self.potential = (EvaluatedPotential if cache else UncachedPotential)(self.given)

    @property
    def law(self) -> Law:
        """``p(path) G(x0)``."""
        return Law.tilted([self.chains[0].base()], [Tilt.by(self.given)])

    @property
    def num_calls(self) -> int:
        """Sequences the potential was asked about."""
        return self.potential.num_calls

    def look(self, fills: Fills, state: State, *, last: bool = False) -> Tensor:
        """Ask the potential about every completion."""
        x0 = self._tokens(fills["x"])
        if last:
            return self.potential(x0)
        return require_finite(self.potential.lookahead(x0), self.given.name)

    def submit(self, fills: Fills) -> Pending:
        """Begin to ask the potential about every completion; the answer is that of :meth:`look`.

        :param fills: the completions.
        """
        pending = self.potential.submit(self._tokens(fills["x"]))
        return lambda: require_finite(pending(), self.given.name)

    def children(
        self, fills: Fills, changes: Changes, state: State, *, last: bool = False
    ) -> Tensor:
        """Ask about all children's completions in one batch."""
        _, positions, tokens = changes
        if last:
            unfinished = state["sites"]["x"]["tokens"][..., None, None, :]
            return self.potential(with_sites(unfinished, positions[..., None], tokens))
        each = self._tokens(fills["x"]).movedim(2, -2)[..., None, None, :, :]
        rows = with_sites(each, positions[..., None, None], tokens[..., None])
        values = require_finite(self.potential.lookahead(rows), self.given.name)
        return log_mean_exp(values, -1)

    def final(
        self, state: State, paths: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Ask the potential about the clean sequences."""
        carry = state["sites"]["x"]
        return per_particle(self.potential(carry[TOKENS])), ends(self._kernel, carry)

    @property
    def _kernel(self) -> Kernel:
        return self.chains[0].chain.kernel

    def _tokens(self, clean: Tensor) -> Tensor:
        return tokens_of(self._kernel.split(clean))


class ProgramSource(Source):
    """A program: its log-density of everything that is not a chain.

    :param program: the program.
    :param holding: chain sites whose clamped tokens particles and guesses hold.

    :ivar place: gives chains that have not begun a path, guessed under their conditions.
    """

    program: Program
    place: Place | None = None

    def __init__(self, program: Program, holding: set[str]) -> None:
        self.program, self.chains = program, program.chains
        self.holding = holding
        self._surrogates = {
            site.name: EvaluatedPotential(as_potential(site.steering.potential))
            for site in program.chains
            if site.steering is not None
        }
        self._memory = RowMemory(torch.int64)

    @property
    def law(self) -> Law:
        """``p(path) G(x0)`` with everything the program scores as ``log G``."""
        program = self.program
        chains = [site.base(drawn=bool(program.ancestors(site.name))) for site in self.chains]
        tilt = Tilt(f"the program {program.name}", digest=digest(program.observed))
        return Law.tilted(chains, [tilt], program.latents)

    @property
    def num_calls(self) -> int:
        """Particles the program was evaluated for, its reading included, and hints."""
        hints = sum(surrogate.num_calls for surrogate in self._surrogates.values())
        return self.program.num_rows + hints

    def look(self, fills: Fills, state: State, *, last: bool = False) -> Tensor:
        """Score every completion as a guess; steering hints take the place of the program."""
        if self._surrogates and not last:  # cheaper than the program, and free to be wrong
            return self._surrogate(fills)
        held, penalty = (dict(fills), 0.0) if last else self._held(fills)
        shape = next(iter(fills.values())).shape[:3]
        latents = {n: _repeat(x, shape[2]).flatten(0, 2) for n, x in state["latents"].items()}
        rows = {name: x.flatten(0, 2) for name, x in held.items()}
        value = self._guessed(rows, latents, last=last).reshape(shape) + penalty
        # The density counts the latents' own law, which they were drawn with already.
        return value - state["log_r"][..., None] if latents else value

    def children(
        self, fills: Fills, changes: Changes, state: State, *, last: bool = False
    ) -> Tensor:
        """Score the whole program with one position of one site set, all else at its guess."""
        site, positions, tokens = changes
        own = fills[site]  # (R, N, F, *plates, L)
        runs, size, num_fills, *plates, length = own.shape
        elements = torch.Size(plates).numel()
        where = positions.reshape(runs, size, elements, -1)
        values = tokens.reshape(runs, size, elements, where.shape[-1], -1)
        offset = torch.arange(elements, device=own.device)[:, None] * length
        flat = own.reshape(runs, size, 1, 1, 1, num_fills, elements * length)
        changed = with_sites(flat, (where + offset)[..., None, None], values[..., None])
        batch = changed.shape[2:5]  # (E, m, s)
        family = batch.numel()
        moved = {site: changed.reshape(runs, size * family, num_fills, *plates, length)}
        parent = torch.arange(size, device=own.device).repeat_interleave(family)
        others = {name: x[:, parent] for name, x in fills.items() if name != site}
        repeated = {
            "latents": {n: x[:, parent] for n, x in state["latents"].items()},
            "log_r": state["log_r"][:, parent],
        }
        every = {name: moved[name] if name in moved else others[name] for name in fills}
        found = log_mean_exp(self.look(every, repeated, last=last), 2).reshape(runs, size, *batch)
        return found.reshape(*positions.shape, -1)

    def final(
        self, state: State, paths: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score the clean sequences, or whole paths where the program reads them."""
        log_joint, _, values = self.ends(state, paths)
        return (log_joint - state["log_r"] if state["latents"] else log_joint), values

    def ends(
        self, state: State, paths: Mapping[str, Tensor] | None = None, *, strict: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the density of latents and observations, that of latents, and all values.

        :param paths: as in :meth:`final`.
        :param strict: refuse latents without a density; otherwise it is ``-inf``, and rows that
            are equal are asked about each, so that gradients are their own.
        :returns: float64 ``(R, N)`` each.
        """
        program = self.program
        latents = {name: x.flatten(0, 1) for name, x in state["latents"].items()}
        clean = {s.name: s.chain.kernel.flat(state["sites"][s.name]) for s in self.chains}
        shape = next(iter(clean.values())).shape[:2]
        x0 = {name: x.flatten(0, 1) for name, x in clean.items()}
        whole = paths is not None and bool(program.reads | program.shows)
        # Whole paths are seldom equal, and latents drawn here differ where sequences do not.
        every = whole or bool(program.redrawn) or not strict
        first, inverse, _ = self._distinct(x0, latents, keep_all=every)
        chains = {n: p.flatten(0, 1) for n, p in paths.items()} if whole and paths else x0
        known = {name: value[first] for name, value in (chains | latents).items()}
        chunks = torch.arange(len(first), device=first.device).split(MAX_ROWS)
        parts = [self._finished(known, c, first[c], state, whole, strict) for c in chunks]
        log_joint, log_r = (torch.cat(x)[inverse] for x in list(zip(*parts, strict=True))[:2])
        log_joint = self._within_clamps(log_joint, x0).reshape(shape)
        names = [n for n in parts[0][2] if all(n in part[2] for part in parts)]
        values = {n: torch.cat([part[2][n] for part in parts])[inverse] for n in names}
        unread = program.shows if not whole else frozenset()
        kept = {n: v.reshape(*shape, *v.shape[1:]) for n, v in values.items() if n not in unread}
        return log_joint, log_r.reshape(shape), kept

    def joint(self, fills: Fills, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the density of latents with their completions, and that of latents alone.

        Nothing is remembered, so that gradients are those of each particle; what has no density
        is ``-inf`` or NaN.

        :param fills: completions.
        :param latents: any values of the latents that are drawn, ``(R, N, ...)``.
        :returns: float64 ``(R, N, F)`` and ``(R, N)``.
        """
        held, penalty = self._held(fills)
        shape = next(iter(fills.values())).shape[:3]
        repeated = {n: _repeat(x, shape[2]).flatten(0, 2) for n, x in latents.items()}
        known = {**{name: x.flatten(0, 2) for name, x in held.items()}, **repeated}
        chunks = torch.arange(shape.numel(), device=self.program.device).split(MAX_ROWS)
        parts = [self._rated(known, chunk, list(latents)) for chunk in chunks]
        log_joint, log_r = (torch.cat(x).reshape(shape) for x in zip(*parts, strict=True))
        return log_joint + penalty, log_r[..., 0]

    def _rated(
        self, known: Mapping[str, Tensor], part: Tensor, latents: list[str]
    ) -> tuple[Tensor, Tensor]:
        given = self._as_paths({name: value[part] for name, value in known.items()})
        run = self.program.evaluate(given, len(part), self.place, strict=False)
        return run.log_density(latents, lookahead=True), run.latent_log_density(latents)

    @property
    def is_hinted(self) -> bool:
        """Whether steering hints take the place of the program in look-aheads."""
        return bool(self._surrogates)

    def _finished(
        self,
        known: Mapping[str, Tensor],
        part: Tensor,
        rows: Tensor,
        state: State,
        whole: bool,
        strict: bool,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        given = {name: value[part] for name, value in known.items()}
        given = given if whole else self._as_paths(given)
        run = self.program.evaluate(given, len(part), strict=strict)
        self._require_same_conditions(run, rows, state)
        latents = list(state["latents"])
        values = run.samples(leave_out=self.program.chain_names)
        return run.log_density(latents), run.latent_log_density(latents), values

    def _require_same_conditions(self, run: ProgramRun, rows: Tensor, state: State) -> None:
        """Refuse particles that moved under another condition than they have in the end."""
        for site in self.chains:
            carried = state["sites"][site.name].get(GIVEN) or {}
            for name, value in run.given(site.name).items():
                # Carries of whole sequences hold tokens alone: they moved by the chain's own.
                own = carried[name].flatten(0, 1)[rows] if carried else site.chain.given[name]
                # A network rounds otherwise on another number of rows, so equal is not the same.
                if not same_values(own.to(value).expand_as(value), value):
                    raise CapabilityError(
                        f"{self.program.owner}: particles of the chain {site.name!r} of "
                        f"{self.program.name} moved under another {name!r} than the program gives "
                        "them in the end; let it depend on finished values, through tensors."
                    )

    def _within_clamps(self, log_g: Tensor, x0: Mapping[str, Tensor]) -> Tensor:
        for site in self.chains:
            if site.clamp is not None:
                held = site.clamp.holds(site.chain.tokens(x0[site.name]))
                inside = held.flatten(1).all(-1) if held.ndim > 1 else held
                log_g = log_g.masked_fill(~inside.to(log_g.device), -torch.inf)
        return log_g

    def _held(self, fills: Fills) -> tuple[dict[str, Tensor], Tensor | float]:
        """Return guesses with clamped tokens held, or what those cost that do not hold them."""
        held: dict[str, Tensor] = dict(fills)
        penalty: Tensor | float = 0.0
        for site in self.chains:
            clamp = site.clamp
            if clamp is None or site.name not in held:
                continue
            guess, beside = held[site.name].tensor_split([site.chain.length], -1)
            tokens, mask = clamp.beside(guess)
            if site.name in self.holding:
                kept = torch.where(mask, tokens.to(guess.dtype), guess)
                held[site.name] = torch.cat([kept, beside], -1)
                continue
            wrong = ((guess != tokens) & mask).flatten(3).sum(-1)
            penalty = penalty + FORBIDDEN_GUESS * wrong.to(torch.float64)
        return held, penalty

    def _surrogate(self, fills: Fills) -> Tensor:
        some = next(iter(fills.values()))
        total = torch.zeros(some.shape[:3], dtype=torch.float64, device=some.device)
        # Chains that wait for another one to end have no completions yet, and nothing to add.
        for name in self._surrogates.keys() & fills.keys():
            tokens = self._chain(name).tokens(fills[name])
            value = self._surrogates[name].lookahead(tokens)  # (R, N, F, *plates)
            total = total + (value.flatten(3).sum(-1) if value.ndim > 3 else value)
        return total

    def _chain(self, name: str) -> ReverseChain:
        return next(site.chain for site in self.chains if site.name == name)

    def _guessed(
        self, rows: Mapping[str, Tensor], latents: Mapping[str, Tensor], *, last: bool
    ) -> Tensor:
        """Score guesses, each distinct one once where nothing is drawn anew with them."""
        # What is drawn in place is fresh noise: equal rows are then no equal questions.
        read = set(self.program.latents) - self.program.unread
        drawn = not read <= latents.keys() or len(rows) < len(self.chains)
        first, inverse, hashes = self._distinct(rows, latents, keep_all=drawn)
        known = {**rows, **latents}
        if drawn or last:
            values = self._ask_in_parts(known, first, latents, last)
        else:
            keys = self._keys(rows, latents)[first]
            values, remembered = self._memory.find(keys, hashes)
            new = (~remembered).nonzero()[:, 0]
            if len(new):
                values[new] = answers = self._shared(known, first[new], latents)
                self._memory.add(keys[new], hashes[new], answers)
        found = values[inverse]
        return self._within_clamps(found, rows) if last else found

    def _shared(
        self, known: Mapping[str, Tensor], asked: Tensor, latents: Mapping[str, Tensor]
    ) -> Tensor:
        """Ask about guesses that depend on nothing but themselves, with other processes if any."""
        before = self.program.num_rows
        values, _ = shared_rows(
            len(asked),
            lambda part: self._ask_in_parts(known, asked[part], latents, last=False),
            asked.device,
        )
        self.program.num_rows = before + len(asked)
        return values

    def _ask_in_parts(
        self, known: Mapping[str, Tensor], asked: Tensor, latents: Mapping[str, Tensor], last: bool
    ) -> Tensor:
        parts = [self._ask(known, part, latents, last) for part in asked.split(MAX_ROWS)]
        return torch.cat(parts)

    def _ask(
        self, known: Mapping[str, Tensor], part: Tensor, latents: Mapping[str, Tensor], last: bool
    ) -> Tensor:
        given = self._as_paths({name: value[part] for name, value in known.items()})
        run = self.program.evaluate(given, len(part), self.place)
        return run.log_density(list(latents), lookahead=not last)

    def _as_paths(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Repeat clean sequences as if each were a whole path, without a copy."""
        paths = {s.name: s.as_path(values[s.name]) for s in self.chains if s.name in values}
        return {**values, **paths}

    def _distinct(
        self, rows: Mapping[str, Tensor], latents: Mapping[str, Tensor], *, keep_all: bool
    ) -> DistinctRows:
        if keep_all:
            tokens = next(iter(rows.values()))
            every = torch.arange(len(tokens), device=tokens.device)
            return DistinctRows(every, every, every)
        return DistinctRows.of(self._keys(rows, latents))

    def _keys(self, rows: Mapping[str, Tensor], latents: Mapping[str, Tensor]) -> Tensor:
        """Return the flat view that a cache needs: tokens, and latents by value."""
        # By tokens alone, particles with other latents would get the first one's answer.
        return torch.cat([bits(x) for x in [*rows.values(), *latents.values()]], -1)


def bits(value: Tensor) -> Tensor:
    """Return values as rows of whole numbers that are equal where they are, int64 ``(B, n)``.

    :param value: ``(B, ...)`` of any real type.
    """
    flat = value.reshape(len(value), -1)
    if not flat.is_floating_point():
        return flat.to(torch.int64)
    return flat.to(torch.float64).contiguous().view(torch.int64)


def with_sites(x: Tensor, sites: Tensor, values: Tensor) -> Tensor:
    """Return copies of sequences with one position set in each, int64 ``(*C, L)``.

    :param x: sequences, broadcastable to ``(*C, L)``.
    :param sites: int64, broadcastable to ``C``.
    :param values: int64, broadcastable to ``C``.
    """
    shape = torch.broadcast_shapes(x.shape[:-1], sites.shape, values.shape)
    index, value = (t.expand(shape)[..., None] for t in (sites, values))
    return x.expand(*shape, x.shape[-1]).scatter(-1, index, value.to(x.dtype))


def require_finite(value: Tensor, name: str) -> Tensor:
    """Return look-aheads after checking that they are finite."""
    refuse_if(
        ~torch.isfinite(value).all(),
        lambda: PotentialError(
            f"the look-ahead of {name} is not finite for {int((~value.isfinite()).sum())} of "
            f"{value.numel()} guesses, which would exclude tokens the target may need; return a "
            "penalty instead of -inf."
        ),
    )
    return value


def as_potential(potential: PotentialLike) -> AbstractPotential:
    """Return a potential, made from a function where it is one.

    :param potential: a potential, or a function ``x0 (*batch, L) -> log G (*batch,)``.
    """
    return potential if isinstance(potential, AbstractPotential) else Potential(potential)


def _repeat(value: Tensor, num_fills: int) -> Tensor:
    return value[:, :, None].expand(*value.shape[:2], num_fills, *value.shape[2:])
