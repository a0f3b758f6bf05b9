"""Reverse chains as Pyro distributions; the laws of their steps come from the kernels."""

from ppl_diffusion.distributions.gaussian_chain import GaussianChain as GaussianChain
from ppl_diffusion.distributions.marginal import ChainMarginal as ChainMarginal
from ppl_diffusion.distributions.plackett_luce import PlackettLuce as PlackettLuce
from ppl_diffusion.distributions.reverse_chain import ReverseChain as ReverseChain
from ppl_diffusion.kernels.block_step import BlockStep as BlockStep
from ppl_diffusion.kernels.reveal_step import RevealStep as RevealStep
from ppl_diffusion.kernels.state_step import StateStep as StateStep
from ppl_diffusion.kernels.step import StepDistribution as StepDistribution
from ppl_diffusion.kernels.token_step import TokenStep as TokenStep
