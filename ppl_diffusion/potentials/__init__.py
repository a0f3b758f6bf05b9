"""Log-potentials: rewards, likelihoods and constraints on clean sequences."""

from ppl_diffusion.potentials.base import AbstractPotential as AbstractPotential
from ppl_diffusion.potentials.base import Potential as Potential
from ppl_diffusion.potentials.base import ScaledPotential as ScaledPotential
from ppl_diffusion.potentials.base import SumPotential as SumPotential
from ppl_diffusion.potentials.constraints import AbstractConstraint as AbstractConstraint
from ppl_diffusion.potentials.constraints import Constraint as Constraint
from ppl_diffusion.potentials.constraints import ForbiddenMotif as ForbiddenMotif
from ppl_diffusion.potentials.constraints import GCContent as GCContent
from ppl_diffusion.potentials.constraints import RequiredMotif as RequiredMotif
from ppl_diffusion.potentials.embedded import EmbeddedPotential as EmbeddedPotential
from ppl_diffusion.potentials.embedded import GaussianMeasurement as GaussianMeasurement
from ppl_diffusion.potentials.evaluation import SequenceFunction as SequenceFunction
from ppl_diffusion.potentials.factor import PotentialFactor as PotentialFactor
from ppl_diffusion.potentials.factor import factor as factor
from ppl_diffusion.potentials.motif_entries import Motif as Motif
from ppl_diffusion.potentials.motif_files import find_motif as find_motif
from ppl_diffusion.potentials.motif_files import read_jaspar as read_jaspar
from ppl_diffusion.potentials.motif_files import read_meme as read_meme
from ppl_diffusion.potentials.motif_files import read_motifs as read_motifs
from ppl_diffusion.potentials.motifs import MotifMatrix as MotifMatrix
from ppl_diffusion.potentials.processes import Processes as Processes
from ppl_diffusion.potentials.rewards import Likelihood as Likelihood
from ppl_diffusion.potentials.rewards import Reward as Reward
from ppl_diffusion.potentials.text import ClassifierReward as ClassifierReward
from ppl_diffusion.potentials.text import PretrainedClassifier as PretrainedClassifier
from ppl_diffusion.potentials.threads import Threads as Threads
