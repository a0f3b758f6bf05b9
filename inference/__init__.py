"""Inference: one runner, methods as small objects, and what goes with them."""

from ppl_diffusion.inference.baselines import BeamSearch as BeamSearch
from ppl_diffusion.inference.baselines import BestOfN as BestOfN
from ppl_diffusion.inference.baselines import GuidedLineages as GuidedLineages
from ppl_diffusion.inference.baselines import ImportanceSampling as ImportanceSampling
from ppl_diffusion.inference.bootstrap import Bootstrap as Bootstrap
from ppl_diffusion.inference.check import Check as Check
from ppl_diffusion.inference.check import check as check
from ppl_diffusion.inference.correctors import CFG as CFG
from ppl_diffusion.inference.correctors import Composition as Composition
from ppl_diffusion.inference.correctors import Corrector as Corrector
from ppl_diffusion.inference.correctors import Power as Power
from ppl_diffusion.inference.correctors import Product as Product
from ppl_diffusion.inference.correctors import SiteRule as SiteRule
from ppl_diffusion.inference.correctors import Tilt as Tilt
from ppl_diffusion.inference.correctors import order_inconsistency as order_inconsistency
from ppl_diffusion.inference.smc import SMC as SMC
from ppl_diffusion.inference.soft_value import SoftValueGuidance as SoftValueGuidance
from ppl_diffusion.inference.steering import FKSteering as FKSteering
from ppl_diffusion.inference.tempering import Tempering as Tempering
from ppl_diffusion.inference.twisted import TwistedSampler as TwistedSampler
from ppl_diffusion.programs.method import Method as Method
from ppl_diffusion.programs.method import methods as methods
from ppl_diffusion.programs.method import register as register
