"""Solvers: how a continuous latent goes from one level to the next."""

from ppl_diffusion.kernels.latent_solvers.ancestral import Ancestral as Ancestral
from ppl_diffusion.kernels.latent_solvers.base import History as History
from ppl_diffusion.kernels.latent_solvers.base import LatentSolver as LatentSolver
from ppl_diffusion.kernels.latent_solvers.base import Level as Level
from ppl_diffusion.kernels.latent_solvers.ddim import DDIM as DDIM
from ppl_diffusion.kernels.latent_solvers.deis import DEIS as DEIS
from ppl_diffusion.kernels.latent_solvers.dpm_solver import DPMSolver as DPMSolver
from ppl_diffusion.kernels.latent_solvers.two_grids import TwoGrids as TwoGrids
from ppl_diffusion.kernels.latent_solvers.wide import Wide as Wide

SOLVERS: dict[str, LatentSolver] = {
    "ancestral": Ancestral(),
    "ddim": DDIM(),
    "dpm-solver++": DPMSolver(),
    "dpm-solver++ sde": DPMSolver(sde=True),
    "deis": DEIS(),
    "two-grids": TwoGrids(),
    "wide": Wide(),
}
"""The published solvers by name; the first is what a chain uses unless told otherwise."""
