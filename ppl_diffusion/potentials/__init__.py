"""Log-potentials: rewards, likelihoods and constraints on clean sequences."""

from ppl_diffusion.potentials.base import AbstractPotential as AbstractPotential
from ppl_diffusion.potentials.base import Potential as Potential
from ppl_diffusion.potentials.base import ScaledPotential as ScaledPotential
from ppl_diffusion.potentials.base import SumPotential as SumPotential
