"""Reverse chains as Pyro distributions."""

from ppl_diffusion.distributions.block_step import BlockStep as BlockStep
from ppl_diffusion.distributions.marginal import ChainMarginal as ChainMarginal
from ppl_diffusion.distributions.reveal_step import RevealStep as RevealStep
from ppl_diffusion.distributions.reverse_chain import ReverseChain as ReverseChain
from ppl_diffusion.distributions.state_step import StateStep as StateStep
from ppl_diffusion.distributions.step import StepDistribution as StepDistribution
from ppl_diffusion.distributions.token_step import TokenStep as TokenStep
