"""Uniform diffusion: tokens are replaced by random ones (UDLM, arXiv 2412.10193)."""

from __future__ import annotations

from typing import ClassVar

from ppl_diffusion.kernels import Uniform
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.processes.schedules import Schedule


class UniformDiffusion(DiffusionProgram):
    """A prior whose forward process redraws tokens uniformly; see :class:`DiffusionProgram`.

    Every token may change at every step, so mistakes can be mended; the price is a looser bound.
    The denoiser must be trained as a cavity (the NELBO does that) or declare itself a posterior.
    """

    family: ClassVar[str] = "uniform"

    @staticmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Uniform:
        return Uniform(vocab_size, schedule)
