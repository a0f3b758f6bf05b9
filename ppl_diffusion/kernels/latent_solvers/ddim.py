"""The steps that keep some of the noise (DDIM, Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import LatentSolver
from ppl_diffusion.processes.gaussian import Gaussian


@dataclass(frozen=True)
class DDIM(LatentSolver):
    """A step that draws the share ``eta`` of its noise anew.

    :param eta: 0 is deterministic and has no density, 1 is :class:`Ancestral`.
    :raises ValueError: if ``eta`` is not in ``[0, 1]``.
    """

    name: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM: eta must lie in [0, 1], got {self.eta}.")

    def estimate(self, process: Gaussian, latent: Tensor, prediction: Tensor, *step: Any) -> Tensor:
        """Return the prediction."""
        return prediction
