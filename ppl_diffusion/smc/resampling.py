"""Resampling schemes: ``(uniforms, log_weights) -> ancestors``, vectorised over runs.

Every scheme satisfies ``E[copies of i] = N w_i`` and never returns a particle of weight zero.
The uniforms are arguments, so torch and JAX give the same ancestors, and a run is a function of
its random numbers. Distribution functions are float64, the last bin ends at exactly one, and an
index is clipped to the last particle of positive weight. Comparison: Douc and Cappe (2005),
Gerber, Chopin and Whiteley (2019, SSP), Del Moral (2004, killing).

The schemes of low variance are one idea: lay ``N`` copies on a line in shares of ``N w``, and let
particle ``i``'s ancestors end at the whole number below or above ``C_i = N (w_0 + ... + w_i)``.
They differ in how the roundings of neighbours hang together.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from array_api_compat import is_jax_array, is_torch_array

from ppl_diffusion.arrays import Array, array_namespace, device_of, int64_of, to_float64
from ppl_diffusion.deferred import refuse_if


@dataclass(frozen=True)
class Resampler(ABC):
    """One resampling scheme."""

    name: ClassVar[str]
    near: ClassVar[bool] = False
    """Whether it also takes NumPy arrays, which are what it gets on the CPU then."""

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
        needed = self.num_uniforms(log_weights.shape[-1])
        if tuple(uniforms.shape) != (*log_weights.shape[:-1], needed):
            raise ValueError(
                f"{self.name} resampling of weights {tuple(log_weights.shape)} needs uniforms "
                f"{(*log_weights.shape[:-1], needed)}, got {tuple(uniforms.shape)}."
            )
        if not self._takes_numpy:
            return self._resample(to_float64(uniforms), to_float64(log_weights))
        return _near(self._resample, uniforms, log_weights)

    @property
    def _takes_numpy(self) -> bool:
        # A scheme that inherits from one that does need not.
        owner = next(cls for cls in type(self).__mro__ if "_ancestors" in vars(cls))
        return bool(vars(owner).get("near", False))

    def _resample(self, uniforms: Array, log_weights: Array) -> Array:
        top = _top(log_weights)
        _refuse(top, self.name)
        ancestors = self._ancestors(uniforms, _normalised(log_weights, top))
        return _where_alive(top, ancestors, _iota)


@dataclass(frozen=True)
class Multinomial(Resampler):
    """``N`` independent draws, in the order drawn (unsorted)."""

    name = "multinomial"
    near = True

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        return _inverse_cdf(weights, uniforms)


@dataclass(frozen=True)
class Residual(Resampler):
    """``floor(N w)`` certain copies, the rest drawn independently from the fractions.

    The uniforms of the certain copies are not used.
    """

    name = "residual"
    near = True

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = _namespace(weights)
        expected, slots = weights.shape[-1] * weights, _iota(weights)
        # Round-off must not turn N w = 3 - 1e-16 into two certain copies and a sure third draw:
        # both are unbiased, so the floor is taken as it comes.
        whole = xp.floor(expected)
        ends = _running_sum(whole)
        certain = slots < ends[..., -1:]
        rest = expected - whole
        rest = xp.where(xp.sum(rest, axis=-1, keepdims=True) > 0, rest, weights)
        drawn = _inverse_cdf(rest, xp.where(certain, 0.0, uniforms))
        return xp.where(certain, _count_whole(ends, weights.shape[-1]), drawn)


@dataclass(frozen=True)
class Stratified(Resampler):
    """One draw in each of ``N`` equal strata."""

    name = "stratified"
    near = True

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = _namespace(weights)
        size = uniforms.shape[-1]
        below, share = _line(weights, size)
        # There is no stratum behind the last one, and nothing above its end.
        stratum = xp.minimum(_whole(below), _iota(uniforms)[-1])
        above = _take(uniforms, stratum) < share
        return _owners(below + above, size, weights)

    def draw(self, uniforms: Array, log_weights: Array) -> Array:
        """Draw any number of indices, not necessarily ``N``.

        :param uniforms: numbers in ``[0, 1)``, ``(*runs, M)``.
        :param log_weights: log-weights ``(*runs, N)``, some of them positive.
        :returns: int64 indices in ``0..N-1``, ``(*runs, M)``, sorted.
        """
        return _near(self._drawn, uniforms, log_weights)

    def _drawn(self, uniforms: Array, log_weights: Array) -> Array:
        return self._ancestors(uniforms, _normalised(log_weights, _top(log_weights)))


@dataclass(frozen=True)
class Systematic(Resampler):
    """A comb with one offset, over particles in random order.

    The shuffle removes the dependence on the labels, without which consistency can fail.
    """

    name = "systematic"
    near = True

    def num_uniforms(self, num_particles: int) -> int:
        """One offset and ``N`` sort keys."""
        return num_particles + 1

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        order = _order(uniforms[..., 1:])
        shuffled = _take(weights, order)
        below, share = _line(shuffled, weights.shape[-1])
        above = uniforms[..., :1] < share
        return _owners(below + above, weights.shape[-1], shuffled, order)


@dataclass(frozen=True)
class SSP(Resampler):
    """Srinivasan sampling: fractions are settled pair by pair (Gerber et al. 2019, Alg. 2).

    As low in variance as the comb and provably consistent. One fraction ``a`` is open; it meets
    the next one, mass moves so that one of the two becomes an integer and the expectation of both
    is kept; the integer one is frozen, the other stays open. One uniform per pair, and one left.

    That is no chain of roundings: both keep their sum, so the open fraction after particle ``i`` is
    ``c_i``, what ``C_i`` has above a whole number, whoever holds it. Hence each pair is settled
    by itself. Where the sum passes a whole number (``c_i < c_{i-1}``) one of the two is frozen at
    one, else at zero; it is ``a`` with probability ``(c_{i-1} - c_i) / (1 - c_i)``, else
    ``1 - c_{i-1} / c_i``. What is open after particle ``i`` is frozen at the first pair after ``i``
    that freezes ``a``, and ``i``'s copies end above ``C_i`` if that is at one.
    """

    name = "ssp"
    near = True

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = _namespace(weights)
        size = weights.shape[-1]
        below, share = _line(weights, size)
        before, after = share, xp.roll(share, -1, axis=-1)
        passes = after < before
        # One product for both cases, as in the paper: the next one gives to the open one.
        both = xp.where(passes, 1 - after, after)
        gains = uniforms * both < xp.where(passes, before - after, before)
        # Pairs are numbered from the end, so that the next one that freezes is the largest; the
        # last particle makes no pair.
        left = size - 1 - _iota(weights)
        freezes = (passes == gains) & (left > 0)
        above = _max_from_here(xp.where(freezes, 2 * left + passes, 0)) % 2
        return _owners(below + above, size, weights)


@dataclass(frozen=True)
class Killing(Resampler):
    """Keep particle ``i`` with probability ``w_i / max w``, else redraw it from the weights."""

    name = "killing"
    near = True

    def num_uniforms(self, num_particles: int) -> int:
        """Two uniforms per particle: survive, and redraw."""
        return 2 * num_particles

    def _ancestors(self, uniforms: Array, weights: Array) -> Array:
        xp = _namespace(weights)
        size = weights.shape[-1]
        keep = uniforms[..., :size] * xp.max(weights, axis=-1, keepdims=True) < weights
        redrawn = _inverse_cdf(weights, xp.where(keep, 0.0, uniforms[..., size:]))
        return xp.where(keep, _iota(weights), redrawn)


_RADIX = 256
"""From so many numbers on two passes of counting are faster than comparing."""

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


def _near(draw: Callable[[Array, Array], Array], uniforms: Array, log_weights: Array) -> Array:
    """Draw in float64, and on the CPU with NumPy, whose calls cost a fraction of torch's."""
    if is_torch_array(log_weights) and log_weights.device.type == "cpu":
        near = draw(uniforms.detach().double().numpy(), log_weights.detach().double().numpy())
        return _tensor(np.require(near, requirements="W"))
    return draw(to_float64(uniforms), to_float64(log_weights))


def _tensor(x: Array) -> torch.Tensor:
    return torch.as_tensor(x, device="cpu")


def _namespace(x: Array) -> Any:
    """Return NumPy itself where its functions do, without the layer that costs as much again."""
    return np if isinstance(x, np.ndarray) else array_namespace(x)


def _refuse(top: Array, name: str) -> None:
    """Raise an error if the largest log-weight of a run is NaN or infinite."""

    def complaint() -> ValueError:
        return ValueError(f"{name} resampling: a log-weight is NaN or +inf.")

    fine = (top < math.inf).all()
    if is_torch_array(top):
        refuse_if(~fine, complaint)
    elif not isinstance(fine, _traced()) and not bool(fine):
        raise complaint()


def _traced() -> tuple[type, ...]:
    """Return the type of what JAX compiles, which has no value yet; its engine looks later."""
    jax = sys.modules.get("jax")
    return () if jax is None else (jax.core.Tracer,)


def _normalised(log_weights: Array, top: Array) -> Array:
    """Return weights that sum to one; equal ones where all are dead: their draws are not taken.

    :param top: the largest log-weights, ``(*runs, 1)``.
    """
    xp = _namespace(log_weights)
    scaled = _where_alive(top, log_weights - _where_alive(top, top, xp.zeros_like), xp.zeros_like)
    weights = xp.exp(scaled)
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def _where_alive(top: Array, there: Array, elsewhere: Callable[[Array], Array]) -> Array:
    """Return one thing where a run lives and another where all its particles are dead."""
    alive = top > -math.inf
    if isinstance(alive, np.ndarray) and alive.all():  # no need to wait for an answer here
        return there
    return _namespace(top).where(alive, there, elsewhere(there))


def _top(log_weights: Array) -> Array:
    if isinstance(log_weights, np.ndarray):
        return np.maximum.reduce(log_weights, axis=-1, keepdims=True)
    return array_namespace(log_weights).max(log_weights, axis=-1, keepdims=True)


def _take(x: Array, index: Array) -> Array:
    """Return the entries of each run that an index names."""
    if not isinstance(x, np.ndarray):
        return array_namespace(x).take_along_axis(x, index, axis=-1)
    if x.size > x.shape[-1]:  # NumPy takes from one long array at a fifth of the price
        starts = x.shape[-1] * np.arange(x.size // x.shape[-1])
        index = index + starts.reshape(*x.shape[:-1], 1)
    return x.reshape(-1).take(index)


def _iota(like: Array) -> Array:
    if isinstance(like, np.ndarray):
        return np.arange(like.shape[-1])
    return array_namespace(like).arange(like.shape[-1], device=device_of(like))


def _whole(x: Array) -> Array:
    xp = array_namespace(x)
    return x.astype(np.int64) if isinstance(x, np.ndarray) else xp.astype(x, int64_of(xp))


def _running_sum(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return np.add.accumulate(x, axis=-1)
    return array_namespace(x).cumulative_sum(x, axis=-1)


def _max_from_here(x: Array) -> Array:
    """Return the largest of each number and those behind it."""
    if isinstance(x, np.ndarray):
        return np.maximum.accumulate(x[..., ::-1], axis=-1)[..., ::-1]
    if is_torch_array(x):
        return x.flip(-1).cummax(-1).values.flip(-1)
    from jax import lax

    return lax.cummax(x, axis=x.ndim - 1, reverse=True)


def _last_positive(weights: Array) -> Array:
    """Return the index of the last positive weight, ``(*runs, 1)``."""
    xp = _namespace(weights)
    return xp.max(xp.where(weights > 0, _iota(weights), 0), axis=-1, keepdims=True)


def _cdf(weights: Array) -> Array:
    """Return the distribution function of weights; it is one from the last positive one on."""
    sums = _running_sum(weights)
    cdf = sums / sums[..., -1:]
    if isinstance(cdf, np.ndarray):
        return cdf  # added up one by one: zeros change nothing
    last = _last_positive(weights)
    return array_namespace(cdf).where(_iota(weights) >= last, 1.0, cdf)


def _line(weights: Array, num: int) -> tuple[Array, Array]:
    """Return where the shares of ``num`` copies end: whole numbers and what is above them."""
    ends = num * _cdf(weights)
    below = _namespace(ends).floor(ends)
    return below, ends - below


def _owners(ends: Array, num: int, weights: Array, order: Array | None = None) -> Array:
    """Return who owns each of ``num`` slots if particles' slots end there, in their order."""
    if isinstance(ends, np.ndarray):
        copies = ends.astype(np.int64)
        copies[..., 1:] -= copies[..., :-1].copy()
        owners = np.broadcast_to(_iota(ends), ends.shape) if order is None else order
        return np.repeat(owners.ravel(), copies.ravel()).reshape(*ends.shape[:-1], num)
    owner = array_namespace(ends).minimum(_count_whole(ends, num), _last_positive(weights))
    return owner if order is None else _take(order, owner)


def _inverse_cdf(weights: Array, points: Array) -> Array:
    """Return, for each point in ``[0, 1)``, the first index whose distribution function exceeds it.

    Never one of weight zero.
    """
    xp = _namespace(weights)
    return xp.minimum(_count(_cdf(weights), points), _last_positive(weights))


def _count(ends: Array, points: Array) -> Array:
    """Return how many of the sorted ``ends`` of the same run are ``<=`` each point."""
    xp = array_namespace(ends)
    points = xp.broadcast_to(points, (*ends.shape[:-1], points.shape[-1]))
    if isinstance(ends, np.ndarray):  # whose own search takes one run at a time
        return _count(_tensor(ends), _tensor(points.copy())).numpy()
    if is_torch_array(ends):
        return torch.searchsorted(ends.contiguous(), points.contiguous(), right=True)
    import jax

    flat = ends.reshape(-1, ends.shape[-1]), points.reshape(-1, points.shape[-1])
    found = jax.vmap(lambda e, p: xp.searchsorted(e, p, side="right"))(*flat)
    return found.reshape(points.shape)


def _count_whole(ends: Array, num: int) -> Array:
    """Return how many of the sorted whole ``ends`` are at most each of ``0..num-1``."""
    xp = array_namespace(ends)
    if not is_jax_array(ends):
        return _count(ends, xp.arange(num, device=device_of(ends), dtype=ends.dtype))
    import jax

    # A histogram, added up, costs a fraction of a search for each number.
    flat = _whole(ends).reshape(-1, ends.shape[-1])
    counts = jax.vmap(lambda e: xp.zeros(num, e.dtype).at[e].add(1, mode="drop"))(flat)
    return _running_sum(counts).reshape(*ends.shape[:-1], num)


def _order(keys: Array) -> Array:
    """Return the order of numbers in ``[0, 1)`` by their first 32 bits, ties as they stand."""
    words = keys * 2.0**32
    if is_jax_array(words):
        return _packed_order(words)
    if is_torch_array(words):
        return torch.argsort(torch.floor(words), dim=-1, stable=True)
    if words.shape[-1] < _RADIX:
        return np.argsort(np.floor(words), axis=-1, kind="stable")
    # NumPy sorts 16 bits by counting: two passes, the lower half first.
    halves = words.astype(np.uint32)
    order = np.argsort(halves.astype(np.uint16), axis=-1, kind="stable")
    upper = _take((halves >> 16).astype(np.uint16), order)
    return _take(order, np.argsort(upper, axis=-1, kind="stable"))


def _packed_order(words: Array) -> Array:
    """Return the order of numbers below ``2^32``, in JAX.

    XLA sorts integers faster than pairs: the place of each goes into its last bits, and what does
    not fit beside it waits for another pass, the lower bits first.
    """
    import jax.numpy as jnp

    bits = 8 * int64_of(jnp).itemsize
    width = max(1, (words.shape[-1] - 1).bit_length())
    places = jnp.arange(words.shape[-1], dtype=f"uint{bits}")
    order = jnp.broadcast_to(_iota(words), words.shape)
    words = words.astype(places.dtype)
    for start in range(0, 32, bits - width):
        digits = _take(words, order) >> start << width
        sorted_places = jnp.sort(digits | places, axis=-1) & (2**width - 1)
        order = _take(order, sorted_places)
    return order
