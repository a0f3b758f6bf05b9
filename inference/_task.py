"""What a particle method is asked to do: one chain, one potential, and a name for the result.

Every program of this package takes either a reverse chain with a potential, or a Pyro program with
one chain site. For the latter the potential is the program itself: its log-density of everything
that is not the chain, given the clean sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion._errors import CapabilityError
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.handlers import ClampProposal
from ppl_diffusion.inference._program import ChainSite, Program, ProgramRun
from ppl_diffusion.inference.smc import _seeded as seeded  # one way of seeding for all programs
from ppl_diffusion.potentials.base import FORBIDDEN_GUESS, AbstractPotential, Potential
from ppl_diffusion.smc.engine import SMCTrace
from ppl_diffusion.smc.posterior import ParticlePosterior

__all__ = ["ProgramPotential", "Task", "as_task", "seeded"]

MAX_ROWS = 4096
"""Sequences a program is evaluated for at once."""

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
        return (
            f"p(path) * G(x0) of the {self.chain.num_steps}-step reverse chain{under}, normalised, "
            f"with log G = {self.name}; log_evidence estimates the log of its normalising constant"
        )

    def samples(self, x0: Tensor, path: Tensor | None = None) -> dict[str, Tensor]:
        """Return the values of all sites, each ``(R, N, ...)``: ``x0`` alone for a bare chain.

        :param x0: clean sequences, int64 ``(R, N, *plates, L)``.
        :param path: whole paths, ``(R, N, *plates, T + 1, L)``, where they were stored.
        """
        if isinstance(self.potential, ProgramPotential):
            return self.potential.samples(x0, path)
        return {"x0": x0}

    def posterior(
        self,
        trace: SMCTrace,
        *,
        num_evaluations: int,
        num_potential_calls: int,
        settings: Mapping[str, Any],
        seconds: float,
        target: str | None = None,
        exact: bool = True,
    ) -> ParticlePosterior:
        """Return what a run of :func:`~ppl_diffusion.smc.smc_loop` on this task left behind.

        :param trace: the run.
        :param num_evaluations: network rows evaluated.
        :param num_potential_calls: sequences the potential was asked about.
        :param settings: what was chosen, in JSON types.
        :param seconds: wall time.
        :param target: the declared law, where it is not :attr:`target`.
        :param exact: whether the weights are exact for it.
        """
        x0, fields = trace.carry["tokens"], trace.posterior_fields()
        path = fields["compact_path"]
        return ParticlePosterior(
            x0=x0,
            times=torch.as_tensor(self.chain.kernel.times),
            samples=self.samples(x0, None if path is None else path.to(torch.int64)),
            num_evaluations=num_evaluations,
            num_potential_calls=num_potential_calls,
            exact=exact,
            target=target or self.target,
            settings={"num_steps": self.chain.num_steps, **settings},
            seconds=seconds,
            is_program=self.is_program,
            **fields,
        )


def as_task(
    target: ReverseChain | Callable[..., Any],
    potential: PotentialLike | None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Task:
    """Read what is to be sampled.

    :param target: a reverse chain, or a Pyro program with one chain site outside of all plates and
        no other latent. A :func:`~ppl_diffusion.handlers.clamp` on the site becomes a hard
        constraint of the potential; the potential of an ``infer={"steer": ...}`` hint serves as
        the look-ahead.
    :param potential: ``log G`` of a bare chain; None for a program, which is its own potential.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :raises TypeError: if a bare chain comes without a potential or with arguments.
    :raises ValueError: if a program comes with a potential, or has no chain site.
    :raises CapabilityError: if a program has several chain sites, plates around the chain, or
        other latents.
    """
    if not isinstance(target, ReverseChain):
        return _program_task(target, potential, args, kwargs or {})
    if potential is None:
        raise TypeError(
            "a bare chain needs a potential; pass one, such as Reward(dock, temperature=0.1)."
        )
    if args or kwargs:
        raise TypeError("run takes no arguments of a program here: the target is a bare chain.")
    known = potential if isinstance(potential, AbstractPotential) else Potential(potential)
    return Task(target, known, known.name)


def _program_task(
    model: Callable[..., Any],
    potential: PotentialLike | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Task:
    if not callable(model):
        raise TypeError(
            f"the target must be a ReverseChain or a Pyro program, got {type(model).__name__}."
        )
    if potential is not None:
        raise ValueError(
            "a program is its own potential; write the potential into it with "
            "ppl_diffusion.potentials.factor."
        )
    known = ProgramPotential(Program(model, args, kwargs))
    return Task(known.site.chain, known, known.name)


class ProgramPotential(AbstractPotential):
    """A program's log-density of everything but its chain, as a potential of the sequence.

    :param program: the program with its arguments.
    :raises CapabilityError: if it is no function of one sequence.
    """

    def __init__(self, program: Program) -> None:
        _require_one_sequence(program)
        self.program = program
        self.site: ChainSite = program.chains[0]
        self.name = f"the program {program.name}"
        hint = self.site.steering
        self._surrogate = None if hint is None else _as_potential(hint.potential)

    def log_potential(self, x0: Tensor) -> Tensor:
        """Return the program's log-density given clean sequences, ``-inf`` outside a clamp."""
        value = self._density(x0, lookahead=False)
        clamp = self.site.clamp
        return value if clamp is None else value.masked_fill(~clamp.holds(x0), -torch.inf)

    def lookahead(self, x0: Tensor) -> Tensor:
        """Return the program's (or its steering hint's) finite look-ahead."""
        hint = self._surrogate
        value = self._density(x0, lookahead=True) if hint is None else hint.lookahead(x0)
        clamp = self.site.clamp
        return value if clamp is None else value + FORBIDDEN_GUESS * _mismatches(clamp, x0)

    def samples(self, x0: Tensor, path: Tensor | None = None) -> dict[str, Tensor]:
        """Return the values of the program's sites, each ``(R, N, ...)``.

        :param x0: clean sequences, int64 ``(R, N, L)``.
        :param path: whole paths, ``(R, N, T + 1, L)``; without them the chain site is left out.
        """
        shape = x0.shape[:2]
        paths = self._as_paths(x0.flatten(0, 1)) if path is None else path.flatten(0, 1)
        run = self._evaluate(paths)
        skip = {self.site.name} if path is None else set()
        kept = {}
        for name in run.site_names:
            value = run.value(name) if run.is_latent_or_deterministic(name) else None
            if value is not None and name not in skip:
                kept[name] = value.reshape(*shape, *value.shape[1:])
        return kept

    def _density(self, x0: Tensor, *, lookahead: bool) -> Tensor:
        rows = x0.reshape(-1, x0.shape[-1]).split(MAX_ROWS)
        parts = [self._evaluate(self._as_paths(r)).log_density(lookahead=lookahead) for r in rows]
        return torch.cat(parts).reshape(x0.shape[:-1])

    def _as_paths(self, rows: Tensor) -> Tensor:
        """Repeat each clean sequence as if it were a whole path."""
        return rows[:, None].expand(len(rows), self.site.chain.num_steps + 1, rows.shape[-1])

    def _evaluate(self, paths: Tensor) -> ProgramRun:
        return self.program.evaluate({self.site.name: paths}, len(paths))


def _require_one_sequence(program: Program) -> None:
    sites = [site.name for site in program.chains]
    if len(sites) > 1:
        reason = f"has several chain sites ({', '.join(sites)})"
    elif program.chains[0].chain.batch_shape:
        reason = f"draws the chain {sites[0]!r} inside plates"
    elif program.latents:
        reason = f"has latents besides the chain ({', '.join(program.latents)})"
    else:
        return
    raise CapabilityError(
        f"{program.name} {reason}, so that it is no potential of one sequence; "
        "use ppl_diffusion.inference.SMC."
    )


def _mismatches(clamp: ClampProposal, x0: Tensor) -> Tensor:
    return ((x0 != clamp.tokens) & clamp.mask).sum(-1).to(torch.float64)


def _as_potential(potential: PotentialLike) -> AbstractPotential:
    return potential if isinstance(potential, AbstractPotential) else Potential(potential)
