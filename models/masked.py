"""Masked diffusion: tokens are hidden, the network fills them in (MDLM, arXiv 2406.07524)."""

from __future__ import annotations

from typing import ClassVar

from ppl_diffusion.kernels import Absorbing
from ppl_diffusion.models.program import DiffusionProgram
from ppl_diffusion.processes.schedules import Schedule


class MaskedDiffusion(DiffusionProgram):
    """A prior whose forward process masks tokens; see :class:`DiffusionProgram` for the arguments.

    Its optimal denoiser does not depend on the time, so a time-free network loses nothing and its
    outputs can be reused while no token changed.
    """

    family: ClassVar[str] = "masked"

    @staticmethod
    def make_process(vocab_size: int, schedule: Schedule) -> Absorbing:
        """Return the absorbing process; the mask has the id ``vocab_size``."""
        return Absorbing(vocab_size, schedule)
