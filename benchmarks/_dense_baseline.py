"""Masked ancestral sampling on dense float64 tables: what published samplers pay for a step.

In a step from ``t`` to ``s`` every position is scored over all ``V + 1`` states, whether masked or
not: token ``v`` has probability ``c_v (alpha_s - alpha_t) / (1 - alpha_t)`` and the mask
``(1 - alpha_s) / (1 - alpha_t)``. Gumbel-max picks one, in its cheapest form ``argmax p / E`` with
``E`` exponential; positions that were revealed keep their token. The prediction of a time-free
network is kept while no token of the whole batch changed (the cache of MDLM, Sahoo et al. 2024,
arXiv:2406.07524). In float64 throughout, without which the law is wrong (Zheng et al. 2024,
arXiv:2409.02908). Temporaries are reused where that is possible, which is in its favour.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_diffusion.denoisers import Denoiser
from ppl_diffusion.kernels import InterpolatingKernel


class DenseSampler:
    """Step by step through the grid of an absorbing kernel.

    :param kernel: gives the denoiser, which must be time-free, and the grid.
    """

    def __init__(self, kernel: InterpolatingKernel) -> None:
        self.denoiser: Denoiser = kernel.denoiser
        self.mask, self.times, self.alphas = kernel.process.vocab_size, kernel.times, kernel.alphas

    def predict(self, tokens: Tensor, k: int) -> Tensor:
        """Return the probabilities of all states, float64 ``(B, L, V + 1)``: one network call.

        :param tokens: int64 ``(B, L)``.
        :param k: step index.
        """
        log_c = self.denoiser(tokens, float(self.times[k]))
        table = log_c.new_zeros((*tokens.shape, self.mask + 1), dtype=torch.float64)
        table[..., : self.mask] = log_c
        table[..., : self.mask].exp_()
        return table

    def move(self, tokens: Tensor, clean: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Return the next states.

        :param tokens: int64 ``(B, L)``.
        :param clean: from :meth:`predict`.
        :param k: step index.
        :param generator: source of randomness.
        """
        a, b = float(self.alphas[k]), float(self.alphas[k + 1])
        law = clean * ((b - a) / (1 - a))
        law[..., self.mask] = (1 - b) / (1 - a)
        noise = torch.rand(law.shape, dtype=torch.float64, generator=generator).log_().neg_()
        return torch.where(tokens == self.mask, law.div_(noise).argmax(-1), tokens)

    def sample(self, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """Draw paths.

        :param batch: number of rows ``B``.
        :param length: number ``L`` of positions.
        :param generator: source of randomness.
        :returns: paths, int64 ``(B, T + 1, L)``, and the number of network calls.
        """
        tokens = torch.full((batch, length), self.mask)
        states, clean, calls = [tokens], None, 0
        for k in range(len(self.times) - 1):
            if clean is None:
                clean, calls = self.predict(tokens, k), calls + 1
            moved = self.move(tokens, clean, k, generator)
            clean = clean if torch.equal(moved, tokens) else None
            tokens = moved
            states.append(tokens)
        return torch.stack(states, 1), calls


def cached_calls(path: Tensor) -> int:
    """Return how many network calls the dense sampler needs for a path.

    :param path: int64 ``(B, T + 1, L)``; the whole batch shares one cache.
    """
    changed = (path[:, 1:] != path[:, :-1]).any(-1).any(0)
    return 1 + int(changed[:-1].sum())


@dataclass(frozen=True)
class DenseCost:
    """What the dense sampler takes for one path.

    :param seconds: all of it.
    :param calls: network calls.
    :param num_steps: steps ``T``.
    :param num_measured: steps that were timed; less than all means that ``seconds`` is scaled up.
    """

    seconds: float
    calls: int
    num_steps: int
    num_measured: int


def dense_cost(sampler: DenseSampler, path: Tensor, num_measured: int, seed: int = 0) -> DenseCost:
    """Time evenly spaced steps of a trajectory and scale them up.

    A step costs the same whatever the state, but for the network call that the cache may save; the
    calls are counted exactly. With as many measured steps as there are, the sampler simply runs.

    :param sampler: the sampler.
    :param path: a path of the same chain, int64 ``(B, T + 1, L)``.
    :param num_measured: steps to time.
    :param seed: seed of the noise.
    """
    num_steps, generator = path.shape[1] - 1, torch.Generator().manual_seed(seed)
    if num_measured >= num_steps:
        return _whole_run(sampler, path, generator)
    predicting, moving = 0.0, 0.0
    for k in np.linspace(0, num_steps - 1, num_measured).round().astype(int).tolist():
        started = time.perf_counter()
        clean = sampler.predict(path[:, k], k)
        between = time.perf_counter()
        sampler.move(path[:, k], clean, k, generator)
        predicting += between - started
        moving += time.perf_counter() - between
        del clean
    calls = cached_calls(path)
    seconds = (calls * predicting + num_steps * moving) / num_measured
    return DenseCost(seconds, calls, num_steps, num_measured)


def _whole_run(sampler: DenseSampler, path: Tensor, generator: torch.Generator) -> DenseCost:
    started = time.perf_counter()
    drawn, calls = sampler.sample(path.shape[0], path.shape[2], generator)
    num_steps = drawn.shape[1] - 1
    return DenseCost(time.perf_counter() - started, calls, num_steps, num_steps)
