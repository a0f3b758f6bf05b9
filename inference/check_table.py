"""What a dry run tells its user: warnings, and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ppl_diffusion.inference.check_pilots import COSTS, Candidate

COARSE, COLLAPSED, SLOW, NOISE = 1.0, 0.1, 0.1, 0.01
"""What warnings are about: a large error (nats), a low ESS (share), slow calls (s); nats below
which log-evidences do not differ."""

FORM = "{:<22}{:>6}{:>8}{:>16}{:>8}{:>8}{:>8}{:>11} {:>23}  {}"
HEADS = (
    "method",
    "pilot",
    "ESS",
    "log evidence",
    "rows",
    "calls",
    "ms",
    "N x R",
    "error",
    "remark",
)
CAPTION = """\
From small pilots, approximate. rows, calls, ms: per particle, as a rule at most (equal rows are
paid once). error: predicted, of the log-evidence at the size N x R that the rest of the budget
affords, in nats, with a 90 % interval."""


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
    if tried and all(math.isinf(c.seen) for c in tried):
        hint = "look ahead by what grades the way to G > 0, such as a Constraint"
        return [f"Every pilot died: no particle had a positive weight; {hint}."]
    plain = [c for c in tried if c.name == "importance-sampling"]
    return [*_of_potential(plain), *_of_pilots(tried), *_of_best(best, row)]


def _of_potential(plain: list[Candidate]) -> Iterator[str]:
    for last in (candidate.last for candidate in plain):
        log_g = last.log_potential.flatten()
        dead = float((log_g == -math.inf).double().mean())
        if dead > 0.5:
            yield f"The potential is -inf on {dead:.0%} of {len(log_g)} draws of the chain."
        elif float(log_g.max() - log_g.min()) == 0:
            yield f"The potential is the same on all {len(log_g)} draws of the chain."
        each = last.seconds / last.num_potential_calls
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
    top = max(tried, key=lambda c: c.evidence_range[0], default=None)
    least = -math.inf if top is None else top.evidence_range[0] - NOISE
    short = [c.name for c in tried if c.evidence_range[1] < least]
    if top is not None and short:
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
