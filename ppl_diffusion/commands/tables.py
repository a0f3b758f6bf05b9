"""Tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from ppl_diffusion.commands.terminal import plain

if TYPE_CHECKING:
    from ppl_diffusion.designs.run import Result
    from ppl_diffusion.diagnostics.comparison import Comparison
    from ppl_diffusion.smc.verdict import Verdict

_FRAME = 3
"""Characters that the frame of a table adds to a column; there is one more at its end."""
_LABELS = {"log_potential": "log G", "log_prob_bound": "prior bound (nats)"}


def table(title: str | None, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on standard output; numbers stand to the right."""
    console = Console(markup=False, emoji=False)  # names of folders may hold brackets

    def said(text: str) -> str:
        # Before the table is laid out: a stand-in may be longer.
        return plain(text, console.encoding)

    body = [list(row) for row in rows]
    out = Table(title=title and said(title), title_justify="left")
    for position, name in enumerate(map(said, header)):
        numeric = body and all(isinstance(row[position], int | float) for row in body)
        side: JustifyMethod = "right" if numeric else "left"
        out.add_column(name, justify=side, overflow="fold", no_wrap=name == "name")
    for row in body:
        out.add_row(*(said(_cell(value)) for value in row))
    console.print(out)


def design_tables(result: Result) -> None:
    """Print the heaviest designs, the comparison with the prior, and the cost."""
    _designs(result)
    _comparison(result)
    _cost(result)


def _designs(result: Result) -> None:
    names = [name for name in result.columns if not name.endswith("_sd")]
    shown = range(min(8, len(result.sequences)))
    designs = result.designs
    columns = (designs.weight, designs.log_potential, *(result.columns[name] for name in names))
    rows = [[rank + 1, *(float(column[rank]) for column in columns)] for rank in shown]
    table("Designs by weight", ["rank", "weight", "log G", *map(_plain, names)], rows)
    for rank in shown:  # below the table, where a narrow terminal cannot cut them
        print(f"{rank + 1:>4}  {result.sequences[rank]}")


def _comparison(result: Result) -> None:
    summary = result.summary
    # Runs that disagree say nothing about the error of what they are pooled to.
    known = "evidence_note" in summary or summary["log_evidence_interval"] is not None
    rows = [
        [
            _plain(name),
            _with_error(
                numbers["designs_mean"], numbers["designs_standard_error"] if known else None
            ),
            _with_error(numbers["prior_mean"], numbers["prior_sd"]),
            numbers["prior_95th_percentile"],
        ]
        for name, numbers in summary["comparison"].items()
    ]
    mean = "designs: mean ± s.e." if known else "designs: mean"
    header = ["score", mean, "prior: mean ± s.d.", "prior: 95th percentile"]
    table("Designs against prior samples", header, rows)


def _cost(result: Result) -> None:
    from ppl_diffusion.diagnostics.claims import claim

    summary = result.summary
    alive = len(summary["ess"]) - summary["num_dead_runs"]
    roots = summary["effective_root_ancestors"]
    rows = [
        ["method", summary["method"]],
        ["log evidence (nats), nominal 95 %", _pooled(summary)],
        ["log evidence per run", _range(summary["log_evidence_range"])],
        ["runs alive", f"{alive} of {len(summary['ess'])}"],
        ["effective sample size", _ess(summary["ess_pooled"], summary["num_particles"])],
        ["effective root ancestors per run", _range((min(roots), max(roots)))],
        ["  of all runs together", summary["effective_root_ancestors_pooled"]],
        ["distinct designs", summary["unique"]],
        ["nearest neighbour", _nearest(summary["collapse"])],
        ["network rows evaluated", summary["evaluations"]],
        ["potential calls", summary["potential_calls"]],
        ["seconds", f"{summary['seconds']:.1f}"],
        list(claim(summary)),
    ]
    table("Trust and cost", ["quantity", "value"], rows)
    if "evidence_note" in summary:
        print(f"Note: {summary['evidence_note']}")
    warnings(result.posterior.warnings)


def _ess(value: float | None, total: int) -> str:
    return "n/a" if value is None else f"{value:.1f} of {total}"


def _pooled(summary: Mapping[str, Any]) -> str:
    from ppl_diffusion.diagnostics.claims import evidence_text

    return evidence_text({**summary, "log_evidence": summary["log_evidence_pooled"]})


def warnings(verdicts: Iterable[Verdict]) -> None:
    """Print what is wrong with a result, a line each."""
    from ppl_diffusion.smc.verdict import SAID  # a list of models is printed without it

    for verdict in verdicts:
        print(f"{SAID[verdict.level]}: {verdict}")


def _nearest(collapse: Mapping[str, Any]) -> str:
    """Say by how many positions the designs of a run differ from their nearest ones."""
    known = [value for value in collapse["nearest"] if value is not None]
    mean, prior = sum(known) / len(known), collapse["prior_nearest"]
    return f"{mean:.0%} of positions apart in sets of {collapse['set']} (prior: {prior:.0%})"


def comparison_tables(comparison: Comparison) -> None:
    """Print contenders side by side: as they are, at equal evaluations, and what to mind."""
    from ppl_diffusion.smc.verdict import Verdict

    rows = comparison.rows
    labels = [str(row["label"]) for row in rows]
    as_they_are: dict[str, list[object]] = {
        "method": [row["method"] for row in rows],
        "weights": [("exact for " if row["exact"] else "aim at ") + row["target"] for row in rows],
        "runs x particles": [f"{row['num_runs']} x {row['num_particles']}" for row in rows],
        "dead runs": [row["num_dead_runs"] for row in rows],
        "steps": [row["num_steps"] for row in rows],
        "potential calls": [row["potential_calls"] for row in rows],
        "seconds": [_known(row["seconds"]) for row in rows],
        "root ancestors, worst run": [_known(row["root_ancestors"]) for row in rows],
        "k-hat": [_known(row["khat"]) for row in rows],
        "warnings": [len(row["warnings"]) for row in rows],
        **_figures(rows),
    }
    _side_by_side("Runs as they are", labels, as_they_are)
    shares = [row["equal"] for row in rows]
    budget = comparison.evaluations
    equal: dict[str, list[object]] = {
        "runs kept": [_share(row) for row in rows],
        "rows kept of budget": [f"{share['evaluations'] / budget:.0%}" for share in shares],
        **_figures(shares),
    }
    _side_by_side(f"At equal evaluations: {budget} network rows", labels, equal)
    for letter, target in comparison.targets.items():
        print(f"{letter}: {target}")
    for note in comparison.notes:
        print(note if isinstance(note, Verdict) else f"Note: {note}")


def _side_by_side(title: str, labels: Sequence[str], rows: Mapping[str, list[object]]) -> None:
    """Print one column per run, in as many tables as the terminal is too narrow for one."""
    room = Console().width - max(map(len, rows)) - _FRAME - 1
    widths = [
        max(len(labels[at]), *(len(_cell(cells[at])) for cells in rows.values())) + _FRAME
        for at in range(len(labels))
    ]
    start = 0
    while start < len(labels):
        end = start + 1
        while end < len(labels) and sum(widths[start : end + 1]) <= room:
            end += 1
        of = "" if end - start == len(labels) else f" ({start + 1} to {end} of {len(labels)})"
        body = [[name, *cells[start:end]] for name, cells in rows.items()]
        table(f"{title}{of}", ["quantity", *labels[start:end]], body)
        start = end


def _figures(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[object]]:
    names = dict.fromkeys(name for part in parts for name in part["scores"])
    return {
        "network rows": [part["evaluations"] for part in parts],
        "log evidence (nats)": [_known(part["log_evidence"]) for part in parts],
        "  interval, nominal 95 %": list(map(_interval, parts)),
        "log evidence per run": [_range(part["log_evidence_range"]) for part in parts],
        "effective sample size": [_known(part["ess"]) for part in parts],
        "distinct designs": [part["unique"] for part in parts],
        "Hamming of two draws": [_known(part["hamming"]) for part in parts],
        **{_LABELS.get(name, _plain(name)): _score_cells(parts, name) for name in names},
    }


def _interval(part: Mapping[str, Any]) -> str:
    if part["log_evidence_interval"] is not None:
        low, high = part["log_evidence_interval"]
        return f"[{_cell(low)}, {_cell(high)}]"
    bound = part["log_evidence_bound"]
    return "n/a" if bound is None else f">= {_cell(bound)}"


def _score_cells(parts: Sequence[Mapping[str, Any]], name: str) -> list[object]:
    scores = [part["scores"].get(name, {"mean": None, "se": None}) for part in parts]
    return [_with_error(score["mean"], score["se"]) for score in scores]


def _share(row: Mapping[str, Any]) -> str:
    equal = row["equal"]
    share = f"{equal['num_runs']} of {row['num_runs']}"
    return f"{share}, scaled" if equal["how"] == "scaled" else share


def _range(ends: Sequence[float] | None) -> str:
    return "n/a" if ends is None else f"{_cell(ends[0])} to {_cell(ends[1])}"


def _known(value: float | None) -> str:
    return "n/a" if value is None else _cell(value)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _with_error(value: float | None, error: float | None) -> str:
    known = error is not None and math.isfinite(error)
    return f"{_known(value)} ± {_cell(error)}" if known else _known(value)


def _cell(value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
