"""The sampler of DINOISER, in which the network is told of more noise than there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor

from ppl_diffusion.kernels.latent_solvers.base import History, LatentSolver, Level
from ppl_diffusion.processes.gaussian import Gaussian


@dataclass(frozen=True)
class TwoGrids(LatentSolver):
    """DDIM on two grids of levels, CeDi of DINOISER (Ye et al. 2023, arXiv:2302.10025).

    The state goes down the levels of its path while the network is told labels between 1 and
    ``lowest``, so that it trusts the state little and must read what else it is given. The noise is
    read off with the signal and noise of the label, hence another law than that of :class:`DDIM`
    unless the grids are one.

    :param lowest: label at level 0; labels are linear in the level. 0 is :class:`DDIM`.
    :raises ValueError: if ``lowest`` is not in ``[0, 1]``.
    """

    lowest: float = 0.99

    name = "two grids"
    order = 1
    eta = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lowest <= 1.0:
            raise ValueError(f"TwoGrids: lowest must lie in [0, 1], got {self.lowest}.")

    def label(self, u: Level) -> Level:
        """Return the label of a level."""
        return self.lowest + (1.0 - self.lowest) * u

    def estimate(self, process: Gaussian, latent: Tensor, prediction: Tensor, *step: Any) -> Tensor:
        """Return the prediction."""
        return prediction

    def law(
        self,
        process: Gaussian,
        latent: Tensor,
        prediction: Tensor,
        u: Level,
        s: Level,
        history: History,
    ) -> TorchDistribution:
        """Return the point that the step of DDIM from the *label* of ``u`` reaches."""
        return super().law(process, latent, prediction, self.label(u), s, history)
