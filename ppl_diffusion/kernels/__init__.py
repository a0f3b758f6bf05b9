"""Reverse kernels and their step distributions, and what most of them are built with."""

from ppl_diffusion.denoisers.prediction import Prediction as Prediction
from ppl_diffusion.denoisers.topk import LatentMixture as LatentMixture
from ppl_diffusion.denoisers.topk import dense_latents as dense_latents
from ppl_diffusion.denoisers.topk import top_k_latents as top_k_latents
from ppl_diffusion.denoisers.uniform_nelbo import (
    uniform_nelbo_from_hidden as uniform_nelbo_from_hidden,
)
from ppl_diffusion.denoisers.uniform_nelbo import uniform_nelbo_terms as uniform_nelbo_terms
from ppl_diffusion.kernels.base import FACTORISED as FACTORISED
from ppl_diffusion.kernels.base import ORDERED as ORDERED
from ppl_diffusion.kernels.base import SAMPLE_ONLY as SAMPLE_ONLY
from ppl_diffusion.kernels.base import Kernel as Kernel
from ppl_diffusion.kernels.block_step import BlockStep as BlockStep
from ppl_diffusion.kernels.blocks import BlockSpec as BlockSpec
from ppl_diffusion.kernels.blocks import tokens_of as tokens_of
from ppl_diffusion.kernels.classifier_based import ClassifierKernel as ClassifierKernel
from ppl_diffusion.kernels.classifier_free import ClassifierFreeKernel as ClassifierFreeKernel
from ppl_diffusion.kernels.confidence import ConfidenceKernel as ConfidenceKernel
from ppl_diffusion.kernels.direct import DirectKernel as DirectKernel
from ppl_diffusion.kernels.event_kernel import EventKernel as EventKernel
from ppl_diffusion.kernels.event_step import EventStep as EventStep
from ppl_diffusion.kernels.extrapolated import ExtrapolatedKernel as ExtrapolatedKernel
from ppl_diffusion.kernels.interpolating import InterpolatingKernel as InterpolatingKernel
from ppl_diffusion.kernels.latent_kernel import LatentKernel as LatentKernel
from ppl_diffusion.kernels.ordered import OrderedKernel as OrderedKernel
from ppl_diffusion.kernels.ordered import first_hitting as first_hitting
from ppl_diffusion.kernels.path import Path as Path
from ppl_diffusion.kernels.path_power import jump_rates as jump_rates
from ppl_diffusion.kernels.path_power import log_path_factor as log_path_factor
from ppl_diffusion.kernels.psi import PsiSchedule as PsiSchedule
from ppl_diffusion.kernels.reveal_order import RevealOrder as RevealOrder
from ppl_diffusion.kernels.reveal_step import RevealStep as RevealStep
from ppl_diffusion.kernels.state_step import StateStep as StateStep
from ppl_diffusion.kernels.step import StepDistribution as StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep as TokenStep
from ppl_diffusion.processes.base import Absorbing as Absorbing
from ppl_diffusion.processes.base import Interpolating as Interpolating
from ppl_diffusion.processes.base import Process as Process
from ppl_diffusion.processes.base import Uniform as Uniform
from ppl_diffusion.processes.padded import Padded as Padded
from ppl_diffusion.processes.schedules import Cosine as Cosine
from ppl_diffusion.processes.schedules import Linear as Linear
from ppl_diffusion.processes.schedules import LogLinear as LogLinear
from ppl_diffusion.processes.schedules import Polynomial as Polynomial
from ppl_diffusion.processes.schedules import Schedule as Schedule
