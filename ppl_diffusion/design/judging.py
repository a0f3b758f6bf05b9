"""What independent judges say about designs, and about the prior for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_diffusion.design.ranking import Designs

if TYPE_CHECKING:
    from ppl_diffusion.distributions import ReverseChain
    from ppl_diffusion.models import Oracle

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
    bound_samples: int = 16

    def columns(self, tokens: Tensor, generator: torch.Generator) -> Columns:
        """Score sequences."""
        columns = {
            **self._bound(tokens, generator),
            "gc": torch.isin(tokens, self.gc.to(tokens.device)).to(torch.float64).mean(-1),
        }
        for name, oracle in (("design", self.designer), ("judge", self.judge)):
            if oracle is not None:
                mean, sd = oracle.predict(tokens)
                columns[f"expression_{name}"] = mean.to(torch.float64)
                columns[f"expression_{name}_sd"] = sd.to(torch.float64)
        return columns

    def _bound(self, tokens: Tensor, generator: torch.Generator) -> Columns:
        marginal = self.chain.marginal()
        terms = marginal.bound_samples(
            tokens, num_samples=self.bound_samples, generator=generator
        ).to(torch.float64)
        error = terms.std(0) / math.sqrt(len(terms))
        return {"log_prob_bound": terms.mean(0), "log_prob_bound_sd": error}


def compare(designs: Designs, columns: Columns, prior: Columns) -> dict[str, dict[str, float]]:
    """Set the weighted designs against plain prior samples.

    :param designs: the distinct designs.
    :param columns: their scores.
    :param prior: scores of prior samples.
    :returns: for each score the weighted mean of the designs with its standard error over runs
        (NaN for one run), and mean, standard deviation and 95th percentile of the prior samples.
    """
    return {
        name: {
            "designs_mean": float(designs.weight @ values),
            "designs_standard_error": standard_error(designs.run_weight @ values),
            "prior_mean": float(prior[name].mean()),
            "prior_sd": float(prior[name].std()),
            "prior_95th_percentile": float(prior[name].quantile(0.95)),
        }
        for name, values in columns.items()
        if not name.endswith("_sd")
    }


def standard_error(values: Tensor) -> float:
    """Standard error of a mean over runs; NaN for a single run."""
    count = len(values)
    return float(values.std()) / math.sqrt(count) if count > 1 else math.nan
