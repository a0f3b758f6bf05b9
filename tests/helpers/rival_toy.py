"""The measured toy as the tests of rivals use it: chains, and draws held to enumerated laws."""

import torch

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.inference import SMC
from ppl_diffusion.kernels import InterpolatingKernel, OrderedKernel, Uniform
from ppl_diffusion.testing.anchored_toys import measured_toy
from ppl_diffusion.testing.oracles import chi_square_p_value

TOY = measured_toy()
PRIOR, GAIN, POSTERIOR = TOY.log_prior.exp(), TOY.log_g, TOY.posterior
SIZE, LENGTH = 4, 4
MASKED = torch.full((LENGTH,), SIZE)
CODES = TOY.potential.codebook
UNIFORM = Uniform(SIZE)


def masked_chain(num_steps=4, kappa=1.0):
    return ReverseChain(
        InterpolatingKernel(TOY.process, TOY.denoiser, num_steps=num_steps, kappa=kappa), LENGTH
    )


def ordered_chain():
    return ReverseChain(OrderedKernel(TOY.process, TOY.denoiser, length=LENGTH), LENGTH)


def uniform_chain(num_steps=4, kappa=1.0):
    denoiser = MarkovDenoiser(TOY.denoiser.initial, TOY.denoiser.transition, UNIFORM)
    kernel = InterpolatingKernel(UNIFORM, denoiser, num_steps=num_steps, kappa=kappa)
    return ReverseChain(kernel, LENGTH)


def counts_of(posterior):
    return torch.bincount(TOY.index(posterior.x0).flatten(), minlength=len(PRIOR))


def require_law(chain, method, law, *, draws=20_000, seed=0, potential=TOY.potential):
    """Hold unweighted draws to a law, by chi-square."""
    runner = SMC(chain, potential, method=method, num_particles=draws, store_path=False)
    posterior = runner.run(seed=seed)
    assert not posterior.exact
    assert chi_square_p_value(counts_of(posterior), law) > 1e-4
    return posterior
