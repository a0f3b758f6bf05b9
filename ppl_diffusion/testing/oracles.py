"""Everything about a tiny chain by enumeration: the ground truth of every sampler.

``ExactChain`` builds its transition matrices with :mod:`ppl_diffusion.testing.dense`, never with
the code under test, and answers by matrix products: marginals, the law of ``x0``, tilted
posteriors, evidences and the optimal twist ``h_k(x) = E[G(x0) | x_k = x]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import InterpolatingKernel
from ppl_diffusion.smc.twists import Carry
from ppl_diffusion.testing.dense import all_states, prior_law, state_index, state_matrix

LogPotential = Callable[[Tensor], Tensor]
TWIST_FLOOR = -50.0
"""Stand-in for ``-inf`` in exact twists (nats): a twist must be finite."""


@dataclass(frozen=True)
class ExactChain:
    """A reverse chain as an initial law and ``T`` transition matrices.

    :param states: all states, int64 ``(S ** L, L)``.
    :param initial: law of the noisiest state, float64 ``(S ** L,)``.
    :param matrices: transition matrices, float64 ``(T, S ** L, S ** L)``, rows sum to one.
    """

    states: Tensor
    vocab_size: int
    initial: Tensor
    matrices: Tensor

    @classmethod
    def of(cls, chain: ReverseChain) -> ExactChain:
        """Build the matrices of a chain.

        :raises TypeError: if its steps are not three-way mixtures of the current tokens.
        """
        kernel, length, prompt = chain.kernel, chain.length, chain.prompt
        if not (isinstance(kernel, InterpolatingKernel) and kernel.mixes and kernel.markov):
            raise TypeError(f"ExactChain: the steps of {kernel!r} are no three-way mixtures.")
        matrices = [
            state_matrix(kernel, k, length, prompt, chain.given) for k in range(kernel.num_steps)
        ]
        return cls(
            all_states(kernel.process.num_states, length),
            kernel.process.vocab_size,
            prior_law(kernel.process, length, prompt),
            torch.stack(matrices),
        )

    @property
    def num_states(self) -> int:
        """Number ``S`` of states of a site."""
        return int(self.states[-1, 0]) + 1

    @property
    def clean(self) -> Tensor:
        """Which states are clean sequences, bool ``(S ** L,)``."""
        return (self.states < self.vocab_size).all(-1)

    def index(self, tokens: Tensor) -> Tensor:
        """Return the position of sequences among :attr:`states`.

        :param tokens: int64 ``(*batch, L)``.
        """
        return state_index(tokens, self.num_states)

    def laws(self) -> Tensor:
        """Return the law of the state at every grid point, float64 ``(T + 1, S ** L)``."""
        laws = [self.initial]
        for matrix in self.matrices:
            laws.append(laws[-1] @ matrix)
        return torch.stack(laws)

    def x0_law(self) -> Tensor:
        """Return the law of clean sequences, float64 ``(V ** L,)`` in lexicographic order."""
        return self.laws()[-1][self.clean]

    def path_prob(self, path: Tensor) -> Tensor:
        """Return the probability of paths, float64 ``(*batch,)``.

        :param path: int64 ``(*batch, T + 1, L)``.
        """
        index = self.index(path)
        prob = self.initial[index[..., 0]]
        for k, matrix in enumerate(self.matrices):
            prob = prob * matrix[index[..., k], index[..., k + 1]]
        return prob

    def potential_values(self, potential: LogPotential) -> Tensor:
        """Return ``exp(potential)`` of every state, zero where it is not clean, ``(S ** L,)``.

        :param potential: log-potential of clean sequences.
        """
        values = torch.zeros(len(self.states), dtype=torch.float64)
        values[self.clean] = potential(self.states[self.clean]).to(torch.float64).exp()
        return values

    def evidence(self, potential: LogPotential) -> float:
        """Return ``Z = E[G(x0)]``.

        :param potential: ``log G``.
        """
        return float(self.laws()[-1] @ self.potential_values(potential))

    def posterior(self, potential: LogPotential) -> Tensor:
        """Return the tilted law ``p(x0) G(x0) / Z``, float64 ``(V ** L,)``.

        :param potential: ``log G``.
        """
        tilted = (self.laws()[-1] * self.potential_values(potential))[self.clean]
        return tilted / tilted.sum()

    def log_h(self, potential: LogPotential) -> Tensor:
        """Return the optimal twist ``log E[G(x0) | x_k]``, float64 ``(T + 1, S ** L)``.

        :param potential: ``log G``.
        """
        values = [self.potential_values(potential)]
        for matrix in reversed(self.matrices):
            values.append(matrix @ values[-1])
        return torch.stack(values[::-1]).log()

    def twist(self, log_values: Tensor) -> Callable[[Carry, int], Tensor]:
        """Return a twist that looks its value up, floored so that it is finite.

        :param log_values: ``(T + 1, S ** L)``, for instance a multiple of :meth:`log_h`.
        """
        table = log_values.clamp_min(TWIST_FLOOR)
        return lambda carry, k: table[k][self.index(carry["tokens"])]

    def histogram(self, x0: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the weighted frequencies of clean sequences, float64 ``(V ** L,)``.

        :param x0: int64 ``(*batch, L)``.
        :param weights: ``(*batch,)``, equal by default.
        """
        index = state_index(x0, self.vocab_size).flatten()
        mass = torch.ones(len(index)) if weights is None else weights.flatten()
        counts = torch.zeros(self.vocab_size ** x0.shape[-1], dtype=torch.float64)
        counts.index_add_(0, index, mass.to(torch.float64))
        return counts / counts.sum()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return half the L1 distance of two laws.

    :param p: probabilities.
    :param q: probabilities, same shape.
    """
    return float((p - q).abs().sum() / 2)


def z_score(samples: Tensor, expected: float) -> float:
    """Return how many standard errors the mean of samples lies from its expected value.

    :param samples: independent numbers, ``(n,)``.
    :param expected: the expected mean.
    """
    error = samples.std() / len(samples) ** 0.5
    return float((samples.mean() - expected) / error.clamp_min(1e-300))


def chi_square_p_value(counts: Tensor, probs: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test (cells of probability zero must be empty).

    :param counts: observed counts, ``(cells,)``.
    :param probs: expected probabilities, ``(cells,)``.
    :raises ValueError: if a cell of probability zero was observed.
    """
    from scipy.stats import chi2

    possible = probs > 0
    if bool((counts[~possible] > 0).any()):
        raise ValueError("an outcome of probability zero was observed.")
    observed = counts[possible].to(torch.float64)
    expected = probs[possible] * observed.sum()
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chi2.sf(float(statistic), len(observed) - 1))
