"""The noise: schedules, forward processes, uniforms, and the mathematics of one reverse step."""

from ppl_diffusion.processes.base import Absorbing as Absorbing
from ppl_diffusion.processes.base import Interpolating as Interpolating
from ppl_diffusion.processes.base import Process as Process
from ppl_diffusion.processes.base import Uniform as Uniform
from ppl_diffusion.processes.duality import DuoSchedule as DuoSchedule
from ppl_diffusion.processes.duality import coupled_states as coupled_states
from ppl_diffusion.processes.duality import diffusion_signal as diffusion_signal
from ppl_diffusion.processes.duality import diffusion_signal_prime as diffusion_signal_prime
from ppl_diffusion.processes.duality import log_diffusion_noise as log_diffusion_noise
from ppl_diffusion.processes.gaussian import Gaussian as Gaussian
from ppl_diffusion.processes.gaussian import gaussian_bound_terms as gaussian_bound_terms
from ppl_diffusion.processes.mixture import gather_clean as gather_clean
from ppl_diffusion.processes.mixture import log_posterior_mean as log_posterior_mean
from ppl_diffusion.processes.mixture import mixture_log_prob as mixture_log_prob
from ppl_diffusion.processes.mixture import mixture_sample as mixture_sample
from ppl_diffusion.processes.mixture import posterior_to_cavity as posterior_to_cavity
from ppl_diffusion.processes.mixture import three_way as three_way
from ppl_diffusion.processes.nelbo import nelbo_terms as nelbo_terms
from ppl_diffusion.processes.nelbo import step_kl as step_kl
from ppl_diffusion.processes.noise import draw_categorical as draw_categorical
from ppl_diffusion.processes.noise import jax_uniforms as jax_uniforms
from ppl_diffusion.processes.schedules import Cosine as Cosine
from ppl_diffusion.processes.schedules import Linear as Linear
from ppl_diffusion.processes.schedules import LogLinear as LogLinear
from ppl_diffusion.processes.schedules import Polynomial as Polynomial
from ppl_diffusion.processes.schedules import Schedule as Schedule
