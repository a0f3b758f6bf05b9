"""What independent judges say about designs, and about the prior for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.design.ranking import Designs, pooled_log_weights

if TYPE_CHECKING:
    from ppl_diffusion.distributions import ReverseChain
    from ppl_diffusion.models.oracles import Oracle
    from ppl_diffusion.smc import ParticlePosterior

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Judges:
    """Who scores a sequence.

    :param chain: the prior; its bound says how natural a sequence is.
    :param gc: ids of the tokens that count as GC.
    :param designer: the oracle that designed, or None.
    :param judge: an oracle fitted on other families of sequences, or None.
    :param bound_samples: noise levels per sequence for the prior bound.
    """

    chain: ReverseChain
    gc: Tensor
    designer: Oracle | None = None
    judge: Oracle | None = None
    bound_samples: int = 64

    def columns(self, tokens: Tensor, generator: torch.Generator) -> Columns:
        """Score sequences.

        :param tokens: int64 ``(M, L)``.
        :param generator: randomness of the bound.
        :returns: one tensor ``(M,)`` per column: ``log_prob_bound`` (nats), ``gc``, and
            ``expression_design``, ``expression_judge`` with their ``_sd`` where there are oracles.
        """
        columns = {
            "log_prob_bound": self._bound(tokens, generator),
            "gc": torch.isin(tokens, self.gc).to(torch.float64).mean(-1),
        }
        for name, oracle in (("design", self.designer), ("judge", self.judge)):
            if oracle is not None:
                mean, sd = oracle.predict(tokens)
                columns[f"expression_{name}"] = mean.to(torch.float64)
                columns[f"expression_{name}_sd"] = sd.to(torch.float64)
        return columns

    def _bound(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        marginal = self.chain.marginal()
        bound: Tensor = marginal.log_prob_bound(
            tokens, num_samples=self.bound_samples, generator=generator
        )
        return bound.to(torch.float64)


def compare(
    posterior: ParticlePosterior, designs: Designs, columns: Columns, prior: Columns
) -> dict[str, dict[str, float]]:
    """Set the weighted designs against plain prior samples.

    :param posterior: the particles, for the spread over runs.
    :param designs: the distinct designs.
    :param columns: their scores.
    :param prior: scores of prior samples.
    :returns: for each score the weighted mean of the designs with its standard error over runs
        (NaN for one run), and mean, standard deviation and 95th percentile of the prior samples.
    """
    run_weight = run_weights(posterior, designs)
    return {
        name: {
            "designs_mean": float(designs.weight @ values),
            "designs_standard_error": _error(run_weight @ values),
            "prior_mean": float(prior[name].mean()),
            "prior_sd": float(prior[name].std()),
            "prior_95th_percentile": float(prior[name].quantile(0.95)),
        }
        for name, values in columns.items()
        if not name.endswith("_sd")
    }


def run_weights(posterior: ParticlePosterior, designs: Designs) -> Tensor:
    """Weight of every design within every run that lived.

    :param posterior: particles of ``R`` runs.
    :param designs: the ``M`` distinct designs.
    :returns: float64 ``(number of live runs, M)``, rows sum to 1.
    """
    live = torch.isfinite(posterior.log_evidence)
    x0, log_weights = posterior.x0[live], posterior.log_weights[live]
    rows = torch.cat([designs.tokens, x0.reshape(-1, x0.shape[-1])])
    codes = torch.unique(rows, dim=0, return_inverse=True)[1]
    position = torch.zeros(int(codes.max()) + 1, dtype=torch.int64)
    position[codes[: len(designs)]] = torch.arange(len(designs))
    index = position[codes[len(designs) :]].reshape(log_weights.shape)
    out = torch.zeros(len(x0), len(designs), dtype=torch.float64)
    return out.scatter_add(1, index, log_weights.exp())


def evidence(posterior: ParticlePosterior) -> dict[str, float]:
    """Pool the evidence of the runs.

    :param posterior: particles of ``R`` runs.
    :returns: ``pooled``, the logarithm of the mean estimate (dead runs count as zero), and its
        ``standard_error`` by the delta method over runs (NaN for one run).
    """
    log_z = posterior.log_evidence
    pooled = float(torch.logsumexp(log_z, 0)) - math.log(len(log_z))
    relative = (log_z - pooled).exp() if math.isfinite(pooled) else torch.full_like(log_z, math.nan)
    return {"pooled": pooled, "standard_error": _error(relative)}


def pooled_ess(posterior: ParticlePosterior) -> float:
    """Effective sample size of all runs together.

    :param posterior: particles of ``R`` runs.
    """
    log_weights = pooled_log_weights(posterior).flatten()
    return float(torch.exp(-torch.logsumexp(2 * log_weights, 0)))


def _error(values: Tensor) -> float:
    count = len(values)
    return float(values.std()) / math.sqrt(count) if count > 1 else math.nan
