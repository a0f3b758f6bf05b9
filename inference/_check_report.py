"""What a dry run tells its user: rows, warnings, tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from scipy import stats
from torch import Tensor

from ppl_diffusion.inference._check_budget import Plan, Verdict
from ppl_diffusion.inference._check_candidates import BEST_OF_N, PLAIN, Candidate
from ppl_diffusion.inference._check_meters import Cost
from ppl_diffusion.inference._check_pilots import Record, evidence_error
from ppl_diffusion.inference._check_search import (
    FEW,
    GOOD,
    Search,
    percent,
)

if TYPE_CHECKING:
    from ppl_diffusion.inference.check import Check

COLLAPSED = 0.3
"""ESS at the end, as a fraction of the particles, below which a pilot is said to have collapsed."""

COARSE = 1.0
"""Error of the log-evidence, in nats, from which on a budget is called small."""

HOPELESS = 1000
"""Multiple of the budget from which on no number is given."""

SLOW = 0.1
"""Seconds per potential call from which on calls are what counts."""


def rows_of(search: Search, verdict: Verdict) -> list[dict[str, Any]]:
    """Return one dict per program, see :class:`~ppl_diffusion.inference.Check`.

    :param search: the search.
    :param verdict: what it recommends.
    """
    rows = [_row(search, candidate, verdict) for candidate in search.question.candidates]
    best = _best_of_row(search, verdict)
    return rows if best is None else [*rows, best]


def _row(search: Search, candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
    chosen = candidate.name == verdict.name
    record = search.records.get(candidate.name)
    plan = search.bound(candidate) if record is None else search.plan(candidate)
    status = "tried" if record else search.skipped.get(candidate.name, "not tried")
    own = _planned(candidate.name, "recommended" if chosen else status, plan)
    return {**own, **_seen(search, candidate, record, plan), "why": candidate.why}


def _planned(name: str, status: str, plan: Plan) -> dict[str, Any]:
    return {
        "name": name,
        "status": status,
        "num_particles": plan.num_particles,
        "num_runs": plan.num_runs,
        "network_rows": plan.cost.rows,
        "potential_calls": plan.cost.calls,
        "seconds": plan.cost.seconds or None,
    }


def _seen(
    search: Search, candidate: Candidate, record: Record | None, plan: Plan
) -> dict[str, Any]:
    if record is None:
        names = ("error", "error_low", "error_high", "pilot_particles", "ess", "ess_trace")
        return dict.fromkeys((*names, "log_evidence", "mean_log_potential"))
    low, high = interval(search, candidate, plan)
    last = record.last
    return {
        "error": search.error(candidate),
        "error_low": low,
        "error_high": high,
        "pilot_particles": last.size,
        "ess": last.ess_fraction,
        "ess_trace": last.ess,
        "log_evidence": last.pooled,
        "mean_log_potential": last.mean_log_potential,
    }


def interval(search: Search, candidate: Candidate, plan: Plan) -> tuple[float, float]:
    """Return where the predicted error lies if the spread of pilots is a chi-square: 90 %.

    :param search: the search.
    :param candidate: a program with a pilot.
    :param plan: the size it is predicted for.
    """
    variance = search.variance(candidate)
    spare = max(search.records[candidate.name].num_spare_runs, 1)
    low, high = (variance * spare / float(stats.chi2.ppf(q, spare)) for q in (0.95, 0.05))
    return evidence_error(low, plan.size), evidence_error(high, plan.size)


def _best_of_row(search: Search, verdict: Verdict) -> dict[str, Any] | None:
    """Return the row of best-of-N: what one run of all draws is expected to find."""
    if search.question.best_of is None:
        return None
    plain = search.question.candidates[0]
    record = search.records.get(PLAIN)
    plan = search.bound(plain) if record is None else search.plan(plain)
    status = "recommended" if verdict.name == BEST_OF_N else "for comparison"
    own = _planned(BEST_OF_N, status, Plan(plan.size, 1, plan.cost))
    seen = _seen(search, plain, None, plan)
    if record is not None:
        seen["mean_log_potential"] = _expected_best(search, record, plan.size)
    return {**own, **seen, "why": "the best design and no law"}


def _expected_best(search: Search, plain: Record, size: float) -> float:
    """Return the expected best of so many draws, no better than what any pilot has seen."""
    seen = [p.log_potential.max() for r in search.records.values() for p in r.pilots]
    return min(expected_best(plain.last.log_potential, size), float(torch.stack(seen).max()))


def expected_best(log_potential: Tensor, size: float) -> float:
    """Return the expected best ``log G`` of so many draws.

    Up to as many as there are it is a mean of order statistics, beyond it a normal tail (Blom
    1958), which is too high where the potential is bounded.

    :param log_potential: ``log G`` of independent draws.
    :param size: number ``n``, not necessarily whole.
    """
    finite = log_potential[log_potential > -math.inf].sort().values
    if not len(finite):
        return -math.inf
    size = max(1.0, size * len(finite) / len(log_potential))
    if size <= len(finite):
        edges = (torch.arange(len(finite) + 1, dtype=torch.float64) / len(finite)) ** size
        return float((edges.diff() * finite).sum())
    top = float(stats.norm.ppf((size - 0.375) / (size + 0.25)))
    spread = float(finite.std()) if len(finite) > 1 else 0.0
    return max(float(finite[-1]), float(finite.mean()) + top * spread)


def summary(search: Search, verdict: Verdict) -> tuple[float, float]:
    """Return the predicted gain over best-of-N at equal cost per design, and that ``N``.

    What weighing spends per effective draw, best-of-N may spend on one design.

    :param search: the search.
    :param verdict: what it recommends.
    """
    plain, record = search.records.get(PLAIN), search.records.get(verdict.name)
    if plain is None or record is None:
        return math.nan, math.nan
    draws = search.plan(search.question.candidates[0]).size
    designs = max(1.0, record.last.ess_fraction * verdict.plan.size)
    best_of = max(1.0, draws / designs)
    best = _expected_best(search, plain, best_of)
    gain = record.last.mean_log_potential - best if best > -math.inf else math.nan
    return gain, best_of


def warnings_of(search: Search, verdict: Verdict) -> list[str]:
    """Return what a user should know, a sentence each.

    :param search: the search.
    :param verdict: what it recommends.
    """
    found = [*_of_potential(search), *_of_pilots(search), *_of_verdict(search, verdict)]
    return [text[0].upper() + text[1:] + "." for text in found]


def _of_potential(search: Search) -> Iterator[str]:
    plain, metered = search.records.get(PLAIN), search.question.metered
    if plain is not None:
        log_g = plain.last.log_potential
        dead = float((log_g == -math.inf).to(torch.float64).mean())
        if dead > 0.5:
            yield f"the potential is -inf on {percent(dead)} of {len(log_g)} draws of the chain"
        elif float(log_g.max() - log_g.min()) == 0:
            yield f"the potential is the same on all {len(log_g)} draws of the chain"
        if search.plain_is_enough(plain):
            share = percent(plain.last.ess_fraction)
            yield f"steering is not needed: the ESS of plain weighing is {share} of its draws"
        elif plain.evidence_range[1] < search.evidence_floor:
            yield (
                f"plain draws miss what matters: they find a log-evidence of "
                f"{plain.last.pooled:.1f}, other programs at least {search.evidence_floor:.1f}"
            )
    each = 0.0 if metered is None else metered.meter.seconds_per_row
    if each > SLOW:
        yield f"the potential takes {each:.2g} s per call; give num_potential_calls or seconds"


def _of_pilots(search: Search) -> Iterator[str]:
    if search.records and all(record.last.dead for record in search.records.values()):
        yield (
            "every pilot died; a look-ahead that grades the way to G > 0, such as that of a "
            "Constraint, would help"
        )
        return
    for candidate in search.tried:
        last = search.records[candidate.name].last
        if last.dead:
            yield f"the pilot of {candidate.name} died: all {last.size} particles have weight zero"
        elif candidate.name != PLAIN and last.ess[-1] < COLLAPSED:
            ess = last.ess[-1] * last.num_particles
            yield (
                f"the pilot of {candidate.name} collapsed: {ess:.1f} of {last.num_particles} "
                "particles are left at the end"
            )
    yield from _of_lookahead(search)


def _of_lookahead(search: Search) -> Iterator[str]:
    for kind in ("steering", "clamped", "smc"):
        tried = {c.name.removeprefix(f"{kind}-"): c for c in search.tried}
        both = [tried[fill] for fill in ("argmax", "persistent") if fill in tried]
        if len(both) < 2:
            continue
        better, worse = sorted(both, key=search.error)
        most = interval(search, better, search.plan(better))[1]
        least = interval(search, worse, search.plan(worse))[0]
        if most < least:
            yield (
                f"look-ahead disagrees between completions: {better.name} has a predicted error "
                f"of {search.error(better):.2g}, {worse.name} of {search.error(worse):.2g}; trust "
                "the former"
            )


def _of_verdict(search: Search, verdict: Verdict) -> Iterator[str]:
    candidate = next((c for c in search.tried if c.name == verdict.name), None)
    if candidate is None:
        if verdict.plan.size == 1:
            yield "nothing can be said about a target from one weighted draw; give a larger budget"
        yield (
            f"the budget is too small for pilots: costs are upper bounds, and {verdict.name} was "
            "chosen by rule"
        )
        return
    variance = search.variance(candidate)
    error = evidence_error(variance, verdict.plan.size)
    if COARSE < error < math.inf:
        v = 2 * (math.sqrt(1 + GOOD**2) - 1)  # v + v^2 / 4 = GOOD^2
        factor = variance / math.expm1(v) / verdict.plan.size
        more = f"about {factor:.2g}" if factor < HOPELESS else f"more than {HOPELESS:g}"
        yield (
            f"the budget is small for this target: the predicted error of the log-evidence is "
            f"{error:.2g} nats; for {GOOD:g} take {more} times as much, or a milder potential"
        )
    if verdict.plan.size < FEW:
        yield f"only {verdict.plan.size} trajectories are affordable"
    if verdict.plan.size >= search.max_particles - verdict.plan.num_runs:
        yield "max_particles, not the budget, limits the run: equal rows are paid once"


# Tables.

_UNKNOWN = "-"


def tables(found: Check) -> Group:
    """Return what a check prints.

    :param found: the check.
    """
    return Group(_main_table(found), *_lines(found))


def _main_table(found: Check) -> Table:
    made = Table(
        title="Dry run: what the rest of the budget affords and is predicted to give",
        caption=(
            "Predictions from small pilots, approximate. error: of the log-evidence in nats, with "
            "90 % interval.\nESS: share of the largest pilot's particles. mean log G: of weighted "
            "draws (expected best for best-of-n)."
        ),
        title_justify="left",
        caption_justify="left",
    )
    heads = ("N x R", "rows", "calls", "seconds", "error", "ESS", "mean log G", "status")
    made.add_column("program", no_wrap=True)
    for head in heads:
        made.add_column(head, justify="left" if head == "status" else "right", no_wrap=True)
    for row in found.rows:
        made.add_row(*_cells(row), style="bold" if row["status"] == "recommended" else None)
    return made


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["name"]
    yield f"{row['num_particles']} x {row['num_runs']}"
    yield f"{row['network_rows']:,.0f}"
    yield f"{row['potential_calls']:,.0f}"
    yield _number(row["seconds"], ".1f")
    interval = f" ({row['error_low']:.2g}..{row['error_high']:.2g})" if row["error"] else ""
    yield _number(row["error"], ".2g") + interval
    yield _UNKNOWN if row["ess"] is None else percent(row["ess"])
    yield _number(row["mean_log_potential"], ".2f")
    yield row["status"]


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None or math.isnan(value) else format(value, form)


def _lines(found: Check) -> Iterator[str]:
    yield f"Use {found.recommended}: {found.reason}."
    cost = Cost(*found.pilot_cost.values())
    speed = ""
    if found.ms_per_row == found.ms_per_row:
        speed = f" {found.ms_per_row:.3g} ms per network row, {found.ms_per_call:.3g} per call."
    yield (
        f"Pilots took {cost.rows:,.0f} network rows, {cost.calls:,.0f} potential calls, "
        f"{cost.seconds:.1f} s.{speed}"
    )
    if found.gain == found.gain:
        yield (
            f"Against best-of-{found.best_of:.3g} at equal cost per design: {found.gain:+.2f} nats "
            "of mean log G."
        )
    yield from (f"Warning: {text}" for text in found.warnings)
