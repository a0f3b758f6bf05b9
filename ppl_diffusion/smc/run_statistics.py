"""Small numpy readings of a particle posterior that every diagnostic shares."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def as_array(values: Any) -> NDArray[Any]:
    """A tensor or array as numpy, detached and on the host; floats numpy lacks as float32."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    host = values.detach().cpu()
    narrow = host.is_floating_point() and host.dtype not in (torch.float32, torch.float64)
    return np.asarray(host.to(torch.float32) if narrow else host)


def pooled_log_evidence(log_evidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the mean evidence over runs (axis 0), the unbiased pooling; a dead run counts as 0."""
    from scipy.special import logsumexp  # slow to import, and runs do without

    return np.asarray(logsumexp(log_evidence, axis=0) - np.log(len(log_evidence)))


def relative_evidence(log_evidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each run's evidence over the mean of all runs (axis 0); NaN where every run is dead."""
    pooled = pooled_log_evidence(log_evidence)
    safe = np.where(np.isfinite(pooled), pooled, np.nan)
    return np.exp(log_evidence - safe)


def genealogical_sd(log_evidence: NDArray[np.float64], variance: NDArray[np.float64]) -> float:
    """Relative standard deviation of one run's evidence, from its family tree.

    ``Z^2 V`` is unbiased for the variance of one run's evidence ``Z`` (Lee and Whiteley 2018,
    Biometrika 105, theorem 1), so it is averaged over runs as it stands; a dead run adds zero.
    NaN when a living run's tree is degenerate (one surviving root), or no run lives.

    :param log_evidence: ``(R,)``.
    :param variance: ``(R,)`` relative variances ``V``.
    """
    ratio = relative_evidence(log_evidence)
    terms = np.where(ratio > 0, ratio**2 * variance, np.where(ratio == 0, 0.0, np.nan))
    return float(np.sqrt(np.maximum(terms.mean(), 0.0)))


def lineage_roots(ancestors: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index in the initial population of each particle's root, after each step.

    :param ancestors: ``(T, R, N)`` parent indices.
    :returns: ``(T + 1, R, N)``; row 0 is the initial population itself.
    """
    _, runs, particles = ancestors.shape
    roots = [np.broadcast_to(np.arange(particles), (runs, particles))]
    for parents in ancestors:
        roots.append(np.take_along_axis(roots[-1], parents, axis=-1))
    return np.stack(roots)


def count_distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of distinct values along the last axis."""
    ordered = np.sort(values, axis=-1)
    return 1 + (np.diff(ordered, axis=-1) != 0).sum(-1)


def effective_distinct(labels: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Effective number of distinct labels: one over the sum of their squared weights, ``(R,)``.

    :param labels: what particles are counted by, ``(R, N)``.
    :param weights: normalised, ``(R, N)``.
    """
    found = [
        np.bincount(np.unique(label, return_inverse=True)[1].reshape(-1), weights=weight)
        for label, weight in zip(labels, weights, strict=True)
    ]
    # Rounded, so that ten equal shares are ten and not a little less.
    return np.round([1 / (share**2).sum() for share in found], 9)
