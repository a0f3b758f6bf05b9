"""A dry run: which method to use for a budget, how large, what it costs, and how good it will be.

Weighing plain draws is all that is needed where many of them do well; look-ahead pays where few do.
Which of these a problem is shows in small pilots. Every method of the registry that is exact and
does not refuse the target gets some, each twice as large as the last, within a share of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ppl_diffusion.inference.check_pilots import (
    COSTS,
    PLAIN,
    Candidate,
    Search,
    applicable,
    cost_of,
)
from ppl_diffusion.inference.compositions import Composition
from ppl_diffusion.inference.smc import SMC, Target
from ppl_diffusion.programs.method import Method
from ppl_diffusion.programs.sources import PotentialLike, ProgramSource
from ppl_diffusion.smc.posterior import ParticlePosterior

COARSE, COLLAPSED, SLOW, NOISE = 1.0, 0.1, 0.1, 0.01
"""Warned of: large errors (nats), a low ESS (share), slow calls (s). Nats within NOISE agree."""

FORM = "{:<22}{:>6}{:>8}{:>16}{:>8}{:>8}{:>8}{:>11} {:>23}  {}"
HEADS = ["method", "pilot", "ESS", "log-evidence", "rows", "calls", "ms", "NxR", "error", "remark"]
CAPTION = """\
From small pilots, approximate. rows, calls, ms: per particle, as a rule at most (equal rows are
paid once). error: of the log-evidence at NxR, which the rest affords; nats, with 90 % interval."""


@dataclass(frozen=True, eq=False)
class Check:
    """What a dry run found; printing it prints its table.

    :param recommended: name of the method to use.
    :param program: an :class:`~ppl_diffusion.inference.SMC` with it, of a size the budget affords.
    :param reason: why this one, in a sentence.
    :param rows: one dict per method of what is known: ``name``, ``status``, ``num_particles`` and
        ``num_runs`` that the budget affords, what they cost as a rule at most (``network_rows``,
        ``potential_calls``, ``seconds``), their ``error`` (nats; root mean square error of the
        log-evidence) with a 90 % interval (``error_low``, ``error_high``); and of the largest pilot
        ``pilot_particles``, ``ess`` (share of the particles), ``ess_trace`` (after each step),
        ``log_evidence``, ``log_evidence_error``.
    :param warnings: what to know before trusting it, a sentence each.
    :param pilot_cost: what the pilots took off the budget.
    """

    recommended: str
    program: SMC
    reason: str
    rows: list[dict[str, Any]]
    warnings: list[str]
    pilot_cost: dict[str, float]
    _given: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    def run(self, *, seed: int | None = None) -> ParticlePosterior:
        """Run the recommended program on the target, and the arguments, that were checked.

        :param seed: seed of the run.
        """
        return self.program.run(*self._given[0], seed=seed, **self._given[1])

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a method.

        :param name: its name.
        :raises KeyError: if it was not among the candidates.
        """
        known = {row["name"]: row for row in self.rows}
        if name not in known:
            raise KeyError(f"{name!r} was no candidate; there are {', '.join(known)}.")
        return known[name]

    def __str__(self) -> str:
        cost = ", ".join(f"{v:,.4g} {k.replace('_', ' ')}" for k, v in self.pilot_cost.items())
        lines = [f"Use {self.recommended}: {self.reason}.", f"Pilots took {cost}."]
        return "\n".join([*table(self.rows), *lines, *(f"Warning: {w}" for w in self.warnings)])


def check(
    target: Target,
    potential: PotentialLike | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_evaluations: int | None = 10_000,
    num_potential_calls: int | None = None,
    seconds: float | None = None,
    num_runs: int = 4,
    pilot_share: float = 0.2,
    max_particles: int = 4096,
    candidates: Mapping[str, Method] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Check:
    """Try the methods that apply to a target, and say which one to use for a budget.

    :param target: a reverse chain, a composition of chains, or a Pyro program.
    :param potential: ``log G`` of a bare chain or on top of a composition; None for a program.
    :param args: arguments of the program.
    :param kwargs: keyword arguments of the program.
    :param num_evaluations: network rows that pilots and run together may take; None for any number.
    :param num_potential_calls: sequences the potential may be asked about; None for any number.
    :param seconds: wall time; None for any. Times are those of a machine as busy as this one.
    :param num_runs: runs of the recommended program; fewer where one would have under 8 particles.
    :param pilot_share: share of every budget for pilots: half to find the best, half to be sure.
    :param max_particles: largest recommended number of particles over all runs.
    :param candidates: methods to try besides those of the registry, by name, such as
        ``{"gradient": TwistedSampler(twist="argmax", proposal=GradientProposal(soft))}``.
    :param seed: seed of the pilots; the global random state is left alone if it is given.
    :param options: options of the runner, such as ``schedule`` or ``vectorize_particles``.
    :raises ValueError: if a number is not usable, or no budget is given.
    :raises CapabilityError: if every method refuses the target.
    :raises PotentialError: if the potential raises, or returns NaN, ``+inf`` or a wrong shape.

    Example::

        found = check(chain, Reward(dock, temperature=0.1), num_potential_calls=1000, seed=0)
        print(found)
        posterior = found.program.run(seed=1)
    """
    budget: dict[str, float | None] = {"num_evaluations": num_evaluations}
    budget |= {"num_potential_calls": num_potential_calls, "seconds": seconds}
    sizes = {"num_runs": num_runs, "max_particles": max_particles}
    for name, value in (budget | sizes).items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"check: {name} must be positive and finite, got {value}.")
    if all(value is None for value in budget.values()):
        raise ValueError(f"check: nothing limits the run; give {', '.join(budget)}, or several.")
    if not 0 < pilot_share <= 0.5:
        raise ValueError(f"check: pilot_share must lie in (0, 0.5], got {pilot_share}.")
    given = ((target, potential), tuple(args), dict(kwargs or {}))
    source = SMC(target, potential, **options)._source(*given[1:])  # may refuse it
    known = applicable(source, isinstance(target, Composition), candidates or {})
    limit = cost_of(*(math.inf if value is None else value for value in budget.values()))
    # Programs that read whole paths are refused without them; others need not pay for them.
    whole = isinstance(source, ProgramSource) and bool(source.program.reads)
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    pilots = {"given": given, "store_path": whole, **options}
    search = Search(known, pilots, limit, pilot_share, num_runs, max_particles, seed)
    search.spent = cost_of(calls=source.num_calls)  # what the reading of a program took
    best, reason = search.run(source)
    row = search.row(best, best)
    size = {name: row[name] for name in ("num_particles", "num_runs")}
    return Check(
        recommended=best.name,
        program=SMC(target, potential, method=best.method, **size, **options),
        reason=reason,
        rows=[search.row(candidate, best) for candidate in search.candidates],
        warnings=warnings_of(search.tried, best, row),
        pilot_cost=dict(zip(COSTS, search.spent.tolist(), strict=True)),
        _given=given[1:],
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows of a check as the lines of a table."""
    cells = [[row["name"], *_numbers(row), row["status"]] for row in rows]
    return [FORM.format(*line) for line in (HEADS, *cells)] + [CAPTION]


def _numbers(row: dict[str, Any]) -> list[str]:
    seen, cost, size, error = ["-"] * 3, ["-"] * 3, "-", "-"
    if "num_particles" in row:
        particles, runs = row["num_particles"], row["num_runs"]
        scaled = zip(COSTS, (1, 1, 1e3), strict=True)
        cost = [f"{row[name] * scale / (particles * runs):.3g}" for name, scale in scaled]
        size = f"{particles} x {runs}"
    if "error" in row:
        found = f"{row['log_evidence']:.2f} ± {row['log_evidence_error']:.2g}"
        seen = [str(row["pilot_particles"]), f"{row['ess']:.1%}", found]
        error = "{error:.2g} ({error_low:.2g}..{error_high:.2g})".format(**row)
    return [*seen, *cost, size, error]


def warnings_of(tried: list[Candidate], best: Candidate, row: dict[str, Any]) -> list[str]:
    """Return what a user should know of the pilots and of what is recommended."""
    if not tried:
        return [*_of_best(best, row)]
    if all(math.isinf(c.seen) for c in tried):
        return ["Every pilot died; look ahead by what grades the way to G > 0, like a Constraint."]
    plain = tried[0].last if tried[0].name == PLAIN else None
    return [*_of_potential(plain), *_of_pilots(tried), *_of_best(best, row)]


def _of_potential(plain: ParticlePosterior | None) -> Iterator[str]:
    if plain is None:
        return
    log_g = plain.log_potential.flatten()
    dead = float((log_g == -math.inf).double().mean())
    if dead > 0.5:
        yield f"The potential is -inf on {dead:.0%} of {len(log_g)} draws of the chain."
    elif float(log_g.max() - log_g.min()) == 0:
        yield f"The potential is the same on all {len(log_g)} draws of the chain."
    each = plain.seconds / plain.num_potential_calls
    if each > SLOW:
        yield f"Plain draws take {each:.2g} s per call; give num_potential_calls or seconds."


def _of_pilots(tried: list[Candidate]) -> Iterator[str]:
    for candidate in tried:
        died = int((~candidate.last.alive).sum())
        if died:
            yield f"The pilot of {candidate.name} died in {died} of {candidate.last.num_runs} runs."
        elif candidate.ess < COLLAPSED:
            yield f"The pilot of {candidate.name} collapsed to an ESS of {candidate.ess:.1%}."
    # Estimates fall short much more often than they overshoot: the largest is to be trusted.
    top = max(tried, key=lambda c: c.evidence_range[0])
    short = [c.name for c in tried if c.evidence_range[1] < top.evidence_range[0] - NOISE]
    if short:
        found = f"{top.name} finds a log-evidence of {top.last.pooled_log_evidence:.1f}"
        yield f"Pilots disagree: {found}, {', '.join(short)} less; trust the former."


def _of_best(best: Candidate, row: dict[str, Any]) -> Iterator[str]:
    if row["num_particles"] == 1:
        yield "Nothing can be said about a target from one weighted draw; give a larger budget."
    elif row["num_runs"] == 1:
        yield "One run is all there is, and does not show its own spread."
    if not best.pilots:
        yield "The budget is too small for pilots: costs are upper bounds, and nothing was tried."
    elif row["error"] > COARSE:
        error = f"the predicted error of the log-evidence is {row['error']:.2g} nats"
        yield f"The budget is small for this target: {error}; take more, or a milder potential."
