"""Pareto shape of the upper tail of importance weights.

The weights above a cutoff are fitted by a generalised Pareto law with the empirical-Bayes rule of
Zhang and Stephens (2009, Technometrics 51), and the shape is pulled towards 1/2 by a prior worth
ten observations (Vehtari, Simpson, Gelman, Yao and Gabry 2024, JMLR 25, appendix C). A shape
``k`` means that moments of order above ``1/k`` do not exist: below 0.5 the weighted mean has a
central limit theorem, above 0.7 it is not to be trusted at practical sample sizes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_diffusion.smc.run_statistics import as_array

MIN_TAIL = 5
"""Fewest weights above the cutoff that a shape is fitted to; with fewer, k-hat is NaN."""

_PRIOR_SIZE = 10
_PRIOR_SHAPE = 0.5
_NEGLIGIBLE = 1e-300  # below this an excess would overflow the reciprocal that scales the grid
_TIED = 1e-6  # sequences are discrete: equal weights reach us with the rounding of a float32 sum


def khat(log_weights: Any) -> NDArray[np.float64]:
    """Pareto k-hat of importance weights, one per leading index.

    The tail holds the ``min(n / 5, 3 sqrt(n))`` largest weights, those tied with the cutoff (to
    one part in a million) left out. Weights need not be normalised. NaN is returned where fewer
    than :data:`MIN_TAIL` weights exceed the cutoff, because nothing can be fitted: fewer than 21
    particles, all weights equal, one particle that holds everything, or a dead run (all
    ``-inf``). Read the effective sample size there.

    :param log_weights: ``(..., N)`` log weights (array or tensor); ``-inf`` is weight zero.
    :returns: ``(...)`` shapes, dimensionless.
    :raises ValueError: if a log weight is NaN or ``+inf``.
    """
    weights = np.atleast_1d(as_array(log_weights).astype(np.float64))
    _reject_improper(weights)
    rows = weights.reshape(-1, weights.shape[-1])
    shapes = np.full(len(rows), np.nan)
    num_tail = int(np.ceil(min(rows.shape[1] / 5, 3 * np.sqrt(rows.shape[1]))))
    if num_tail >= MIN_TAIL:
        excess = _tail_excess(rows, num_tail)
        fitted = (excess > 0).sum(-1) >= MIN_TAIL
        if fitted.any():
            shapes[fitted] = _pareto_shape(excess[fitted])
    return shapes.reshape(weights.shape[:-1])


def _reject_improper(weights: NDArray[np.float64]) -> None:
    improper = np.argwhere(np.isnan(weights) | (weights == np.inf))
    if len(improper):
        where = tuple(int(i) for i in improper[0])
        raise ValueError(
            f"log_weights[{', '.join(map(str, where))}] is {weights[where]}: a k-hat needs finite "
            "log weights or -inf, so find the potential that returned it"
        )


def _tail_excess(rows: NDArray[np.float64], num_tail: int) -> NDArray[np.float64]:
    """Excess over the cutoff of each row's largest weights, ascending, zero where tied."""
    top = np.sort(rows, axis=-1)[:, -num_tail - 1 :]
    peak = np.where(np.isfinite(top[:, -1:]), top[:, -1:], 0.0)
    top = np.maximum(top - peak, np.log(np.finfo(np.float64).tiny))
    cutoff = top[:, :1]
    relative = np.expm1(top[:, 1:] - cutoff)
    excess = np.exp(cutoff) * relative
    return np.where((relative > _TIED) & (excess > _NEGLIGIBLE), excess, 0.0)


def _pareto_shape(excess: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zhang-Stephens posterior mean of the shape; zeros in front of a row are not data.

    Zeros add nothing to the sums of ``log1p``, which is what lets rows of different tail length
    share one array.
    """
    count = (excess > 0).sum(-1, keepdims=True)
    theta, valid = _theta_grid(excess, count)
    mean_log = _mean_log(theta, excess, count)
    # -theta / mean_log -> 1 / mean(excess) as theta -> 0
    at_zero = theta == 0
    scale = np.where(at_zero, count / excess.sum(-1, keepdims=True), -theta)
    profile = count * (np.log(scale / np.where(at_zero, 1.0, mean_log)) - mean_log - 1)
    profile = np.where(valid, profile, -np.inf)
    mass = np.exp(profile - profile.max(-1, keepdims=True))
    posterior = (mass * theta).sum(-1, keepdims=True) / mass.sum(-1, keepdims=True)
    shape = _mean_log(posterior, excess, count)
    return ((count * shape + _PRIOR_SIZE * _PRIOR_SHAPE) / (count + _PRIOR_SIZE))[:, 0]


def _theta_grid(
    excess: NDArray[np.float64], count: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Support points of Zhang and Stephens (2009), section 2, and which of them each row uses."""
    size = 30 + np.floor(np.sqrt(count)).astype(np.int64)
    index = np.arange(1, size.max() + 1)[None, :]
    quartile_rank = excess.shape[-1] - count + np.floor(count / 4 + 0.5).astype(np.int64) - 1
    quartile = np.take_along_axis(excess, quartile_rank, axis=-1)
    spread = 1 - np.sqrt(size / (np.minimum(index, size) - 0.5))
    return spread / (3 * quartile) + 1 / excess[:, -1:], index <= size


def _mean_log(
    theta: NDArray[np.float64], excess: NDArray[np.float64], count: NDArray[np.int64]
) -> NDArray[np.float64]:
    return np.log1p(-theta[:, :, None] * excess[:, None, :]).sum(-1) / count
