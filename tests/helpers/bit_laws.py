"""Laws of the bits of enumerable latent problems."""

import torch


def joint_of(problem):
    """Return the law of the bits, ``(2,) * L``."""
    laws = problem.weights @ codes_of(problem)
    return laws.reshape([2] * problem.length)


def codes_of(problem):
    bits = torch.cartesian_prod(*[torch.arange(2)] * problem.length)
    sites = torch.arange(problem.length)
    return torch.stack([problem.tokens[c][sites, bits].prod(-1) for c in range(2)])
