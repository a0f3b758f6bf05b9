"""The step of the reversed forward process (DDPM, Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import LatentSolver
from ppl_diffusion.processes.gaussian import Gaussian


@dataclass(frozen=True)
class Ancestral(LatentSolver):
    """The exact posterior of the forward process with the prediction in place of the clean latent.

    It is also the first-order SDE form of DPM-Solver++: the two have one formula.
    """

    name: ClassVar[str] = "ancestral"
    order: ClassVar[int] = 1
    eta: ClassVar[float] = 1.0

    def estimate(self, process: Gaussian, latent: Tensor, prediction: Tensor, *step: Any) -> Tensor:
        """Return the prediction."""
        return prediction
