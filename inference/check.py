"""A dry run: which program to use for a budget, what it will cost, and how good it will be.

Steering is not always worth its price. Importance sampling asks the potential once per draw and is
all that is needed where many draws of the chain do well; look-ahead pays where few do; and with a
handful of trajectories nothing beats keeping the best. Which of these a problem is shows in small
pilot runs. They are given a share of the budget, the more promising half of the programs going on
to pilots of twice the size for as long as the share lasts (successive halving: Jamieson and
Talwalkar 2016, arXiv:1502.07943). Every program is then judged by the error of the log-evidence
predicted for what is left of the budget. Of those about as good as the best, the one that is known
to suit such a target is recommended. Predictions are continued from pilots, and approximate: costs
come out too large, by up to a factor of two or three, where particles share most of their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ppl_diffusion.inference._check_budget import Budget, Verdict
from ppl_diffusion.inference._check_candidates import Question, Target, ask
from ppl_diffusion.inference._check_meters import MeteredDenoiser, MeteredPotential
from ppl_diffusion.inference._check_report import rows_of, summary, tables, warnings_of
from ppl_diffusion.inference._check_search import Search
from ppl_diffusion.inference._task import PotentialLike
from ppl_diffusion.smc.posterior import ParticlePosterior


@dataclass(frozen=True, eq=False)
class Check:
    """What a dry run found; printing it prints its tables.

    :param recommended: name of the program to use.
    :param program: the program itself, with a size that the budget affords; its ``run`` takes the
        arguments of the user's program, if that is the target.
    :param reason: why this one, in a sentence.
    :param rows: one dict per program: ``name``, ``status``, ``num_particles`` and ``num_runs`` that
        the budget affords and what they are predicted to cost (``network_rows``,
        ``potential_calls``, ``seconds``), ``error``, ``error_low`` and ``error_high`` (nats; root
        mean square error of the log-evidence, with a 90 % interval for the spread of the pilot's
        variance), and what the largest pilot showed: ``pilot_particles``, ``ess`` (fraction of the
        particles at the end), ``ess_trace`` (after each step), ``log_evidence``,
        ``mean_log_potential``. None where it is not known.
    :param warnings: what to know before trusting it, a sentence each.
    :param pilot_cost: what the pilots took: ``network_rows``, ``potential_calls``, ``seconds``,
        which the predictions have taken off the budget.
    :param ms_per_row: time of one network row in the pilots, in milliseconds; NaN if not measured.
    :param ms_per_call: time of one potential call; NaN if not measured.
    :param gain: predicted mean ``log G`` of the recommended program's draws minus that of best-of-N
        at equal cost per design, in nats; NaN if not known.
    :param best_of: the ``N`` of that best-of-N.
    """

    recommended: str
    program: Any
    reason: str
    rows: list[dict[str, Any]]
    warnings: list[str]
    pilot_cost: dict[str, float]
    ms_per_row: float
    ms_per_call: float
    gain: float
    best_of: float
    _args: tuple[Any, ...] = field(default=(), repr=False)
    _kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def run(self, *, seed: int | None = None) -> ParticlePosterior:
        """Run the recommended program on the target that was checked.

        :param seed: seed of the run.
        """
        posterior: ParticlePosterior = self.program.run(*self._args, seed=seed, **self._kwargs)
        return posterior

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a program.

        :param name: its name.
        :raises KeyError: if the program was not among the candidates.
        """
        for row in self.rows:
            if row["name"] == name:
                return row
        raise KeyError(f"{name!r} was no candidate; there are {[r['name'] for r in self.rows]}.")

    def __rich__(self) -> Any:
        return tables(self)

    def __str__(self) -> str:
        console = Console(width=132, color_system=None)
        with console.capture() as capture:
            console.print(tables(self))
        return capture.get()


def check(
    target: Target,
    potential: PotentialLike | None = None,
    *args: Any,
    num_evaluations: int | None = 10_000,
    num_potential_calls: int | None = None,
    seconds: float | None = None,
    num_runs: int = 4,
    pilot_share: float = 0.1,
    pilot_particles: int = 4,
    max_particles: int = 4096,
    soft_potential: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Check:
    """Try the programs that apply to a target, and say which one to use for a budget.

    :param target: a reverse chain, a composition of chains, or a Pyro program.
    :param potential: ``log G`` of a bare chain or on top of a composition; None for a program.
    :param args: arguments of the program.
    :param num_evaluations: network rows that pilots and run together may take; None for any number.
    :param num_potential_calls: sequences the potential may be asked about; None for any number.
    :param seconds: wall time; None for any. Times are those of a machine as busy as this one.
    :param num_runs: runs of the recommended program: several, so that its error shows; fewer where
        a run would have less than 8 particles.
    :param pilot_share: share of every budget that goes into pilots; up to a quarter where less
        would leave importance sampling alone in the race, or costs in the dark.
    :param pilot_particles: particles per run of the first pilots.
    :param max_particles: largest recommended number of particles over all runs.
    :param soft_potential: the potential as a differentiable function of soft sequences, ``(B, L,
        V) -> (B,)``, if there is one: adds the gradient proposal to the candidates.
    :param seed: seed of the pilots; the global random state is left alone if it is given.
    :param kwargs: keyword arguments of the program.
    :raises ValueError: if a number is not usable, or no budget is given.
    :raises PotentialError: if the potential raises, or returns NaN, ``+inf`` or a wrong shape.

    Example::

        found = check(chain, Reward(dock, temperature=0.1), num_potential_calls=1000, seed=0)
        print(found)
        posterior = found.program.run(seed=1)
    """
    budget = Budget.of(num_evaluations, num_potential_calls, seconds, pilot_share)
    _check_numbers(num_runs, pilot_particles, max_particles)
    question = ask(
        target,
        potential,
        args,
        kwargs,
        few_calls=num_potential_calls is not None
        and num_potential_calls < (num_evaluations or math.inf),
        soft_potential=soft_potential,
    )
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    search = Search(question, budget, num_runs, pilot_particles, max_particles, seed)
    with torch.no_grad():
        verdict = search.run()
    return _report(question, search, verdict, args, kwargs)


def _report(
    question: Question,
    search: Search,
    verdict: Verdict,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Check:
    spent = search.spent
    gain, best_of = summary(search, verdict)
    plan = verdict.plan
    return Check(
        recommended=verdict.name,
        program=question.build(verdict.build, plan.num_particles, plan.num_runs),
        reason=verdict.reason,
        rows=rows_of(search, verdict),
        warnings=warnings_of(search, verdict),
        pilot_cost={
            "network_rows": spent.rows,
            "potential_calls": spent.calls,
            "seconds": spent.seconds,
        },
        ms_per_row=_milliseconds(question.denoiser),
        ms_per_call=_milliseconds(question.metered),
        gain=gain,
        best_of=best_of,
        _args=args,
        _kwargs=kwargs,
    )


def _milliseconds(timed: MeteredDenoiser | MeteredPotential | None) -> float:
    if timed is None or not timed.meter.rows:
        return math.nan
    return 1e3 * timed.meter.seconds_per_row


def _check_numbers(num_runs: int, pilot_particles: int, max_particles: int) -> None:
    for name, value, least in (
        ("num_runs", num_runs, 1),
        ("pilot_particles", pilot_particles, 2),
        ("max_particles", max_particles, 1),
    ):
        if value < least:
            raise ValueError(f"check: {name} must be >= {least}, got {value}.")
