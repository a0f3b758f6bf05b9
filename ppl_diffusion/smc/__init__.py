"""One sequential Monte Carlo engine: weights, resampling, Feynman-Kac models, posteriors."""

from ppl_diffusion.smc.conditional import ConditionalFeynmanKac as ConditionalFeynmanKac
from ppl_diffusion.smc.conditional import EvidenceBounds as EvidenceBounds
from ppl_diffusion.smc.conditional import conditional_smc as conditional_smc
from ppl_diffusion.smc.conditional import two_sided_evidence as two_sided_evidence
from ppl_diffusion.smc.engine import run_smc as run_smc
from ppl_diffusion.smc.engine import smc_loop as smc_loop
from ppl_diffusion.smc.feynman_kac import FeynmanKac as FeynmanKac
from ppl_diffusion.smc.feynman_kac import Proposal as Proposal
from ppl_diffusion.smc.posterior import ParticlePosterior as ParticlePosterior
from ppl_diffusion.smc.rejuvenation import OrderRefresh as OrderRefresh
from ppl_diffusion.smc.rejuvenation import PathMove as PathMove
from ppl_diffusion.smc.rejuvenation import SuffixRefresh as SuffixRefresh
from ppl_diffusion.smc.rejuvenation import WasteFree as WasteFree
from ppl_diffusion.smc.resampling import RESAMPLERS as RESAMPLERS
from ppl_diffusion.smc.resampling import SSP as SSP
from ppl_diffusion.smc.resampling import Killing as Killing
from ppl_diffusion.smc.resampling import Multinomial as Multinomial
from ppl_diffusion.smc.resampling import Resampler as Resampler
from ppl_diffusion.smc.resampling import Residual as Residual
from ppl_diffusion.smc.resampling import Stratified as Stratified
from ppl_diffusion.smc.resampling import Systematic as Systematic
from ppl_diffusion.smc.twists import ArgmaxFill as ArgmaxFill
from ppl_diffusion.smc.twists import CallableTwist as CallableTwist
from ppl_diffusion.smc.twists import PersistentFill as PersistentFill
from ppl_diffusion.smc.twists import SampledFill as SampledFill
from ppl_diffusion.smc.weights import Weights as Weights
