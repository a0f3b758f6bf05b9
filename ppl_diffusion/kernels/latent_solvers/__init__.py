"""Solvers: how a continuous latent goes from one level to the next."""

from ppl_diffusion.kernels.latent_solvers.ancestral import Ancestral as Ancestral
from ppl_diffusion.kernels.latent_solvers.base import History as History
from ppl_diffusion.kernels.latent_solvers.base import LatentSolver as LatentSolver
from ppl_diffusion.kernels.latent_solvers.base import Level as Level
from ppl_diffusion.kernels.latent_solvers.ddim import DDIM as DDIM
