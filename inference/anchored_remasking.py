"""Anchored remasking: which anchors are committed at a step, and which sites are masked again.

A confidence-ordered decoder (MaskGIT: Chang et al. 2022, arXiv:2202.04200) fills all masked sites,
keeps the tokens it is surest of, and masks the others again. After step ``k`` of ``T``::

    m_k = max(1, min(|M| - 1, floor(L cos(pi k / 2T))))        cosine schedule, m_T = 0

sites stay masked: those of the lowest ``confidence + tau_k Gumbel``. *Anchored* means that the
tokens are anchors and the confidence is that of the tilted table, so that a token which the prior
finds unlikely and the data demand is kept (Rout et al. 2025, arXiv:2510.02291).

The sites that are committed are a draw without replacement, whose density is Plackett-Luce: no
argsort is needed, and a proposal can be weighed
(:class:`~ppl_diffusion.distributions.PlackettLuce`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppl_diffusion.distributions import PlackettLuce
from ppl_diffusion.inference.quantisers import FLOOR, Expectation

Score = Literal["anchor", "max", "neg-entropy"]
Order = Literal["posterior", "average", "prior", "random"]
Schedule = Literal["cosine", "linear"]
Annealing = Literal["product", "linear"]


@dataclass(frozen=True)
class AnchoredRemasking:
    """How sure one is of each site, and how many are committed.

    :param score: the confidence: ``"anchor"``, the log-probability of the token that would be
        committed; ``"max"``, that of the likeliest token; ``"neg-entropy"``. Anchors need not be
        likely (they are means of codes), which the other two do not mind.
    :param order: whose confidence: that of the ``"posterior"`` table, of its ``"average"`` over the
        inner loop, of the ``"prior"`` prediction, or nobody's (``"random"``).
    :param schedule: how the number of masks falls: ``"cosine"`` (few early), or ``"linear"``.
    :param noise: multiplies the temperature; 0 commits the surest, with certainty.
    :param annealing: how the temperature falls from one: ``"product"``,
        ``tau_k = prod_{j <= k} (1 - j / T)``, what released decoders do (they overwrite the
        variable), or ``"linear"``, ``1 - k / T``.
    :raises ValueError: if an option is not usable.
    """

    score: Score = "anchor"
    order: Order = "posterior"
    schedule: Schedule = "cosine"
    noise: float = 1.0
    annealing: Annealing = "product"

    def __post_init__(self) -> None:
        for name, choices in (
            ("score", ("anchor", "max", "neg-entropy")),
            ("order", ("posterior", "average", "prior", "random")),
            ("schedule", ("cosine", "linear")),
            ("annealing", ("product", "linear")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"AnchoredRemasking: {name} must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}."
                )
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(
                f"AnchoredRemasking: noise must be a finite number >= 0, got {self.noise}."
            )

    def temperature(self, k: int, num_steps: int) -> float:
        """Return ``tau_k``.

        :param k: steps made with this one, 1 to ``num_steps``.
        :param num_steps: steps ``T`` of the chain.
        """
        if self.order == "random":
            return 1.0  # scores are equal: any temperature is the uniform order
        if self.annealing == "linear":
            return self.noise * (1 - k / num_steps)
        return self.noise * math.prod(1 - j / num_steps for j in range(1, k + 1))

    def num_masked(self, masked: Tensor, free: Tensor, k: int, num_steps: int) -> Tensor:
        """Return how many sites of each row stay masked after a step, int64 ``(*batch,)``.

        :param masked: those that are masked before it, int64 ``(*batch,)``.
        :param free: those that were masked at the start.
        :param k: steps made with this one, 1 to ``num_steps``.
        :param num_steps: steps ``T`` of the chain.
        """
        if k == num_steps:
            return torch.zeros_like(masked)
        share = math.cos(math.pi * k / (2 * num_steps))
        share = share if self.schedule == "cosine" else 1 - k / num_steps
        # A share such as 1 - 1/3 of 3 sites must not fall short of 2 by a rounding.
        wanted = (free.to(torch.float64) * share + 1e-9).floor().to(masked.dtype)
        return torch.minimum(masked, torch.minimum(masked - 1, wanted).clamp_min(1))

    def scores(self, found: Expectation, chosen: Tensor, log_d: Tensor) -> Tensor:
        """Return how sure one is of each site, finite, ``(n, L)``.

        :param found: the tilted table.
        :param chosen: the tokens that would be committed, int64 ``(n, L)``.
        :param log_d: the prediction that was tilted, ``(n, L, K)``.
        """
        if self.order == "random":
            return torch.zeros(chosen.shape, dtype=torch.float64, device=chosen.device)
        table = {"posterior": found.log_r, "average": found.log_average, "prior": log_d}[self.order]
        return confidence(table, chosen, self.score)

    def selection(
        self, scores: Tensor, masked: Tensor, free: Tensor, k: int, num_steps: int
    ) -> PlackettLuce:
        """Return the law of the sites that are committed, the surest first.

        :param scores: ``(n, L)``.
        :param masked: bool ``(n, L)``.
        :param free: sites that were masked at the start, int64 ``(n,)``.
        :param k: steps made with this one, 1 to ``num_steps``.
        :param num_steps: steps ``T`` of the chain.
        """
        before = masked.sum(-1)
        count = before - self.num_masked(before, free, k, num_steps)
        tau = self.temperature(k, num_steps)
        return PlackettLuce(scores, count, eligible=masked, temperature=tau, validate_args=False)


def confidence(log_r: Tensor, chosen: Tensor, score: Score) -> Tensor:
    """Return how sure a table is of each site, finite, float64 ``(*batch, L)``.

    :param log_r: log of the table, ``(*batch, L, K)``.
    :param chosen: the tokens that are meant by ``"anchor"``, int64 ``(*batch, L)``.
    :param score: see :class:`AnchoredRemasking`.
    """
    log_r = log_r.to(torch.float64).clamp_min(FLOOR)
    if score == "anchor":
        return log_r.gather(-1, chosen[..., None])[..., 0]
    if score == "max":
        return log_r.amax(-1)
    return (log_r.exp() * log_r).sum(-1)
