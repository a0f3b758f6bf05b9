"""Resampling schemes: ``(uniforms, log_weights) -> ancestors``, vectorised over runs.

Every scheme satisfies ``E[copies of i] = N w_i`` and never returns a particle of weight zero.
The uniforms are arguments, so torch and JAX give the same ancestors, and a run is a function of
its random numbers. Distribution functions are float64, the last bin ends at exactly one, and an
index is clipped to the last particle of positive weight. Comparison: Douc and Cappe (2005),
Gerber, Chopin and Whiteley (2019, SSP), Del Moral (2004, killing).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import is_torch_array

from ppl_diffusion.arrays import Array, array_namespace, device_of, int64_of, to_float64
from ppl_diffusion.smc.weights import Weights


@dataclass(frozen=True)
class Resampler(ABC):
    """One resampling scheme."""

    name: ClassVar[str]

    def num_uniforms(self, num_particles: int) -> int:
        """Return how many uniforms one run needs, one per particle unless a scheme says other."""
        return num_particles

    @abstractmethod
    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        """Return ancestors from uniforms ``(*runs, M)`` and normalised weights ``(*runs, N)``."""

    def __call__(self, uniforms: Array, log_weights: Array) -> Array:
        """Return the ancestor of every new particle.

        A run without any positive weight is returned unresampled (the identity).

        :param uniforms: numbers in ``[0, 1)``, ``(*runs, num_uniforms(N))``.
        :param log_weights: unnormalised log-weights, ``(*runs, N)``.
        :returns: int64 indices in ``0..N-1``, ``(*runs, N)``.
        :raises ValueError: if a weight is NaN or ``+inf``, or the uniforms have a wrong shape.
        """
        xp = array_namespace(log_weights)
        needed = self.num_uniforms(log_weights.shape[-1])
        if tuple(uniforms.shape) != (*log_weights.shape[:-1], needed):
            raise ValueError(
                f"{self.name} resampling of weights {tuple(log_weights.shape)} needs uniforms "
                f"{(*log_weights.shape[:-1], needed)}, got {tuple(uniforms.shape)}."
            )
        if bool(xp.any(xp.isnan(log_weights) | (log_weights == math.inf))):
            raise ValueError(f"{self.name} resampling: a log-weight is NaN or +inf.")
        weights = Weights(to_float64(log_weights))
        ancestors = self._ancestors(to_float64(uniforms), weights.normalised)
        stay = xp.broadcast_to(_iota(log_weights), log_weights.shape)
        return xp.where(weights.alive[..., None], ancestors, stay)


@dataclass(frozen=True)
class Multinomial(Resampler):
    """``N`` independent draws, in the order drawn (unsorted)."""

    name = "multinomial"

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        return _inverse_cdf(weights, uniforms)


@dataclass(frozen=True)
class Residual(Resampler):
    """``floor(N w)`` certain copies, the rest drawn independently from the fractions.

    The uniforms of the certain copies are not used.
    """

    name = "residual"

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        size = weights.shape[-1]
        # Round-off must not turn N w = 3 - 1e-16 into two certain copies and a sure third draw:
        # both are unbiased, so the floor is taken as it comes.
        whole = xp.floor(size * weights)
        ends = xp.cumulative_sum(whole, axis=-1)
        slots = to_float64(_iota(weights))
        certain = _count(ends, slots)
        fraction = size * weights - whole
        total = xp.sum(fraction, axis=-1, keepdims=True)
        rest = xp.where(
            total > 0, fraction / xp.where(total > 0, total, xp.ones_like(total)), weights
        )
        drawn = _inverse_cdf(rest, uniforms)
        return xp.where(slots < ends[..., -1:], xp.minimum(certain, _last_positive(weights)), drawn)


@dataclass(frozen=True)
class Stratified(Resampler):
    """One draw in each of ``N`` equal strata."""

    name = "stratified"

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        return self.draw(uniforms, array_namespace(weights).log(weights))

    def draw(self, uniforms: Array, log_weights: Array) -> Array:
        """Draw any number of indices, not necessarily ``N``.

        :param uniforms: numbers in ``[0, 1)``, ``(*runs, M)``.
        :param log_weights: log-weights ``(*runs, N)``, some of them positive.
        :returns: int64 indices in ``0..N-1``, ``(*runs, M)``, sorted.
        """
        points = (to_float64(_iota(uniforms)) + uniforms) / uniforms.shape[-1]
        return _inverse_cdf(Weights(to_float64(log_weights)).normalised, points)


@dataclass(frozen=True)
class Systematic(Resampler):
    """A comb with one offset, over particles in random order.

    The shuffle removes the dependence on the labels, without which consistency can fail.
    """

    name = "systematic"

    def num_uniforms(self, num_particles: int) -> int:
        """One offset and ``N`` sort keys."""
        return num_particles + 1

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        order = xp.argsort(uniforms[..., 1:], axis=-1)
        shuffled = xp.take_along_axis(weights, order, axis=-1)
        comb = (to_float64(_iota(weights)) + uniforms[..., :1]) / weights.shape[-1]
        return xp.take_along_axis(order, _inverse_cdf(shuffled, comb), axis=-1)


@dataclass(frozen=True)
class SSP(Resampler):
    """Srinivasan sampling: fractions are settled pair by pair (Gerber et al. 2019, Alg. 2).

    As low in variance as the comb and provably consistent. A scan of length ``N``: one uniform per
    settled pair, the last for the remainder of round-off.
    """

    name = "ssp"

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        copies = _ssp_copies(uniforms, weights)
        ends = xp.cumulative_sum(copies, axis=-1)
        slots = to_float64(_iota(weights))
        return xp.minimum(_count(ends, slots), _last_positive(weights))


@dataclass(frozen=True)
class Killing(Resampler):
    """Keep particle ``i`` with probability ``w_i / max w``, else redraw it from the weights."""

    name = "killing"

    def num_uniforms(self, num_particles: int) -> int:
        """Two uniforms per particle: survive, and redraw."""
        return 2 * num_particles

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = array_namespace(weights)
        size = weights.shape[-1]
        top = xp.max(weights, axis=-1, keepdims=True)
        keep = uniforms[..., :size] * top < weights
        return xp.where(keep, _iota(weights), _inverse_cdf(weights, uniforms[..., size:]))


RESAMPLERS: dict[str, Resampler] = {
    scheme.name: scheme
    for scheme in (Multinomial(), Residual(), Stratified(), Systematic(), SSP(), Killing())
}


def as_resampler(scheme: str | Resampler) -> Resampler:
    """Return a resampler from its name.

    :param scheme: a name from :data:`RESAMPLERS`, or a resampler.
    :raises ValueError: if the name is unknown.
    """
    if isinstance(scheme, Resampler):
        return scheme
    if scheme not in RESAMPLERS:
        raise ValueError(f"unknown resampler {scheme!r}; choose one of {', '.join(RESAMPLERS)}.")
    return RESAMPLERS[scheme]


def _iota(like: Array) -> Array:
    xp = array_namespace(like)
    return xp.arange(like.shape[-1], device=device_of(like))


def _last_positive(weights: Array) -> Array:
    """Return the index of the last positive weight, ``(*runs, 1)``."""
    xp = array_namespace(weights)
    index = xp.where(weights > 0, _iota(weights), xp.zeros_like(_iota(weights)))
    return xp.max(index, axis=-1, keepdims=True)


def _inverse_cdf(weights: Array, points: Array) -> Array:
    """Return, for each point in ``[0, 1)``, the first index whose distribution function exceeds it.

    Runs are searched in one sorted array: run ``r``'s function is shifted to ``[r, r + 1]``.
    """
    xp = array_namespace(weights)
    last = _last_positive(weights)
    cdf = xp.cumulative_sum(weights, axis=-1)
    cdf = xp.where(_iota(weights) >= last, xp.ones_like(cdf), cdf / cdf[..., -1:])
    return xp.minimum(_count(cdf, points), last)


def _count(ends: Array, points: Array) -> Array:
    """Return how many of the sorted ``ends`` of the same run are ``<=`` each point."""
    xp = array_namespace(ends)
    points = xp.broadcast_to(points, (*ends.shape[:-1], points.shape[-1]))
    if is_torch_array(ends):  # the only library whose search is batched
        return xp.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    flat_ends = ends.reshape(-1, ends.shape[-1])
    flat_points = points.reshape(-1, points.shape[-1])
    rows = [
        xp.searchsorted(e, p, side="right") for e, p in zip(flat_ends, flat_points, strict=True)
    ]
    return xp.stack(rows).reshape(points.shape)


def _ssp_copies(uniforms: Array, weights: Array) -> Array:
    """Return the number of copies of each particle, float64 ``(*runs, N)``.

    One fraction stays open; it meets the next one, mass moves so that one of the two becomes an
    integer and the expectation of both is kept; the integer one is frozen.
    """
    xp = array_namespace(weights)
    expected = weights.shape[-1] * weights
    whole = xp.floor(expected)
    fraction = expected - whole
    open_f = fraction[..., 0]
    open_i = xp.zeros_like(xp.astype(open_f, int64_of(xp)))
    frozen_i, frozen_f = [], []
    for j in range(1, weights.shape[-1]):
        f = fraction[..., j]
        up, down = xp.minimum(1 - open_f, f), xp.minimum(open_f, 1 - f)
        gains = uniforms[..., j - 1] * (up + down) < down
        open_f, f = xp.where(gains, open_f + up, open_f - down), xp.where(gains, f - up, f + down)
        done = xp.minimum(open_f, 1 - open_f) <= xp.minimum(f, 1 - f)  # which one is the integer
        frozen_i.append(xp.where(done, open_i, xp.full_like(open_i, j)))
        frozen_f.append(xp.round(xp.where(done, open_f, f)))
        open_i = xp.where(done, xp.full_like(open_i, j), open_i)
        open_f = xp.where(done, f, open_f)
    settled = xp.stack([*frozen_f, xp.zeros_like(open_f)], axis=-1)
    # What is left open is 0 or 1 up to round-off: it takes whatever is missing from N.
    missing = weights.shape[-1] - xp.sum(whole, axis=-1) - xp.sum(settled, axis=-1)
    last = xp.stack([*[xp.zeros_like(missing)] * len(frozen_f), missing], axis=-1)
    order = xp.argsort(xp.stack([*frozen_i, open_i], axis=-1), axis=-1)
    return whole + xp.take_along_axis(settled + last, order, axis=-1)
