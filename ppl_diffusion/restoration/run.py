"""One restoration from a target to its result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.errors import CapabilityError
from ppl_diffusion.inference import SMC, Method
from ppl_diffusion.jobs.checks import InputError, user_input
from ppl_diffusion.restoration.images import Images, decode, sampled
from ppl_diffusion.restoration.judging import summarise
from ppl_diffusion.restoration.target import Target

if TYPE_CHECKING:
    from ppl_diffusion.smc import ParticlePosterior
    from ppl_diffusion.smc.engine import Progress

NUM_SAMPLES = 8


@dataclass(frozen=True)
class Result:
    """A finished restoration.

    :param images: what the particles stand for.
    :param samples: a few draws of them by weight, ``(n, C, H, W)``.
    :param summary: what ``summary.json`` holds.
    """

    target: Target
    posterior: ParticlePosterior
    images: Images
    samples: Tensor
    summary: dict[str, Any]


def restore(target: Target, *, progress: Progress | None = None) -> Result:
    """Sample the posterior of a target, decode it, and judge it.

    :param progress: called with ``(steps done, steps in all)``.
    :raises ParticleCollapse: if no particle has any weight.
    """
    started = time.perf_counter()
    asked = target.potential.num_embedded
    posterior = infer(target, progress)
    embedded = target.potential.num_embedded - asked
    images = decode(target, posterior)
    generator = torch.Generator().manual_seed(target.job.search.seed)
    drawn = posterior.resample(NUM_SAMPLES, generator=generator)
    samples = sampled(target, drawn["x0"], generator)
    summary = {
        **summarise(target, posterior, images),
        "decoder_calls": embedded,
        "seconds": time.perf_counter() - started,
    }
    return Result(target, posterior, images, samples, summary)


def infer(target: Target, progress: Progress | None = None) -> ParticlePosterior:
    """Sample the posterior of a target by the method of its job.

    :raises InputError: if the method cannot.
    """
    search = target.job.search
    method = search.make()
    with user_input():
        runner = SMC(
            _chain(target, method),
            target.potential,
            method=method,
            num_particles=search.num_particles,
            num_runs=search.num_runs,
            resampler=search.resampler or "systematic",
            ess_threshold=search.ess_threshold,
            progress=progress,
        )
    return runner.run(seed=search.seed)


def _chain(target: Target, method: Method) -> ReverseChain:
    """Return the first chain of the prior that a method can move."""
    refused: list[CapabilityError] = []
    for chain in target.chains():
        try:
            method.require(method.source(chain, target.potential))
        except CapabilityError as error:
            refused.append(error)
        else:
            return chain
    raise InputError(str(refused[0]))
