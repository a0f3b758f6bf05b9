"""What independent runs say together about an evidence: a point, an interval, or only a bound.

With ``l_r`` the log-evidences of ``R`` living runs, about normal with mean ``m`` and standard
deviation ``s``, the log of the mean evidence is ``m + s^2 / 2``, and an interval for it::

    m + s^2 / 2 - h  to  m + s^2 / 2 + 3 h,    h = t_{R-1} sqrt(s^2 / R + s^4 / (2 (R - 1)))

With one ``h`` above, it would cover 95 % if errors were lognormal. They have a heavier tail where
few particles find what pays: runs that missed it agree, below the truth, and no warning tells.
Three times ``h`` make up for that on the problem of ``tests/exact/test_heavy_tails.py``, which
prints what is covered, and cover more than 95 % of lognormal errors. The level is nominal.

The relative standard error of the mean evidence is no substitute: it saturates at 1 where one run
outweighs the others, which is when least is known. Where ``s > 1`` no interval is given, only a
bound that needs no law of the ``l_r``: an unbiased estimate exceeds 20 times the truth in one case
of 20 at most (Markov).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.smc.run_statistics import as_array, pooled_log_evidence

LEVEL = 0.95
"""Coverage of bounds, and of intervals if errors are lognormal."""
ABOVE = 3.0
"""How many times further an interval reaches up than down: heavy tails put the truth there."""
AGREE = 1.0
"""Largest standard deviation of log-evidences (nats) at which their mean has an interval."""


@dataclass(frozen=True)
class Evidence:
    """The evidence of several runs, in nats; :meth:`of` computes it.

    :param log_mean: log of the mean over runs, dead ones as zero: its exponential is unbiased.
    :param sd: standard deviation of the log-evidence over living runs; NaN for fewer than two.
    :param interval: nominal 95 % for the log of the true evidence; None where runs disagree or
        died, or their agreement means nothing.
    :param bound: what the truth is no less than at 95 %, where several runs give no interval.
    :param ends: the lowest and highest living run.
    :param num_runs: runs that the figures are of.
    :param num_dead: how many of them are dead.
    """

    log_mean: float
    sd: float
    interval: tuple[float, float] | None
    bound: float | None
    ends: tuple[float, float] | None
    num_runs: int
    num_dead: int

    @classmethod
    def of(
        cls,
        log_evidence: Any,
        *,
        trusted: bool = True,
        kept: int | None = None,
        overspent: float = 1.0,
    ) -> Evidence:
        """Return what log-evidences say.

        :param log_evidence: one per run, ``(R,)``, ``-inf`` in a dead one.
        :param trusted: whether agreement of runs means anything (they may all miss one thing).
        :param kept: how many of them are asked about, the first ones; all show the spread.
        :param overspent: what every one of these costs too much: their variance is scaled by it.
        """
        every = as_array(log_evidence).astype(np.float64)
        values = every[:kept]
        living = np.isfinite(values)
        shown = every[np.isfinite(every)]
        sd = float(shown.std(ddof=1)) if len(shown) > 1 else math.nan
        whole = bool(np.isfinite(every).all()) and trusted and sd <= AGREE
        log_mean = float(pooled_log_evidence(values))
        several = len(every) > 1 and bool(living.any())
        return cls(
            log_mean=log_mean,
            sd=sd,
            interval=lognormal_interval(values, sd, len(shown), overspent) if whole else None,
            bound=log_mean + math.log(1 - LEVEL) if several and not whole else None,
            ends=(float(values[living].min()), float(values[living].max())) if several else None,
            num_runs=len(values),
            num_dead=int((~living).sum()),
        )

    def __str__(self) -> str:
        """Return a phrase: the value, and how sure it is."""
        return phrase(self.log_mean, self.interval, self.bound)


def phrase(
    log_mean: float, interval: Sequence[float] | None = None, bound: float | None = None
) -> str:
    """Return an evidence in words, without an error where none is known.

    :param log_mean: in nats, as the others.
    :param interval: at nominal 95 %, or None.
    :param bound: what the truth is no less than at 95 %, or None for a single run.
    """
    if log_mean == -math.inf:
        return "-inf (every run is dead)"
    if interval is not None:
        low, high = interval
        return f"{log_mean:.4g} [{low:.4g}, {high:.4g}]"
    known = "one run" if bound is None else f"no error, at least {bound:.4g} at 95 %"
    return f"{log_mean:.4g} ({known})"


def lognormal_interval(
    values: NDArray[np.float64], sd: float, num_shown: int, overspent: float = 1.0
) -> tuple[float, float]:
    """Return the interval of the module's head.

    :param values: finite log-evidences ``(K,)``, whose mean is asked about.
    :param sd: standard deviation of one of them.
    :param num_shown: how many log-evidences showed it, at least two.
    :param overspent: by what the variance of each is too small.
    """
    from scipy.special import stdtrit  # slow to import, and runs do without

    variance = sd**2
    spread = variance * overspent / len(values) + variance**2 / (2 * (num_shown - 1))
    half = float(stdtrit(num_shown - 1, (1 + LEVEL) / 2)) * math.sqrt(spread)
    centre = float(values.mean()) + variance / 2
    return centre - half, centre + ABOVE * half
