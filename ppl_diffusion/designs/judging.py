"""What independent judges say about designs, and about the prior for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppl_diffusion.designs.program import BASES, Target
from ppl_diffusion.designs.ranking import Designs

Columns = dict[str, Tensor]
BOUND_SAMPLES = 16
"""Noise levels per sequence for the prior bound."""


def scores(target: Target, tokens: Tensor, generator: torch.Generator) -> Columns:
    """Score sequences: how natural the prior finds them, their GC, and what the oracles say."""
    tokens, marginal = tokens.to(target.prior.device), target.chain.marginal()
    terms = marginal.bound_samples(tokens, num_samples=BOUND_SAMPLES, generator=generator).double()
    gc = torch.tensor([BASES.index(base) for base in "GC"], device=tokens.device)
    columns = {
        "log_prob_bound": terms.mean(0),
        "log_prob_bound_sd": terms.std(0) / math.sqrt(BOUND_SAMPLES),
        "gc": torch.isin(tokens, gc).double().mean(-1),
    }
    for name, oracle in (("design", target.designer), ("judge", target.judge)):
        if oracle is not None:
            mean, sd = oracle.predict(tokens)
            columns[f"expression_{name}"] = mean.double()
            columns[f"expression_{name}_sd"] = sd.double()
    return {name: values.cpu() for name, values in columns.items()}


def compare(designs: Designs, columns: Columns, prior: Columns) -> dict[str, dict[str, float]]:
    """Set the weighted designs against plain prior samples.

    :returns: for each score the weighted mean of the designs with its standard error over runs
        (NaN for one run), and mean, standard deviation and 95th percentile of the prior samples.
    """
    return {
        name: {
            "designs_mean": float(designs.weight @ values),
            "designs_standard_error": standard_error(
                designs.run_weight @ values, designs.run_share
            ),
            "prior_mean": float(prior[name].mean()),
            "prior_sd": float(prior[name].std()),
            "prior_95th_percentile": float(prior[name].quantile(0.95)),
        }
        for name, values in columns.items()
        if not name.endswith("_sd")
    }


def standard_error(values: Tensor, share: Tensor | None = None) -> float:
    """Standard error of a mean over runs; NaN for a single run.

    :param share: how much of the mean is each run's; by default all count alike. A run that is
        nearly all of it is one run, however many others there are.
    """
    if len(values) < 2:
        return math.nan
    share = torch.full_like(values, 1 / len(values)) if share is None else share
    return float(values.std() * share.norm())
