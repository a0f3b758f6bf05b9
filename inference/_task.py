"""What a particle method is asked to do: one chain, one potential, and a name for the result.

Every program of this package takes either a reverse chain with a potential, or a Pyro program. For
the latter the potential is the program itself: its log-density of everything that is not a chain,
given the clean sequences. Several sequences lie side by side in one row, which one chain moves
(:mod:`ppl_diffusion.inference._joint`); other latents are drawn once per particle
(:mod:`ppl_diffusion.inference._latents`), and the row says which draw is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference._arguments import require_program
from ppl_diffusion.inference._joint import Layout
from ppl_diffusion.inference._latents import CarriedLatents
from ppl_diffusion.inference._path_reading import require_sequences_only
from ppl_diffusion.inference._program import Program, ProgramRun
from ppl_diffusion.inference._sites import held_positions
from ppl_diffusion.inference.smc import _seeded as seeded  # one way of seeding for all programs
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel
from ppl_diffusion.kernels.base import Kernel
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS, AbstractPotential, Potential
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.feynman_kac import Proposal, per_particle
from ppl_diffusion.smc.posterior import ParticlePosterior

__all__ = ["ProgramPotential", "Task", "as_task", "seeded"]

MAX_ROWS = 4096
"""Sequences a program is evaluated for at once."""
MAX_PARTICLES = 2**16
"""Particles that a program with latents can tell apart unless it is told how many there will be."""

PotentialLike = AbstractPotential | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """A chain and the potential it is tilted by.

    :param chain: the reverse chain.
    :param potential: ``log G(x0)``.
    :param name: what targets call it: the potential's name, or ``the program assay``.
    """

    chain: ReverseChain
    potential: AbstractPotential
    name: str

    @property
    def is_program(self) -> bool:
        """Whether the potential is a Pyro program."""
        return isinstance(self.potential, ProgramPotential)

    @property
    def target(self) -> str:
        """The law weighted particles of this task are exact for, in words."""
        changes = "; ".join(self.chain.kernel.changes)
        under = f" under {changes}" if changes else ""
        what = self.potential.words if isinstance(self.potential, ProgramPotential) else ""
        return (
            f"p(path) * G(x0) of the {self.chain.num_steps}-step reverse chain{what}{self.held}"
            f"{under}, normalised, with log G = {self.name}; log_evidence estimates the log of its "
            "normalising constant"
        )

    @property
    def held(self) -> str:
        """The clamped and prompted positions, to follow the chain in a sentence."""
        chains: list[tuple[ReverseChain, ClampProposal | None]] = [(self.chain, None)]
        if isinstance(self.potential, ProgramPotential):
            chains = [(site.chain, site.clamp) for site in self.potential.program.chains]
        return "".join(f", {words}" for words in held_positions(chains))

    def named(self, target: str) -> str:
        """Return a target that says what is held, where it does not yet.

        :param target: a law in words.
        """
        held = self.held
        return target if held in target else f"{target}; the chain is{held.removeprefix(',')}"

    def proposal(self, owner: str, given: Any = None) -> Any:
        """Return what particles are proposed by: an option of the method, or the site's twist.

        :param owner: what refusals call the method.
        :param given: the option: a name, a kernel, a proposal or None.
        :raises CapabilityError: if there are both, or the option is a kernel of one sequence out of
            several.
        """
        if not isinstance(self.potential, ProgramPotential):
            return given
        own = self.potential.proposal
        if isinstance(given, Kernel) and not self.potential.layout.plain:
            raise CapabilityError(
                f"{owner}: {self.name} has several sequences, or other latents, and a kernel moves "
                "one sequence; propose by a function of the whole row, or by nothing."
            )
        if own is not None and given is not None:
            raise CapabilityError(
                f"{owner}: {self.name} is twisted, and a proposal is given besides; leave one out."
            )
        return given if own is None else own

    def guided_proposal(self, owner: str, given: Any = None) -> Any:
        """Return :meth:`proposal`, or where there is none a move that holds clamped tokens.

        For methods that move by the chain unless they are told otherwise.

        :param owner: what refusals call the method.
        :param given: the option: a kernel, a proposal or None.
        """
        chosen = self.proposal(owner, given)
        if chosen is not None or not isinstance(self.potential, ProgramPotential):
            return chosen
        return self.potential.hold()

    def refuse_twist(self, owner: str) -> None:
        """Refuse a program with a twisted site, for methods that move particles their own way.

        :param owner: what the refusal calls the method.
        :raises CapabilityError: if its site is twisted.
        """
        if self.proposal(owner) is not None:
            raise CapabilityError(
                f"{owner} moves particles its own way and has no use for the twist of {self.name}; "
                "take the twist off, or use TwistedSampler, FKSteering or SMC."
            )

    def started(self, states: Tensor) -> Tensor:
        """Return the states at the start, each particle with its own draw of other latents.

        :param states: int64 ``(R, N, *plates, L)``, or whole paths ``(R, N, T + 1, L)``.
        """
        if isinstance(self.potential, ProgramPotential):
            return self.potential.started(states)
        return states

    def samples(self, x0: Tensor, path: Tensor | None = None) -> dict[str, Tensor]:
        """Return the values of all sites, each ``(R, N, ...)``: ``x0`` alone for a bare chain.

        :param x0: clean sequences, int64 ``(R, N, *plates, L)``.
        :param path: whole paths, ``(R, N, *plates, T + 1, L)``, where they were stored.
        """
        if isinstance(self.potential, ProgramPotential):
            return self.potential.samples(x0, path)
        return {"x0": x0}

    def shown(self, states: Tensor, *, whole_path: bool = False) -> Tensor:
        """Return the states as posteriors show them: those of the first site of a program.

        :param states: int64 ``(R, N, *plates, L)``, or whole paths.
        :param whole_path: whether they are paths.
        """
        if isinstance(self.potential, ProgramPotential):
            return self.potential.layout.first(states, whole_path=whole_path)
        return states

    def posterior(
        self,
        trace: SMCTrace,
        *,
        path: Tensor | None = None,
        num_evaluations: int,
        num_potential_calls: int,
        settings: Mapping[str, Any],
        seconds: float,
        target: str | None = None,
        exact: bool = True,
    ) -> ParticlePosterior:
        """Return what a run of :func:`~ppl_diffusion.smc.smc_loop` on this task left behind.

        :param trace: the run.
        :param path: paths of the final particles, where the run kept no history of them.
        :param num_evaluations: network rows evaluated.
        :param num_potential_calls: sequences the potential was asked about.
        :param settings: what was chosen, in JSON types.
        :param seconds: wall time.
        :param target: the declared law, where it is not :attr:`target`.
        :param exact: whether the weights are exact for it.
        """
        tokens, fields = trace.carry["tokens"], trace.posterior_fields()
        known = fields.pop("compact_path")
        path = known if path is None else path
        return ParticlePosterior(
            x0=self.shown(tokens),
            times=torch.as_tensor(self.chain.kernel.times),
            samples=self.samples(tokens, None if path is None else path.to(torch.int64)),
            num_evaluations=num_evaluations,
            num_potential_calls=num_potential_calls,
            exact=exact,
            target=target or self.target,
            settings={"num_steps": self.chain.num_steps, **settings},
            seconds=seconds,
            is_program=self.is_program,
            compact_path=None if path is None else self.shown(path, whole_path=True),
            **fields,
        )


def as_task(
    target: ReverseChain | Callable[..., Any],
    potential: PotentialLike | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    max_particles: int = MAX_PARTICLES,
    owner: str = "inference",
) -> Task:
    """Read what is to be sampled.

    :param target: a reverse chain, or a Pyro program. A :func:`~ppl_diffusion.handlers.clamp` on a
        site becomes a hard constraint of the potential, and methods that move by the chain hold
        it; the potential of an ``infer={"steer": ...}`` hint serves as the look-ahead. With several
        sequences, or other latents, the task's chain is that of the row: functions of the state
        see it whole.
    :param potential: ``log G`` of a bare chain; None for a program, which is its own potential.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :param max_particles: particles, over all runs, that a program with latents may start.
    :param owner: what errors call the method.
    :raises TypeError: if a bare chain comes without a potential or with arguments.
    :raises ValueError: if a program comes with a potential, or has no chain site.
    :raises CapabilityError: if the chains of a program cannot be run as one, or the law of a
        latent depends on the sequences.
    """
    if not isinstance(target, ReverseChain):
        require_program(owner, target)
        if potential is not None:
            raise ValueError(
                f"{owner}: a program is its own potential; write the potential into it with "
                "ppl_diffusion.potentials.factor."
            )
        program = Program(target, args, kwargs or {}, owner=owner)
        return program_task(program, max_particles=max_particles)
    if potential is None:
        raise TypeError(
            "a bare chain needs a potential; pass one, such as Reward(dock, temperature=0.1)."
        )
    if args or kwargs:
        raise TypeError("run takes no arguments of a program here: the target is a bare chain.")
    known = potential if isinstance(potential, AbstractPotential) else Potential(potential)
    return Task(target, known, known.name)


def program_task(program: Program, *, max_particles: int = MAX_PARTICLES) -> Task:
    """Return the task a program sets.

    :param program: the program with its arguments.
    :param max_particles: particles, over all runs, that it may start with latents of their own.
    :raises CapabilityError: as :func:`as_task`.
    """
    known = ProgramPotential(program, max_particles=max_particles)
    return Task(known.layout.chain, known, known.name)


class ProgramPotential(AbstractPotential):
    """A program's log-density of everything but its chains, as a potential of one row.

    The row holds all sequences side by side and, behind them, the number of the particle's draw of
    the other latents; for a program with one chain and nothing else it is the sequence.

    :param program: the program with its arguments.
    :param max_particles: particles, over all runs, that may start with draws of their own.
    :raises CapabilityError: if the program is no function of one row, or reads whole paths.
    """

    def __init__(self, program: Program, *, max_particles: int = MAX_PARTICLES) -> None:
        self.program, self.latents = program, CarriedLatents(program)
        num_rows = max_particles if self.latents.names else 0
        self.layout = Layout(program.chains, num_rows, program.name)
        self.name = f"the program {program.name}"
        self._clamp, self._holding = self.layout.clamp, False
        self._surrogates = {
            site.name: _as_potential(site.steering.potential)
            for site in program.chains
            if site.steering is not None
        }
        self._require_movable()
        self._reading_paths = require_sequences_only(program)

    def _require_movable(self) -> None:
        twisted = [site.name for site in self.program.chains if site.twist is not None]
        if twisted and not self.layout.plain:
            raise CapabilityError(
                f"{self.program.name}: the site {twisted[0]!r} is twisted, but it is not alone in "
                "the program (several sequences, or other latents); use "
                "ppl_diffusion.inference.SMC, which moves every chain by itself."
            )

    @property
    def proposal(self) -> Proposal | None:
        """The twist of the one site, or None."""
        return self.program.chains[0].twist

    def hold(self) -> ClampProposal | None:
        """Return the proposal that holds the clamped tokens, and let guesses hold them from now on.

        None where nothing is clamped, or tokens may be masked again, which a clamp cannot follow.
        """
        kernel = self.layout.chain.kernel
        self._holding = self._clamp is not None and (
            isinstance(kernel, OrderedKernel)
            or (isinstance(kernel, InterpolatingKernel) and kernel.ancestral)
        )
        return self._clamp if self._holding else None

    @property
    def words(self) -> str:
        """What the chain is that of, to follow "the chain", and what else is drawn."""
        names = ", ".join(self.latents.names)
        return self.layout.words + (f", together with the latents {names}" if names else "")

    def started(self, states: Tensor) -> Tensor:
        """Return states whose particles have new draws of the other latents.

        :param states: int64 ``(R, N, L)``, or whole paths ``(R, N, T + 1, L)``.
        """
        if not self.latents.names:
            return states
        shape = states.shape[:2]
        drawn = self.latents.draw(self._on_any_sequences, shape.numel())
        return self.layout.labelled(states, drawn.reshape(shape))

    def _on_any_sequences(self, count: int) -> ProgramRun:
        """Run the program for new particles: the law of what is carried depends on no sequence."""
        sizes = [site.chain.kernel.process.vocab_size for site in self.program.chains]
        rows = torch.randint(min(sizes), (count, self.layout.chain.length))
        return self.program.evaluate(self.layout.as_paths(rows), count)

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return the program's log-density given clean rows, ``-inf`` outside a clamp."""
        value = self._where_legal(x0, self._density, -torch.inf)
        clamp = self._clamp
        return value if clamp is None else value.masked_fill(~clamp.holds(x0), -torch.inf)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the program's (or its steering hints') finite look-ahead."""
        guess = self._surrogate if self._surrogates else self._density_of_guesses
        clamp = self._clamp
        if clamp is not None and self._holding:
            x0, clamp = torch.where(clamp.mask, clamp.tokens, x0), None
        value = self._where_legal(x0, guess, FORBIDDEN_GUESS)
        return value if clamp is None else value + FORBIDDEN_GUESS * _mismatches(clamp, x0)

    def samples(self, x0: Tensor, path: Tensor | None = None) -> dict[str, Tensor]:
        """Return the values of the program's sites, each ``(R, N, ...)``.

        :param x0: clean rows, int64 ``(R, N, L)``.
        :param path: whole paths, ``(R, N, T + 1, L)``; without them, or where they are not paths
            of the program's own chains, the chain sites are left out, and what reads them.
        """
        rows, shape = x0.flatten(0, 1), x0.shape[:2]
        own = path is not None and path.shape[-2] == self.layout.chain.num_steps + 1
        if path is not None and own:
            run = self._evaluate(rows, self.layout.own_paths(path.flatten(0, 1)))
        else:
            run = self._evaluate(rows, self.layout.as_paths(rows))
        chains = {site.name for site in self.program.chains}
        skip = frozenset() if own else self._reading_paths | chains
        kept = {}
        for name in run.site_names:
            value = run.value(name) if run.is_latent_or_deterministic(name) else None
            if value is not None and name not in skip:
                kept[name] = value.reshape(*shape, *value.shape[1:])
        return kept

    def _where_legal(self, x0: Tensor, ask: Callable[[Tensor], Tensor], otherwise: float) -> Tensor:
        """Ask about the rows whose tokens exist, a limited number at once."""
        rows = x0.reshape(-1, x0.shape[-1])
        legal = self.layout.legal(rows)
        value = torch.full((len(rows),), otherwise, dtype=torch.float64)
        if bool(legal.any()):
            parts = [ask(part).to(torch.float64) for part in rows[legal].split(MAX_ROWS)]
            value[legal] = torch.cat(parts)
        return value.reshape(x0.shape[:-1])

    def _density(self, rows: Tensor, *, lookahead: bool = False) -> Tensor:
        run = self._evaluate(rows, self.layout.as_paths(rows))
        value = run.log_density(lookahead=lookahead)
        if not self.latents.names:
            return value
        return value - self.latents.log_prob(self.layout.labels(rows))

    def _density_of_guesses(self, rows: Tensor) -> Tensor:
        return self._density(rows, lookahead=True)

    def _surrogate(self, rows: Tensor) -> Tensor:
        sequences = self.layout.split(rows)
        total = torch.zeros(len(rows), dtype=torch.float64)
        for name, surrogate in self._surrogates.items():
            total = total + per_particle(surrogate.lookahead(sequences[name])[None])[0]
        return total

    def _evaluate(self, rows: Tensor, paths: Mapping[str, Tensor]) -> ProgramRun:
        latents = self.latents.at(self.layout.labels(rows)) if self.latents.names else {}
        return self.program.evaluate({**paths, **latents}, len(rows))


def _mismatches(clamp: ClampProposal, x0: Tensor) -> Tensor:
    return ((x0 != clamp.tokens) & clamp.mask).sum(-1).to(torch.float64)


def _as_potential(potential: PotentialLike) -> AbstractPotential:
    return potential if isinstance(potential, AbstractPotential) else Potential(potential)
