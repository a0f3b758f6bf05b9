"""Markov moves of latents that leave what particles carry invariant.

Resampling copies latents and nothing makes new ones: after some steps a run holds a few values. So
they are renewed, each particle's given its sequence and the completions behind its look-ahead, by
kernels that leave ``p(path) r(latents) h(path, latents)`` alone. Weights stay; the carried
look-ahead is replaced by that of the new latents. Candidates are compared with the look-ahead that
is *carried*, never with one made again: what a program draws anew would favour lucky noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_diffusion.inference.latent_sites import Coordinates, DiscreteSite
from ppl_diffusion.processes.noise import draw_categorical, uniforms
from ppl_diffusion.programs.ahead import Ahead, Rated
from ppl_diffusion.smc.feynman_kac import take_particles
from ppl_diffusion.smc.portable import portable

LEAPFROGS, STEP, JITTER = 4, 0.5, 0.2
"""Steps of a Hamiltonian move, their size in units of the spread, and how far it varies."""

MAX_ASKED = 64
"""Rows that a sweep over discrete latents asks for, per particle."""


@dataclass(frozen=True)
class Spot:
    """Where particles stand: latents, their worth, and what else changes with them.

    :param latents: values ``(R, N, ...)``.
    :param log_h: the carried look-ahead, ``(R, N)``.
    :param log_r: log of what latents are drawn with, ``(R, N)``.
    :param slots: entries of the state that depend on them.
    :param log_path: log-probability of the path so far, ``(R, N)``, where that depends on them.
    """

    latents: dict[str, Tensor]
    log_h: Tensor
    log_r: Tensor
    slots: dict[str, Any]
    log_path: Tensor | None = None

    @property
    def level(self) -> Tensor:
        """What moves leave invariant: ``log h + log r``, and the path's own law if that moves."""
        level = self.log_h + self.log_r
        return level if self.log_path is None else level + self.log_path

    def at(self, latents: dict[str, Tensor], rated: Rated) -> Spot:
        """Return where particles would stand with other latents."""
        return Spot(latents, rated.log_h, rated.log_r, rated.slots, rated.log_path)

    def where(self, chosen: Tensor, other: Spot) -> Spot:
        """Return the other spot where it is chosen, bool ``(R, N)``."""
        return Spot(
            chosen_of(chosen, other.latents, self.latents),
            torch.where(chosen, other.log_h, self.log_h),
            torch.where(chosen, other.log_r, self.log_r),
            chosen_of(chosen, other.slots, self.slots),
            None if self.log_path is None else chosen_of(chosen, other.log_path, self.log_path),
        )


def chosen_of(chosen: Tensor, new: Any, old: Any) -> Any:
    """Return new values of the chosen particles, also in nested dictionaries.

    :param chosen: bool ``(R, N)``.
    """
    if isinstance(old, Mapping):
        return {name: chosen_of(chosen, new[name], old[name]) for name in old if name in new}
    return torch.where(chosen.reshape(*chosen.shape, *[1] * (new.ndim - 2)), new, old)


@portable
@dataclass(frozen=True)
class RealMove:
    """A kernel on real coordinates, scaled to a cloud of particles.

    :param kernel: ``"random-walk"`` or ``"hmc"``.
    :param root: a root ``L`` of the covariance ``L L'``, float64 ``(R, d, d)`` or ``(1, d, d)``.
    :param scale: its step in units of what is usual for the dimension.
    """

    kernel: str
    root: Tensor
    scale: float = 1.0

    def __call__(
        self, spot: Spot, ahead: Ahead, real: Coordinates, generator: Any = None
    ) -> tuple[Spot, Tensor]:
        """Return where particles stand after one move, and which of them moved, bool ``(R, N)``."""
        move = hamiltonian if self.kernel == "hmc" else random_walk
        return move(self, spot, ahead, real, generator)

    @property
    def gradients(self) -> int:
        """Rows that are differentiated per completion and move."""
        return LEAPFROGS + 1 if self.kernel == "hmc" else 0


def random_walk(
    move: RealMove, spot: Spot, ahead: Ahead, real: Coordinates, generator: Any = None
) -> tuple[Spot, Tensor]:
    """Propose a Gaussian step of all coordinates together (Metropolis)."""
    here = real.flat(spot.latents)
    noise = torch.randn(here.shape, dtype=torch.float64, generator=generator, device=here.device)
    step = move.scale * 2.38 / math.sqrt(here.shape[-1])
    there = here + step * noise @ move.root.mT
    latents, volume = real.back(there, spot.latents)
    proposed = spot.at(latents, ahead(latents))
    _, before = real.back(here, spot.latents)
    log_ratio = proposed.level + volume - spot.level - before
    return _accepted(spot, proposed, log_ratio, generator)


def hamiltonian(
    move: RealMove, spot: Spot, ahead: Ahead, real: Coordinates, generator: Any = None
) -> tuple[Spot, Tensor]:
    """Follow the gradient of the program for some leapfrog steps (Duane et al. 1987; Neal 2011)."""
    root, start = move.root, real.flat(spot.latents)
    noise = torch.randn(start.shape, dtype=torch.float64, generator=generator, device=start.device)
    # One step size per run: drawn for each particle it would do as well, and cost the same.
    spread = uniforms((len(start), 1, 1), generator=generator, device=start.device)
    step = move.scale * STEP * (1 - JITTER + 2 * JITTER * spread)
    place, speed = start, noise
    force, _, before = _force(place, spot, ahead, real)
    for _ in range(LEAPFROGS):
        speed = speed + step / 2 * force @ root
        place = place + step * speed @ root.mT
        force, proposed, volume = _force(place, spot, ahead, real)
        speed = speed + step / 2 * force @ root
    kinetic = (speed.square().sum(-1) - noise.square().sum(-1)) / 2
    log_ratio = proposed.level + volume - spot.level - before - kinetic
    return _accepted(spot, proposed, log_ratio, generator)


def _force(
    place: Tensor, spot: Spot, ahead: Ahead, real: Coordinates
) -> tuple[Tensor, Spot, Tensor]:
    """Return the gradient of the log-density of coordinates, the spot there, and the volume."""
    with torch.enable_grad():
        here = place.detach().requires_grad_()
        latents, volume = real.back(here, spot.latents)
        rated = ahead(latents)
        # The sum over particles has each one's own gradient: no particle sees another.
        total = (rated.log_h + rated.log_r + volume).nan_to_num(0.0, 0.0, 0.0).sum()
        (force,) = torch.autograd.grad(total + 0.0 * here.sum(), here)
    there = spot.at(_detached(latents), Rated(*_detached(rated._asdict()).values()))
    return force, there, volume.detach()


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _detached(item) for name, item in value.items()}
    return None if value is None else value.detach()


def _accepted(spot: Spot, proposed: Spot, log_ratio: Tensor, generator: Any) -> tuple[Spot, Tensor]:
    """Accept by the ratio; what has no density, or is no number, is never gone to."""
    noise = uniforms(log_ratio.shape, generator=generator, device=log_ratio.device)
    taken = (noise.log() < log_ratio) & (proposed.log_r > -torch.inf)
    return spot.where(taken, proposed), taken


def gibbs(
    spot: Spot, ahead: Ahead, site: DiscreteSite, generator: Any = None, limit: int = MAX_ASKED
) -> tuple[Spot, Tensor]:
    """Draw a discrete latent from its law given all else, one element of its plates at a time.

    All other values of an element are asked about side by side. Of more than fit into ``limit``
    rows a random subset is, of the elements, or of the values if there are more of those: whoever
    is in it, each value would have met the same others.

    :returns: where particles stand, and the share of elements that changed, ``(R, N)``.
    """
    total = len(site.values)
    others = min(total - 1, limit)
    elements = site.index(spot.latents[site.name]).shape[-1]
    some = max(1, limit // max(others, 1))
    chosen = uniforms((elements,), generator=generator, device="cpu").argsort()[:some].tolist()
    changed = torch.zeros_like(spot.log_h)
    for element in chosen if others else ():
        spot, moved = _gibbs_element(spot, ahead, site, element, others, generator)
        changed = changed + moved / len(chosen)
    return spot, changed


def _gibbs_element(
    spot: Spot, ahead: Ahead, site: DiscreteSite, element: int, others: int, generator: Any
) -> tuple[Spot, Tensor]:
    runs, size = spot.log_h.shape
    here = site.index(spot.latents[site.name])[..., element]  # (R, N)
    device, total = here.device, len(site.values)
    ahead_by = 1 + torch.arange(total - 1, device=device)
    if others < total - 1:
        shuffled = uniforms((runs, size, total - 1), generator=generator, device=device)
        ahead_by = 1 + shuffled.argsort(-1)[..., :others]
    index = (here[..., None] + ahead_by) % total  # (R, N, others)
    parent = torch.arange(size, device=device).repeat_interleave(others).expand(runs, -1)
    latents = take_particles(spot.latents, parent)
    latents[site.name] = _with_element(latents[site.name], site, element, index.flatten(1))
    proposed = spot.at(latents, ahead.take(parent)(latents))
    usable = (proposed.log_r > -torch.inf) & ~proposed.level.isnan()
    level = torch.where(usable, proposed.level, -torch.inf).reshape(runs, size, others)
    # The value that is held keeps the look-ahead that is carried: with its noise, it is one draw
    # of the values side by side like all others.
    held = spot.level.nan_to_num(-torch.inf, -torch.inf, -torch.inf)[..., None]
    nowhere = torch.maximum(held, level.amax(-1, keepdim=True)) == -torch.inf  # dead particles
    levels = torch.cat([torch.where(nowhere, 0.0, held), level], -1)
    noise = uniforms((runs, size), generator=generator, device=device)
    taken = draw_categorical(levels - levels.amax(-1, keepdim=True), noise)
    child = torch.arange(size, device=device) * others + (taken - 1).clamp_min(0)
    there = Spot(**take_particles(vars(proposed), child))
    return spot.where(taken > 0, there), (taken > 0).to(torch.float64)


def _with_element(value: Tensor, site: DiscreteSite, element: int, index: Tensor) -> Tensor:
    """Return values with one element set, ``(R, M, ...)``."""
    event = site.values.shape[1:]
    rows = value.reshape(*value.shape[:2], -1, *event).clone()
    rows[:, :, element] = site.values.to(value)[index]
    return rows.reshape(value.shape)
