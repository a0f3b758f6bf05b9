"""Propose reverse chains with sequential Monte Carlo, without changing the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ppl_diffusion.handlers.site import ProposedChain, SiteMessenger
from ppl_diffusion.handlers.steering import Steering, as_steering
from ppl_diffusion.potentials.base import AbstractPotential
from ppl_diffusion.smc.resampling import Resampler
from ppl_diffusion.smc.twists import TwistLike


def _steer(default: Steering | None, site: ProposedChain, msg: Any) -> ProposedChain | None:
    hint = msg["infer"].get("steer", default)
    if hint is None or site.steering is not None:  # the innermost handler has steered it
        return None
    # The hint is written back for inference programs, which read it and run particles themselves.
    msg["infer"]["steer"] = as_steering(hint)
    return site.with_part(steering=msg["infer"]["steer"])


def steer(
    fn: Callable[..., Any] | None = None,
    *,
    potential: AbstractPotential | Callable[[Tensor], Tensor] | None = None,
    num_particles: int = 64,
    resampler: str | Resampler = "systematic",
    ess_threshold: float = 0.5,
    twist: TwistLike = "defensive",
    excludes: bool = False,
) -> Any:
    """Propose each reverse-chain site with sequential Monte Carlo.

    The joint density of the program is unchanged: a site is drawn from a run that targets
    ``p(path) exp(potential)`` and carries the weight ``log Z_hat - potential(x0)``. Any finite
    potential is valid and a bad one only adds variance. Use it around plain Pyro importance
    sampling; a site's own ``infer={"steer": Steering(...)}`` takes precedence.

    :param fn: a program to wrap; without it, use ``steer`` as a context manager. Wrap the
        program for ``pyro.infer.Importance``, which blocks all handlers outside of it.
    :param potential: what to steer towards (optional where sites carry hints).
    :param num_particles: particles of the run behind each draw; 1 is ancestral sampling.
    :param resampler: resampling scheme.
    :param ess_threshold: resample below this fraction of the particles.
    :param twist: look-ahead, as in :class:`~ppl_diffusion.smc.FeynmanKac`.
    :param excludes: see :class:`Steering`.
    :raises ValueError: if no chain site is met.

    Example::

        steered = steer(assay, potential=Reward(dock, temperature=0.1), num_particles=64)
        posterior = pyro.infer.Importance(steered, num_samples=100).run(y)
    """
    steering = None
    if potential is not None:
        steering = Steering(potential, num_particles, resampler, ess_threshold, twist, excludes)
    advice = (
        "give a potential or a site hint, and wrap the model where inference blocks outer handlers"
    )
    return SiteMessenger("steer", partial(_steer, steering), advice=advice).on(fn)
