"""The rule about latents of particles: how many values of a continuous one are left."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_diffusion.smc.particle_rules import living, worst
from ppl_diffusion.smc.run_statistics import as_array, effective_distinct
from ppl_diffusion.smc.verdict import Verdict

# Known by its fields: naming the class, whose ``warnings`` come from here, would close a circle.
ParticlePosterior = Any
Floats = NDArray[np.float64]

LATENT = 10.0
DISCRETE = "discrete_latents"
"""The setting that names latents of discrete support, whose values may well be floats."""


def latent(posterior: ParticlePosterior) -> Verdict | None:
    """Judge how many distinct values of a continuous latent are left."""
    runs = living(posterior)
    weights = as_array(posterior.weights)[runs]
    limit = min(LATENT, posterior.num_particles / 4)
    least: tuple[float, str, int, str] | None = None
    for name, values in continuous(posterior):
        for numbers in _elements(values, runs):
            found = effective_distinct(numbers, weights)
            bad = found < limit
            if bad.any():
                at, _, others = worst(found, runs, bad)
                if least is None or found[at] < least[0]:
                    least = (float(found[at]), name, int(runs[at]), others)
    if least is None:
        return None
    value, name, run, others = least
    return Verdict(
        f"latent {name!r}: {value:.3g} effective distinct values among {posterior.num_particles} "
        f"particles of run {run}{others} (limit {limit:g}); {_instead(posterior, name)}.",
        kind="latent",
        level="broken",
        where=f"{name}, run {run}",
        value=value,
        limit=limit,
    )


def _instead(posterior: ParticlePosterior, name: str) -> str:
    left = (posterior.settings.get("latent_moves") or {}).get("left") or {}
    gibbs = "" if posterior.settings.get(DISCRETE) else ", or ParticleGibbs"
    if left.get(name) == "moves=None":
        return f"move latents (moves='auto'), or use more particles or runs{gibbs}"
    why = f"it was carried as it was drawn ({left[name]}): " if left.get(name) else ""
    return f"{why}use more particles or runs{gibbs}"


def continuous(posterior: Any) -> Iterable[tuple[str, Tensor]]:
    """Yield the names and values of continuous latents, by the supports that the program gave.

    Where these are not known, values that are all whole numbers are taken to be discrete.

    :param posterior: particles or chains.
    """
    known: Collection[str] | None = posterior.settings.get(DISCRETE)
    for name in posterior.law.latents:
        values = posterior.samples.get(name)
        if values is None or not values.is_floating_point():
            continue
        whole = bool((values == values.round()).all()) if known is None else name in known
        if not whole:
            yield name, values.double()


def _elements(values: Tensor, runs: NDArray[np.int64]) -> Iterable[Floats]:
    """Yield every number of a continuous latent, ``(living runs, N)`` each."""
    if not len(runs):
        return
    flat = as_array(values.flatten(2) if values.ndim > 2 else values[..., None])[runs]
    varies = (flat != flat[:1, :1]).any((0, 1))
    # One value in all runs is no collapse: they would have kept different ones. Nor is one of a
    # number that is fixed beside others that are not (triangular matrices).
    judged = varies if len(runs) > 1 or varies.any() else ~varies
    yield from (flat[:, :, number] for number in np.flatnonzero(judged))
