"""What results may be said to estimate, in words and in figures for JSON."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppl_diffusion.smc.evidence import Evidence, phrase
from ppl_diffusion.smc.run_statistics import as_array

EVIDENCE = ("log_evidence", "log_evidence_interval", "log_evidence_sd", "log_evidence_bound")
"""Figures of :func:`evidence_figures`."""


def number_or_none(value: Any) -> float | None:
    """Return a number as JSON can say it, which knows no NaN."""
    return float(value) if np.isfinite(value) else None


def knows_ess(settings: Mapping[str, Any]) -> bool:
    """Return whether weights tell an effective sample size: not that of states of Markov chains.

    :param settings: those of a result.
    """
    return settings.get("method") != "refinement"


def evidence_range(log_evidence: Any) -> tuple[float, float] | None:
    """Return the ends of the log evidences ``(R,)`` of the living runs, None if none lives."""
    values = as_array(log_evidence)
    living = values[np.isfinite(values)]
    return (float(living.min()), float(living.max())) if len(living) else None


def evidence_figures(found: Evidence | None) -> dict[str, Any]:
    """Return an evidence in JSON types; what does not exist is None."""
    if found is None:
        return dict.fromkeys(EVIDENCE)
    bound = found.bound
    return {
        "log_evidence": number_or_none(found.log_mean),
        "log_evidence_interval": None if found.interval is None else list(found.interval),
        "log_evidence_sd": number_or_none(found.sd),
        "log_evidence_bound": bound if bound is None else number_or_none(bound),
    }


def evidence_text(figures: Mapping[str, Any], *, alive: bool = True) -> str:
    """Return the figures of an evidence as a phrase, without an error where none is known.

    :param figures: those of :func:`evidence_figures`.
    :param alive: whether any run is.
    """
    value, interval, bound = (figures[f"log_evidence{x}"] for x in ("", "_interval", "_bound"))
    if value is None:
        return "none" if alive else phrase(-math.inf)
    return phrase(value, interval, bound)


def claim(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return what weights are exact for, or only aim at, as a row of a table."""
    # Exactness is about the target: no reassurance about few particles.
    return "weights exact for" if facts["exact"] else "weights aim at", facts["target"]
