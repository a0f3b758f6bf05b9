"""Reverse chains as Pyro distributions."""

from ppl_diffusion.distributions.marginal import ChainMarginal as ChainMarginal
from ppl_diffusion.distributions.reverse_chain import ReverseChain as ReverseChain
from ppl_diffusion.distributions.token_step import TokenStep as TokenStep
