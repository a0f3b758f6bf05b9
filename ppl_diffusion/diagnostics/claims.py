"""What the evidences of several runs may be said to estimate."""

import math
from typing import Any

import numpy as np

from ppl_diffusion.smc.run_statistics import across_run_sd, as_array

MAX_RANGE = 2.0
"""Nats between the evidences of two runs above which their mean is that of the best few."""
MAX_ERROR = 0.5
"""Relative standard error of the mean above which it says little: it cannot exceed 1."""


def number_or_none(value: Any) -> float | None:
    """Return a number as JSON can say it, which knows no NaN."""
    return float(value) if np.isfinite(value) else None


def evidence_range(log_evidence: Any) -> tuple[float, float] | None:
    """Return the ends of the log evidences ``(R,)`` of the living runs, None if none lives."""
    values = as_array(log_evidence)
    living = values[np.isfinite(values)]
    return (float(living.min()), float(living.max())) if len(living) else None


def disagreement(log_evidence: Any) -> str | None:
    """Return a sentence where runs disagree so much that their spread is no error of their mean.

    The relative standard error of a mean of positive numbers never exceeds 1, and comes close
    when one of them outweighs the others: the error looks small when it is least known.

    :param log_evidence: one per run, ``(R,)``, in nats.
    """
    values = as_array(log_evidence)
    ends = evidence_range(values)
    if ends is None or len(values) < 2:
        return None
    apart, dead = ends[1] - ends[0], int(np.isneginf(values).sum())
    error = float(across_run_sd(values)) / math.sqrt(len(values))
    if apart <= MAX_RANGE and not error > MAX_ERROR:
        return None
    lost = f" ({dead} of {len(values)} are dead)" if dead else ""
    return (
        f"runs disagree by {apart:.1f} nats{lost}: the pooled evidence is dominated by the best "
        "run and its error is not known; use more particles."
    )
