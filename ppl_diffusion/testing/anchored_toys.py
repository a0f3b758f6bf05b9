"""A measured sequence small enough to enumerate: four sites, four codes, one linear operator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers import MarkovDenoiser
from ppl_diffusion.kernels import Absorbing
from ppl_diffusion.potentials.embedded import GaussianMeasurement
from ppl_diffusion.testing.dense import all_states

CODES = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
"""Codes ``{-1, +1}^2``; the id is binary, most significant bit first, bit 1 is ``+1``."""

TRUTH = (0, 3, 3, 1)
LENGTH, SIGMA = 4, 0.5


@dataclass(frozen=True)
class MeasuredToy:
    """A Markov prior over four tokens, seen through averages of neighbouring codes with noise.

    :ivar process: absorbing, 4 tokens.
    :ivar denoiser: exact for the prior.
    :ivar potential: the likelihood of ``y``.
    :ivar states: all 256 sequences, int64 ``(256, 4)``.
    :ivar log_prior: their log-probabilities, ``(256,)``.
    """

    process: Absorbing
    denoiser: MarkovDenoiser
    potential: GaussianMeasurement
    states: Tensor
    log_prior: Tensor

    @property
    def log_g(self) -> Tensor:
        """Log-likelihood of every sequence, ``(256,)``."""
        return self.potential(self.states)

    @property
    def log_evidence(self) -> float:
        """``log Z`` of the Markov prior."""
        return float(torch.logsumexp(self.log_prior + self.log_g, 0))

    @property
    def evidence(self) -> float:
        """``Z`` without the ``2 pi`` constant, as ``sum_x p(x) exp(-||y - A c||^2/(2 s^2))``."""
        return math.exp(self.log_evidence + self.potential.log_norm)

    @property
    def posterior(self) -> Tensor:
        """Posterior of every sequence, ``(256,)``."""
        return torch.softmax(self.log_prior + self.log_g, 0)

    def index(self, rows: Tensor) -> Tensor:
        """Return the index of sequences among :attr:`states`, int64 ``(*batch,)``."""
        power = 4 ** torch.arange(LENGTH - 1, -1, -1)
        return (rows * power).sum(-1)


def averages(embeddings: Tensor) -> Tensor:
    """Return the averages of sites (0, 1) and (2, 3), coordinate by coordinate, ``(*batch, 4)``.

    :param embeddings: ``(*batch, 4, 2)``.
    """
    pairs = embeddings.unflatten(-2, (2, 2)).mean(-2)  # (*batch, pair, coordinate)
    return pairs.mT.flatten(-2)


def measured_toy(seed: int = 0, sigma: float = SIGMA) -> MeasuredToy:
    """Return the problem with the data of a seed: ``y = A c + sigma * n`` of the same truth.

    :param seed: of NumPy's generator for the noise.
    :param sigma: standard deviation of the noise.
    """
    initial = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    transition = torch.full((4, 4), 0.1, dtype=torch.float64) + 0.6 * torch.eye(4).double()
    process = Absorbing(4)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(4))
    y = averages(CODES[torch.tensor(TRUTH)]) + sigma * noise
    states = all_states(4, LENGTH)
    log_prior = initial.log()[states[:, 0]]
    log_prior = log_prior + transition.log()[states[:, :-1], states[:, 1:]].sum(-1)
    return MeasuredToy(
        process=process,
        denoiser=MarkovDenoiser(initial, transition, process),
        potential=GaussianMeasurement(averages, y, sigma, CODES, linear=True, name="averages"),
        states=states,
        log_prior=log_prior,
    )
