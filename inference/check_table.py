"""What a dry run tells its user: warnings, and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from ppl_diffusion.inference.check_pilots import Candidate

COSTS = ("network_rows", "potential_calls", "seconds")

COARSE = 1.0
"""Error of the log-evidence, in nats, from which on a budget is called small."""

COLLAPSED = 0.1
"""ESS, as a share of the particles, below which a pilot is said to have collapsed."""

SLOW = 0.1
"""Seconds per plain draw from which on a budget of calls or time is advised."""


def warnings_of(tried: list[Candidate], best: Candidate, row: Mapping[str, Any]) -> list[str]:
    """Return what a user should know, a sentence each.

    :param tried: the methods that had pilots.
    :param best: what is recommended.
    :param row: its row.
    """
    found = [*_of_potential(tried), *_of_pilots(tried), *_of_best(best, row)]
    return [text[0].upper() + text[1:] + "." for text in found]


def _of_potential(tried: list[Candidate]) -> Iterator[str]:
    plain = next((c for c in tried if c.name == "importance-sampling"), None)
    if plain is None:
        return
    log_g = plain.last.log_potential.flatten()
    dead = float((log_g == -math.inf).double().mean())
    if dead > 0.5:
        yield f"the potential is -inf on {dead:.0%} of {len(log_g)} draws of the chain"
    elif float(log_g.max() - log_g.min()) == 0:
        yield f"the potential is the same on all {len(log_g)} draws of the chain"
    each = plain.last.seconds / plain.last.num_potential_calls
    if each > SLOW:
        yield f"plain draws take {each:.2g} s per call; give num_potential_calls or seconds"


def _of_pilots(tried: list[Candidate]) -> Iterator[str]:
    alive = [c for c in tried if math.isfinite(c.seen)]
    if tried and not alive:
        yield (
            "every pilot died; a look-ahead that grades the way to G > 0, such as that of a "
            "Constraint, would help"
        )
        return
    for candidate in tried:
        last = candidate.last
        died = int((~last.alive).sum())
        if died:
            yield f"the pilot of {candidate.name} died in {died} of {last.num_runs} runs"
        elif not candidate.independent and candidate.ess < COLLAPSED:
            yield f"the pilot of {candidate.name} collapsed to an ESS of {candidate.ess:.1%}"
    # Estimates fall short much more often than they overshoot: the largest is to be trusted.
    top = max(alive, key=lambda c: c.evidence_range[0], default=None)
    short = [c.name for c in alive if top and c.evidence_range[1] < top.evidence_range[0]]
    if top and short:
        yield (
            f"pilots disagree beyond their errors: {top.name} finds a log-evidence of "
            f"{top.last.pooled_log_evidence:.1f}, {', '.join(short)} less; trust the former"
        )


def _of_best(best: Candidate, row: Mapping[str, Any]) -> Iterator[str]:
    size = row["num_particles"] * row["num_runs"]
    if not best.pilots:
        if size == 1:
            yield "nothing can be said about a target from one weighted draw; give a larger budget"
        yield "the budget is too small for pilots: costs are upper bounds, and nothing was tried"
        return
    if row["num_runs"] == 1:
        yield "one run is all there is, and does not show its own spread"
    if COARSE < row["error"] < math.inf:
        yield (
            f"the budget is small for this target: the predicted error of the log-evidence is "
            f"{row['error']:.2g} nats; take more, or a milder potential"
        )


def tables(
    rows: list[dict[str, Any]], use: str, spent: Mapping[str, float], warnings: list[str]
) -> Group:
    """Return what a check prints.

    :param rows: see :class:`~ppl_diffusion.inference.Check`.
    :param use: what is recommended, and why.
    :param spent: cost of the pilots.
    :param warnings: what to know before trusting it.
    """
    made = Table(
        title="Dry run: what the rest of the budget affords and is predicted to give",
        caption=(
            "From small pilots, approximate. rows, calls, ms: per particle, at most as a rule "
            "(equal rows are paid once).\nerror: of the log-evidence at N x R in nats, with a "
            "90 % interval."
        ),
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("method", no_wrap=True)
    for head in ("pilot", "ESS", "log evidence", "rows", "calls", "ms", "N x R", "error"):
        made.add_column(head, justify="right", no_wrap=True)
    made.add_column("remark")
    for row in rows:
        style = "bold" if row["status"] == "recommended" else None
        made.add_row(row["name"], *_numbers(row), row["status"], style=style)
    took = (f"{spent[name]:,.3g} {name.replace('_', ' ')}" for name in COSTS)
    return Group(made, use, f"Pilots took {', '.join(took)}.", *(f"Warning: {w}" for w in warnings))


def _numbers(row: Mapping[str, Any]) -> Iterator[str]:
    known, size = "error" in row, row.get("num_particles", 0) * row.get("num_runs", 0)
    yield str(row["pilot_particles"]) if known else "-"
    yield f"{row['ess']:.1%}" if known else "-"
    yield f"{row['log_evidence']:.2f} ± {row['log_evidence_error']:.2g}" if known else "-"
    for name, scale in zip(COSTS, (1, 1, 1e3), strict=True):
        yield f"{row[name] * scale / size:.3g}" if size else "-"
    yield f"{row['num_particles']} x {row['num_runs']}" if size else "-"
    low_high = f" ({row['error_low']:.2g}..{row['error_high']:.2g})" if known else ""
    yield f"{row['error']:.2g}{low_high}" if known else "-"
