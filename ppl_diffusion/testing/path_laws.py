"""The law of whole paths of a tiny chain, by following every move of positive probability."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.rows import RowTable
from ppl_diffusion.testing.dense import all_states
from ppl_diffusion.testing.oracles import chi_square_p_value


@dataclass(frozen=True, eq=False)
class PathLaw:
    """All paths a chain can take under ``p(path) G(x0) / Z``.

    :param paths: int64 ``(P, T + 1, L)``.
    :param probs: their probabilities, float64 ``(P,)``.
    :param log_z: ``log Z``.
    """

    paths: Tensor
    probs: Tensor
    log_z: float

    @classmethod
    def of(
        cls, chain: ReverseChain, log_potential: Callable[[Tensor], Tensor] | None = None
    ) -> PathLaw:
        """Enumerate the paths of a chain whose step depends on the tokens alone.

        :param chain: a tiny chain without plates.
        :param log_potential: ``log G``, none by default.
        """
        kernel, states = chain.kernel, all_states(chain.kernel.process.num_states, chain.length)
        log_p = kernel.prior_log_prob(states, chain.prompt)
        path, log_p = _possible(states[:, None], log_p)
        for k in range(kernel.num_steps):
            carry = kernel.start_carry(path[:, -1], given=chain.given)
            step = kernel.step(carry, k, fixed=chain.fixed)
            moves = step.log_prob(states[:, None]).mT  # (paths, states)
            longer = torch.cat(
                [
                    path[:, None].expand(-1, len(states), -1, -1),
                    states[None, :, None].expand(len(path), -1, -1, -1),
                ],
                2,
            )
            path, log_p = _possible(longer.flatten(0, 1), (log_p[:, None] + moves).flatten())
        if log_potential is not None:
            path, log_p = _possible(path, log_p + log_potential(path[:, -1]))
        log_z = torch.logsumexp(log_p, 0)
        return cls(path, (log_p - log_z).exp(), float(log_z))

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Return independent paths, int64 ``(num, T + 1, L)``."""
        return self.paths[torch.multinomial(self.probs, num, True, generator=generator)]

    def counts(self, paths: Tensor) -> Tensor:
        """Return how often each path was seen, float64 ``(P,)``.

        :param paths: int64 ``(*batch, T + 1, L)``.
        :raises ValueError: if one of them has probability zero.
        """
        values = torch.arange(len(self.paths))
        table = RowTable.build(self.paths.flatten(1), values)
        found = table.find(paths.reshape(-1, self.paths[0].numel()))
        if bool((found < 0).any()):
            raise ValueError("a path of probability zero was observed.")
        return torch.bincount(table.values[found], minlength=len(values)).to(torch.float64)

    def total_variation(self, paths: Tensor) -> float:
        """Return the distance between observed frequencies and the law.

        :param paths: int64 ``(*batch, T + 1, L)``.
        """
        counts = self.counts(paths)
        return float((counts / counts.sum() - self.probs).abs().sum() / 2)

    def p_value(self, paths: Tensor) -> float:
        """Return the p-value of Pearson's test, cells expected fewer than 5 times taken together.

        :param paths: independent paths, int64 ``(*batch, T + 1, L)``.
        """
        counts = self.counts(paths)
        rare = self.probs * counts.sum() < 5
        pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, self.probs)]
        return chi_square_p_value(*pooled)


def _possible(path: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    keep = log_p > -torch.inf
    return path[keep], log_p[keep]
