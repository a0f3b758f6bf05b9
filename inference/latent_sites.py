"""Which latents can be moved, and the real coordinates they are moved in.

A latent with a continuous support is moved on the real line and back by Pyro's own transforms
(``biject_to``), all of them together; one whose values can be listed is drawn anew from its
conditional law, element by element. What is left is carried as it was drawn, and said by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from ppl_diffusion.programs.reading import Program

Latents = Mapping[str, Tensor]

MAX_VALUES = 10_000
"""Values of a discrete latent that are listed; beyond, nobody would reach them one by one."""


@dataclass(frozen=True)
class RealSite:
    """A continuous latent.

    :param name: its name.
    :param transform: from real numbers to its support.
    """

    name: str
    transform: Transform

    def flat(self, value: Tensor) -> Tensor:
        """Return real coordinates, float64 ``(R, N, d)``."""
        real: Tensor = self.transform.inv(value.to(torch.float64))
        return real.flatten(2) if real.ndim > 2 else real[..., None]

    def back(self, flat: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and the log of the volume they were stretched by, ``(R, N)``.

        :param flat: real coordinates ``(R, N, d)``.
        :param like: a value, whose type is kept.
        """
        real = flat.reshape(*flat.shape[:2], *self.transform.inverse_shape(like.shape[2:]))
        value = self.transform(real)
        volume = self.transform.log_abs_det_jacobian(real, value)
        volume = volume.flatten(2).sum(-1) if volume.ndim > 2 else volume
        return value.to(like.dtype), volume

    def size(self, value: Tensor) -> int:
        """Return how many real coordinates it has."""
        return torch.Size(self.transform.inverse_shape(value.shape[2:])).numel()


@dataclass(frozen=True)
class DiscreteSite:
    """A latent whose values can be listed.

    :param name: its name.
    :param values: all of them, ``(K, *event)``.
    """

    name: str
    values: Tensor

    def index(self, value: Tensor) -> Tensor:
        """Return which of the values each element has, int64 ``(R, N, elements)``."""
        event = self.values.shape[1:]
        rows = value.reshape(*value.shape[:2], -1, 1, *event)
        same = rows == self.values.to(value)
        return (same.flatten(4).all(-1) if event else same).to(torch.int8).argmax(-1)


@dataclass(frozen=True)
class Coordinates:
    """Continuous latents as one real vector per particle.

    :param sites: the latents.
    """

    sites: tuple[RealSite, ...]

    def of(self, latents: Latents) -> Coordinates:
        """Return the coordinates of those that are drawn already."""
        return Coordinates(tuple(site for site in self.sites if site.name in latents))

    def size(self, latents: Latents) -> int:
        """Return how many coordinates there are."""
        return sum(site.size(latents[site.name]) for site in self.sites)

    def flat(self, latents: Latents) -> Tensor:
        """Return the coordinates, float64 ``(R, N, d)``."""
        return torch.cat([site.flat(latents[site.name]) for site in self.sites], -1)

    def back(self, flat: Tensor, latents: Latents) -> tuple[dict[str, Tensor], Tensor]:
        """Return latents at other coordinates, and the log of the volume, ``(R, N)``.

        :param flat: the coordinates.
        :param latents: all latents; those without coordinates keep their values.
        """
        sizes = [site.size(latents[site.name]) for site in self.sites]
        moved, volume = dict(latents), torch.zeros_like(flat[..., 0])
        for site, part in zip(self.sites, flat.split(sizes, -1), strict=True):
            moved[site.name], own = site.back(part, latents[site.name])
            volume = volume + own
        return moved, volume


@dataclass(frozen=True)
class LatentSites:
    """The latents of a program, by how they move.

    :param real: continuous ones.
    :param discrete: those whose values can be listed.
    :param left: why the others are carried as they were drawn.
    """

    real: Coordinates = Coordinates(())
    discrete: tuple[DiscreteSite, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the latents that move."""
        real = [site.name for site in self.real.sites]
        return real + [site.name for site in self.discrete]


def latent_sites(program: Program) -> LatentSites:
    """Return how the latents that particles inherit, and no chain depends on, can be moved.

    :param program: the program.
    """
    return movable(program, [name for name in program.carried if name not in program.feeding])


def movable(program: Program, names: Sequence[str]) -> LatentSites:
    """Return how latents can be moved.

    :param program: the program.
    :param names: the latents.
    """
    real: list[RealSite] = []
    discrete: list[DiscreteSite] = []
    left = {n: "its support depends on other sites" for n in names if n in program.bounded}
    left |= {n: "the program masks it" for n in names if n in program.masked}
    if len(left) == len(names):
        return LatentSites(left=left)
    with torch.random.fork_rng(devices=[]):
        nodes = program.trace({}).nodes
    for name in (n for n in names if n not in left):
        site = _site(name, nodes[name]["fn"])
        if isinstance(site, RealSite):
            real.append(site)
        elif isinstance(site, DiscreteSite):
            discrete.append(site)
        else:
            left[name] = site
    return LatentSites(Coordinates(tuple(real)), tuple(discrete), left)


def _site(name: str, fn: Any) -> RealSite | DiscreteSite | str:
    """Return a latent that can be moved, or why it cannot."""
    if isinstance(_innermost(fn), dist.Delta | dist.ImproperUniform):
        return "it has no density of its own"
    if fn.support.is_discrete:
        values = _listed(fn)
        if values is None:
            return "its values cannot be listed"
        values = values.reshape(len(values), *fn.event_shape)
        many = len(values) > MAX_VALUES
        return f"it has more than {MAX_VALUES} values" if many else DiscreteSite(name, values)
    try:
        return RealSite(name, biject_to(fn.support))
    except NotImplementedError:
        return "no transform of its support to real numbers is known"


def _listed(fn: Any) -> Tensor | None:
    """Return all values of a discrete distribution; None where elements differ in them."""
    try:
        values: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn
