"""Discrete diffusion models as distributions of a probabilistic program."""

__version__ = "0.1.0"
