"""Inference programs: each one file, reading like the method section of its paper."""

from ppl_diffusion.inference.smc import SMC as SMC
