"""Inference: one runner, methods as small objects, and what goes with them."""

from ppl_diffusion.inference.anchored_guidance import AnchoredProposal as AnchoredProposal
from ppl_diffusion.inference.anchored_guidance import Guidance as Guidance
from ppl_diffusion.inference.anchored_guidance import TiltedTokens as TiltedTokens
from ppl_diffusion.inference.anchored_remasking import AnchoredRemasking as AnchoredRemasking
from ppl_diffusion.inference.anchored_smc import AnchoredSMC as AnchoredSMC
from ppl_diffusion.inference.attach import attach as attach
from ppl_diffusion.inference.baselines import BeamSearch as BeamSearch
from ppl_diffusion.inference.baselines import BestOfN as BestOfN
from ppl_diffusion.inference.baselines import GuidedLineages as GuidedLineages
from ppl_diffusion.inference.baselines import ImportanceSampling as ImportanceSampling
from ppl_diffusion.inference.bootstrap import Bootstrap as Bootstrap
from ppl_diffusion.inference.check import Check as Check
from ppl_diffusion.inference.check import check as check
from ppl_diffusion.inference.classifier_guidance import ClassifierGuidance as ClassifierGuidance
from ppl_diffusion.inference.classifier_guidance import PluginLikelihood as PluginLikelihood
from ppl_diffusion.inference.correctors import CFG as CFG
from ppl_diffusion.inference.correctors import Composition as Composition
from ppl_diffusion.inference.correctors import Corrector as Corrector
from ppl_diffusion.inference.correctors import Power as Power
from ppl_diffusion.inference.correctors import Product as Product
from ppl_diffusion.inference.correctors import SiteRule as SiteRule
from ppl_diffusion.inference.correctors import Tilt as Tilt
from ppl_diffusion.inference.correctors import order_inconsistency as order_inconsistency
from ppl_diffusion.inference.particle_gibbs import ParticleGibbs as ParticleGibbs
from ppl_diffusion.inference.quantised_expectation import (
    QuantisedExpectation as QuantisedExpectation,
)
from ppl_diffusion.inference.quantisers import Expectation as Expectation
from ppl_diffusion.inference.refinement import Refinement as Refinement
from ppl_diffusion.inference.relaxed import RelaxedDPS as RelaxedDPS
from ppl_diffusion.inference.remask_moves import Remask as Remask
from ppl_diffusion.inference.scout import LatentMoves as LatentMoves
from ppl_diffusion.inference.smc import SMC as SMC
from ppl_diffusion.inference.soft_value import SoftValueGuidance as SoftValueGuidance
from ppl_diffusion.inference.split_gibbs import SplitGibbs as SplitGibbs
from ppl_diffusion.inference.star import G2D2 as G2D2
from ppl_diffusion.inference.steering import FKSteering as FKSteering
from ppl_diffusion.inference.tempering import Tempering as Tempering
from ppl_diffusion.inference.twisted import TwistedSampler as TwistedSampler
from ppl_diffusion.inference.value_network import LearnedValue as LearnedValue
from ppl_diffusion.inference.value_network import ValueNetwork as ValueNetwork
from ppl_diffusion.inference.value_network import bellman_residuals as bellman_residuals
from ppl_diffusion.inference.value_network import fit_value as fit_value
from ppl_diffusion.programs.method import Method as Method
from ppl_diffusion.programs.method import methods as methods
from ppl_diffusion.programs.method import register as register
from ppl_diffusion.smc.gibbs_posterior import GibbsPosterior as GibbsPosterior

# isort: split
# The registry lists methods as they come: those that take any potential first.
from ppl_diffusion.inference.anchored import (
    AnchoredPosteriorSampler as AnchoredPosteriorSampler,
)
