"""Which latents of a NumPyro program can be moved, and the coordinates they are moved in.

The twin of :mod:`ppl_diffusion.inference.latent_sites`: continuous latents move on the real line,
all of them together, by NumPyro's own transforms; those whose values can be listed are drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.transforms import Transform, biject_to

from ppl_diffusion.arrays import Array, int64_of
from ppl_diffusion.inference.latent_sites import MAX_VALUES

Latents = Mapping[str, Array]


class RealSite(eqx.Module):
    """A continuous latent.

    :param name: its name.
    :param transform: from real numbers to its support.
    :param shape: of one particle's value; ``real`` that of its coordinates.
    """

    name: str = eqx.field(static=True)
    transform: Transform
    shape: tuple[int, ...] = eqx.field(static=True)
    real: tuple[int, ...] = eqx.field(static=True)

    @property
    def size(self) -> int:
        """How many real coordinates it has."""
        return math.prod(self.real)

    def flat(self, value: Array) -> Array:
        """Return real coordinates, ``(*batch, d)``."""
        coordinates = self.transform._inverse(value)
        return coordinates.reshape(*value.shape[: value.ndim - len(self.shape)], self.size)

    def back(self, flat: Array) -> tuple[Array, Array]:
        """Return values and the log of the volume they were stretched by, ``(*batch,)``."""
        coordinates = flat.reshape(*flat.shape[:-1], *self.real)
        value = self.transform(coordinates)
        volume = self.transform.log_abs_det_jacobian(coordinates, value)
        return value, volume.reshape(*flat.shape[:-1], -1).sum(-1)


class DiscreteSite(eqx.Module):
    """A latent whose values can be listed.

    :param name: its name.
    :param values: all of them, ``(K, *event)``.
    :param shape: of one particle's value.
    """

    name: str = eqx.field(static=True)
    values: Array
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def elements(self) -> int:
        """How many elements of plates it has."""
        return math.prod(self.shape[: len(self.shape) - self.values.ndim + 1])

    def index(self, value: Array) -> Array:
        """Return which of the values each element has, integers ``(*batch, elements)``."""
        rows = self._rows(value)[..., None, :] == self.values.reshape(len(self.values), -1)
        return rows.all(-1).argmax(-1).astype(int64_of(jnp))

    def with_element(self, value: Array, element: Array, index: Array) -> Array:
        """Return values with one element set.

        :param index: which of the values, ``(*batch,)``.
        """
        rows = self._rows(value)
        new = self.values.reshape(len(self.values), -1)[index].astype(value.dtype)
        return rows.at[..., element, :].set(new).reshape(value.shape)

    def _rows(self, value: Array) -> Array:
        batch = value.shape[: value.ndim - len(self.shape)]
        return value.reshape(*batch, self.elements, -1)


class LatentSites(eqx.Module):
    """The latents of a program, by how they move.

    :param reals: continuous ones.
    :param discrete: those whose values can be listed.
    :param left: why the others are carried as they were drawn, by name.
    :param listed: names of all latents of discrete support.
    """

    reals: tuple[RealSite, ...] = ()
    discrete: tuple[DiscreteSite, ...] = ()
    left: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())
    listed: tuple[str, ...] = eqx.field(static=True, default=())

    @property
    def names(self) -> list[str]:
        """Names of the latents that move."""
        return [site.name for site in self.reals] + [site.name for site in self.discrete]

    @property
    def size(self) -> int:
        """How many real coordinates there are."""
        return sum(site.size for site in self.reals)

    def flat(self, latents: Latents) -> Array:
        """Return the real coordinates, ``(*batch, d)``."""
        return jnp.concatenate([site.flat(latents[site.name]) for site in self.reals], -1)

    def back(self, flat: Array, latents: Latents) -> tuple[dict[str, Array], Array]:
        """Return latents at other coordinates, and the log of the volume, ``(*batch,)``.

        :param latents: all latents; those without coordinates keep their values.
        """
        moved, volume, at = dict(latents), jnp.zeros(flat.shape[:-1]), 0
        for site in self.reals:
            value, own = site.back(flat[..., at : (at := at + site.size)])
            moved[site.name] = value.astype(latents[site.name].dtype)
            volume = volume + own
        return moved, volume


def latent_sites(
    found: Mapping[str, Any], names: Sequence[str], known: Mapping[str, str]
) -> LatentSites:
    """Return how latents can be moved.

    :param found: a trace of the program.
    :param names: the latents.
    :param known: those that cannot be, and why.
    """
    reals: list[RealSite] = []
    discrete: list[DiscreteSite] = []
    left: list[tuple[str, str]] = []
    for name in names:
        site = known[name] if name in known else _site(name, found[name])
        if isinstance(site, RealSite):
            reals.append(site)
        elif isinstance(site, DiscreteSite):
            discrete.append(site)
        else:
            left.append((name, site))
    whole = tuple(name for name in names if found[name]["fn"].support.is_discrete)
    return LatentSites(tuple(reals), tuple(discrete), tuple(left), whole)


def _site(name: str, found: Mapping[str, Any]) -> RealSite | DiscreteSite | str:
    """Return a latent that can be moved, or why it cannot."""
    fn, shape = found["fn"], jnp.shape(found["value"])
    inner = _innermost(fn)
    if isinstance(inner, dist.MaskedDistribution):
        return "the program masks it"
    if isinstance(inner, dist.Delta | dist.ImproperUniform):
        return "it has no density of its own"
    if fn.support.is_discrete:
        values = _listed(fn)
        if values is None:
            return "its values cannot be listed"
        if len(values) > MAX_VALUES:
            return f"it has more than {MAX_VALUES} values"
        return DiscreteSite(name, values.reshape(len(values), *fn.event_shape), shape)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        return "no transform of its support to real numbers is known"
    real = jax.eval_shape(transform._inverse, found["value"]).shape
    return RealSite(name, transform, shape, real)


def _listed(fn: Any) -> Array | None:
    """Return all values of a discrete distribution; None where elements differ in them."""
    try:
        values: Array = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values


def _innermost(fn: Any) -> Any:
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn
