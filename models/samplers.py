"""Ways to run a prior: the named samplers, each a reverse chain with its own law.

A sampler is a function ``(program, settings) -> kernel`` under a name in :data:`SAMPLERS`.
Filters, where asked for, are put around the program's denoiser first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppl_diffusion.denoisers.base import Denoiser
from ppl_diffusion.denoisers.filters import Nucleus, Temperature
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel, Kernel, OrderedKernel, Process, PsiSchedule
from ppl_diffusion.kernels.confidence import ConfidenceKernel
from ppl_diffusion.kernels.psi import parse_psi
from ppl_diffusion.models.latent import LatentDiffusion
from ppl_diffusion.models.program import DiffusionProgram

DEFAULT_STEPS = 64
DEFAULT_PSI = {True: "remdm-cap:0.02", False: "constant:0.95,t_on=0.5,t_off=0.1"}
"""The schedule of the sampler ``psi`` where none is given: for masks, and for other processes."""


@dataclass(frozen=True)
class SamplerSettings:
    """What can be asked of a sampler; each refuses what it does not know.

    :param num_steps: number of steps, for reveals in groups the largest allowed; None for the
        sampler's own.
    :param kappa_schedule: a Psi schedule, as :func:`~ppl_diffusion.kernels.psi.parse_psi` reads it.
    :param block: positions per block, from left to right.
    :param filters: ``nucleus:P``, ``nucleus-drop:P`` or ``temperature:T``, applied in order.
    :param path: of a prior with a latent, a name out of :data:`ppl_diffusion.kernels.path.PATHS`.
    :param latent_steps: steps of the latent on the path ``seq``.
    :param token_steps: steps of the tokens on it.
    """

    num_steps: int | None = None
    kappa_schedule: str | None = None
    block: int | None = None
    filters: Sequence[str] = ()
    path: str | None = None
    latent_steps: int | None = None
    token_steps: int | None = None


def make_chain(
    program: DiffusionProgram, sampler: str = "ancestral", settings: SamplerSettings | None = None
) -> ReverseChain:
    """Return a prior's reverse chain under a named sampler.

    :param sampler: one of :data:`SAMPLERS`.
    :raises ValueError: if the sampler, a filter or a schedule is unknown, or the sampler does not
        take one of the settings.
    :raises CapabilityError: if the prior's process cannot be run that way.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    settings = settings or SamplerSettings()
    known, build = SAMPLERS[sampler]
    for name, option in _OPTIONS.items():
        if getattr(settings, name) is not None and name not in known:
            raise ValueError(f"The sampler {sampler!r} takes no {option}: leave it out.")
    if isinstance(program, LatentDiffusion):
        return _along_path(program, sampler, settings)
    if program.fixed_steps is not None and (sampler != "ancestral" or settings.filters):
        raise ValueError(
            f"{program.name} has learned noise, whose chain draws the next state itself: there is "
            "one sampler, 'ancestral', and no filter; leave --sampler and --filter out."
        )
    for name, option in _OF_PATHS.items():
        if getattr(settings, name) is not None:
            raise ValueError(
                f"{program.name} draws no latent beside its tokens, so it has no {option}: leave "
                "it out, or choose a latent prior."
            )
    if program.fixed_steps is not None:
        return program.chain(settings.num_steps)
    program = copy.copy(program)
    program.denoiser = filtered(program.denoiser, settings.filters)
    return program.around(build(program, settings))


def _along_path(program: LatentDiffusion, sampler: str, settings: SamplerSettings) -> ReverseChain:
    """Return the chain of tokens and a latent."""
    if sampler != "ancestral":
        raise ValueError(
            f"{program.name} draws a latent beside its tokens, which the sampler {sampler!r} does "
            "not: leave it out, and choose a --path."
        )
    if settings.filters:
        raise ValueError(
            f"{program.name} draws a latent beside its tokens, and filters know tokens alone: "
            "leave --filter out."
        )
    both = (settings.latent_steps, settings.token_steps)
    first, alone = settings.path in (None, "seq"), both == (None, None)
    if (settings.path is not None and alone and settings.num_steps is None) or not (
        alone or (first and None not in both and settings.num_steps is None)
    ):
        wanted = "--steps, or both --latent-steps and --token-steps" if first else "--steps"
        name = settings.path or "seq"
        raise ValueError(f"{program.name}: the path {name!r} takes {wanted}; give just that.")
    return program.chain(
        settings.path,
        num_steps=settings.num_steps,
        latent_steps=settings.latent_steps,
        token_steps=settings.token_steps,
    )


def filtered(denoiser: Denoiser, filters: Sequence[str]) -> Denoiser:
    """Return a denoiser behind filters given as text."""
    for text in filters:
        name, _, number = text.partition(":")
        if name not in FILTERS:
            known = ", ".join(FILTERS)
            raise ValueError(f"There is no filter {text!r}: choose of {known}, as in nucleus:0.9.")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"The filter {text!r} needs a number: write {name}:0.9.") from None
        denoiser = FILTERS[name](denoiser, value)
    return denoiser


FILTERS: Mapping[str, Callable[[Denoiser, float], Denoiser]] = {
    "nucleus": Nucleus,
    "nucleus-drop": lambda denoiser, p: Nucleus(denoiser, p, keep_crossing=False),
    "temperature": Temperature,
}
"""Filters by name; the two nuclei keep or drop the token that crosses the threshold."""


def _ancestral(program: DiffusionProgram, settings: SamplerSettings) -> Kernel:
    steps = settings.num_steps or DEFAULT_STEPS
    return InterpolatingKernel(program.process, program.denoiser, num_steps=steps)


def _psi(program: DiffusionProgram, settings: SamplerSettings) -> Kernel:
    process, text = program.process, settings.kappa_schedule
    text = DEFAULT_PSI[process.absorbing] if text is None else text
    psi = _parse_within(text, process, settings.num_steps or DEFAULT_STEPS)
    return InterpolatingKernel(process, program.denoiser, psi=psi)


def _parse_within(text: str, process: Process, num_steps: int) -> PsiSchedule:
    asked = parse_psi(text, process.schedule, num_steps)
    # A process may not allow the last steps of ReMDM's family; 2 % of the corrections may go.
    psi = asked.within(process)
    if asked.expected_corrections - psi.expected_corrections > 0.02 * asked.expected_corrections:
        k = int(np.argmax(psi.kappa - asked.kappa))
        raise ValueError(
            f"kappa schedule {text!r}: kappa = {asked.kappa[k]:.4g} at step {k} would make a "
            f"probability negative, this process allows {psi.kappa[k]:.4g}; correct less."
        )
    return psi


def _confidence(program: DiffusionProgram, settings: SamplerSettings) -> Kernel:
    process, steps = program.process, settings.num_steps or DEFAULT_STEPS
    if settings.kappa_schedule is None:
        return ConfidenceKernel(process, program.denoiser, num_steps=steps)
    psi = _parse_within(settings.kappa_schedule, process, steps)
    return ConfidenceKernel(process, program.denoiser, psi=psi)


def _parallel(program: DiffusionProgram, settings: SamplerSettings) -> Kernel:
    steps = settings.num_steps or DEFAULT_STEPS
    return _ordered(program, group_size=_smallest_group(program.length, program.length, steps))


def _semi_autoregressive(program: DiffusionProgram, settings: SamplerSettings) -> Kernel:
    block = max(1, program.length // 8) if settings.block is None else settings.block
    size = _smallest_group(program.length, min(block, program.length), settings.num_steps)
    return _ordered(program, group_size=size, block=block)


def _ordered(program: DiffusionProgram, **options: Any) -> Kernel:
    return OrderedKernel(program.process, program.denoiser, length=program.length, **options)


def _smallest_group(length: int, block: int, num_steps: int | None) -> int:
    """Return the reveals per step with which all blocks take at most so many steps."""
    if num_steps is None:
        return 1
    sizes = [min(block, length - start) for start in range(0, length, block)]
    if num_steps < len(sizes):
        raise ValueError(
            f"{len(sizes)} blocks of {block} positions need at least as many steps, got "
            f"{num_steps}: give more --steps, or a larger --block."
        )
    return next(g for g in range(1, block + 1) if sum(-(-n // g) for n in sizes) <= num_steps)


_OF_PATHS = {
    "path": "--path",
    "latent_steps": "--latent-steps",
    "token_steps": "--token-steps",
}
_OPTIONS = {"num_steps": "--steps", "kappa_schedule": "--kappa-schedule", "block": "--block"}

Build = Callable[[DiffusionProgram, SamplerSettings], Kernel]

SAMPLERS: Mapping[str, tuple[frozenset[str], Build]] = {
    "ancestral": (frozenset({"num_steps"}), _ancestral),
    "psi": (frozenset({"num_steps", "kappa_schedule"}), _psi),
    "confidence": (frozenset({"num_steps", "kappa_schedule"}), _confidence),
    "first-hitting": (frozenset(), lambda program, _: _ordered(program, clock="sampled")),
    "parallel": (frozenset({"num_steps"}), _parallel),
    "semi-autoregressive": (frozenset({"num_steps", "block"}), _semi_autoregressive),
}
"""Samplers by name: the settings each takes, and its kernel."""
