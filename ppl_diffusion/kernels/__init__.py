"""The mathematics of one reverse step: schedules, processes, the three-way mixture, bounds."""

from ppl_diffusion.kernels.base import FACTORISED as FACTORISED
from ppl_diffusion.kernels.base import ORDERED as ORDERED
from ppl_diffusion.kernels.base import SAMPLE_ONLY as SAMPLE_ONLY
from ppl_diffusion.kernels.base import BlockSpec as BlockSpec
from ppl_diffusion.kernels.base import Kernel as Kernel
from ppl_diffusion.kernels.base import tokens_of as tokens_of
from ppl_diffusion.kernels.classifier_based import ClassifierKernel as ClassifierKernel
from ppl_diffusion.kernels.classifier_free import ClassifierFreeKernel as ClassifierFreeKernel
from ppl_diffusion.kernels.confidence import ConfidenceKernel as ConfidenceKernel
from ppl_diffusion.kernels.duality import DuoSchedule as DuoSchedule
from ppl_diffusion.kernels.duality import coupled_states as coupled_states
from ppl_diffusion.kernels.duality import diffusion_signal as diffusion_signal
from ppl_diffusion.kernels.duality import diffusion_signal_prime as diffusion_signal_prime
from ppl_diffusion.kernels.duality import log_diffusion_noise as log_diffusion_noise
from ppl_diffusion.kernels.extrapolated import ExtrapolatedKernel as ExtrapolatedKernel
from ppl_diffusion.kernels.interpolating import InterpolatingKernel as InterpolatingKernel
from ppl_diffusion.kernels.mixture import draw_categorical as draw_categorical
from ppl_diffusion.kernels.mixture import gather_clean as gather_clean
from ppl_diffusion.kernels.mixture import log_posterior_mean as log_posterior_mean
from ppl_diffusion.kernels.mixture import mixture_log_prob as mixture_log_prob
from ppl_diffusion.kernels.mixture import mixture_sample as mixture_sample
from ppl_diffusion.kernels.mixture import posterior_to_cavity as posterior_to_cavity
from ppl_diffusion.kernels.mixture import three_way as three_way
from ppl_diffusion.kernels.nelbo import nelbo_terms as nelbo_terms
from ppl_diffusion.kernels.nelbo import step_kl as step_kl
from ppl_diffusion.kernels.noise import jax_uniforms as jax_uniforms
from ppl_diffusion.kernels.ordered import OrderedKernel as OrderedKernel
from ppl_diffusion.kernels.ordered import first_hitting as first_hitting
from ppl_diffusion.kernels.path_power import jump_rates as jump_rates
from ppl_diffusion.kernels.path_power import log_path_factor as log_path_factor
from ppl_diffusion.kernels.prediction import Prediction as Prediction
from ppl_diffusion.kernels.processes import Absorbing as Absorbing
from ppl_diffusion.kernels.processes import Interpolating as Interpolating
from ppl_diffusion.kernels.processes import Process as Process
from ppl_diffusion.kernels.processes import Uniform as Uniform
from ppl_diffusion.kernels.psi import PsiSchedule as PsiSchedule
from ppl_diffusion.kernels.schedules import Cosine as Cosine
from ppl_diffusion.kernels.schedules import Linear as Linear
from ppl_diffusion.kernels.schedules import LogLinear as LogLinear
from ppl_diffusion.kernels.schedules import Schedule as Schedule
from ppl_diffusion.kernels.topk import LatentMixture as LatentMixture
from ppl_diffusion.kernels.topk import dense_latents as dense_latents
from ppl_diffusion.kernels.topk import top_k_latents as top_k_latents
from ppl_diffusion.kernels.uniform_nelbo import (
    uniform_nelbo_from_hidden as uniform_nelbo_from_hidden,
)
from ppl_diffusion.kernels.uniform_nelbo import uniform_nelbo_terms as uniform_nelbo_terms
